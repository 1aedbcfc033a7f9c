"""Checkpoints that somebody else made: with code of their own, or files that run some."""

import json
import os

CONFIGURATION = """
import pathlib
from transformers import BertConfig

pathlib.Path({marker!r}).touch()


class MineConfig(BertConfig):
    model_type = "mine"
"""
MODELING = """
from transformers import BertModel
from .configuration_mine import MineConfig


class MineModel(BertModel):
    config_class = MineConfig
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast


class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mknod, (self.marker,)


def give_code(folder, marker, tokenizer=True, prefix=""):
    """Gives a checkpoint modelling code of its own, which makes a file when it is imported."""
    (folder / "configuration_mine.py").write_text(CONFIGURATION.format(marker=str(marker)))
    (folder / "modeling_mine.py").write_text(MODELING)
    auto_map = {
        "AutoConfig": f"{prefix}configuration_mine.MineConfig",
        "AutoModel": f"{prefix}modeling_mine.MineModel",
    }
    change(
        folder / "config.json", model_type="mine", architectures=["MineModel"], auto_map=auto_map
    )
    if tokenizer:
        (folder / "tokenization_mine.py").write_text(TOKENIZATION)
        auto_map = {"AutoTokenizer": [None, f"{prefix}tokenization_mine.MineTokenizer"]}
        change(folder / "tokenizer_config.json", tokenizer_class="MineTokenizer", auto_map=auto_map)
    return folder


def change(file, **values):
    """Sets values of a JSON file."""
    content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(content | values))
