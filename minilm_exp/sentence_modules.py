"""What makes a sentence encoder of an encoder, in the files of sentence-transformers.

modules.json names what embeddings go through after the encoder; each of these modules has a folder.
Files of versions 2 to 6 are read.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm_exp.errors import ExperimentError

# Modes of pooling that `terms.pool` has, by their names in newer and in older files.
_MODES = {
    "mean": "mean",
    "cls": "first_token",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first_token",
}
# Classes that are kept; any other would be code that a checkpoint has imported.
_KINDS = ("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout")
_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
# What is fetched of a repository of the hub, beside the encoder.
PATTERNS = [*_FILES, "[0-9]*_*/*.json", "[0-9]*_*/*.safetensors"]


@dataclass(frozen=True)
class Pooling:
    """How sentence embeddings are made of the last hidden states.

    Attributes:
        name: mean or first_token, over real tokens.
        normalises: Whether embeddings have length 1.
    """

    name: str
    normalises: bool


def is_sentence_encoder(folder: Path) -> bool:
    """Whether sentence-transformers wrote the folder."""
    return (folder / "modules.json").is_file()


def read_pooling(folder: Path) -> Pooling | None:
    """What modules.json says; None where there is none, or it asks for more than this."""
    try:
        modules = json.loads((folder / "modules.json").read_text("utf-8"))
        kinds = [_kind(module) for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            return None
        text = (folder / modules[1]["path"] / "config.json").read_text("utf-8")
        config: dict[str, Any] = json.loads(text)
        modes = config.get("pooling_mode")
        if modes is None:
            named = [name for name in config if name.startswith("pooling_mode_")]
            modes = [name for name in named if config[name]]
        modes = [modes] if isinstance(modes, str) else list(modes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if len(modes) != 1 or modes[0] not in _MODES:
        return None
    return Pooling(_MODES[modes[0]], "Normalize" in kinds)


def check_modules(source: Path) -> list[str]:
    """The folders of a sentence encoder's modules, if a student can keep them.

    Raises:
        ExperimentError: modules.json cannot be read, or names code, files from elsewhere, or an
            encoder that does not lie beside it.
    """
    named = f"teacher.path: {source / 'modules.json'}"
    try:
        modules = json.loads((source / "modules.json").read_text("utf-8"))
        places = [(_kind(module), str(module["path"])) for module in modules]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExperimentError(f"{named} cannot be read as a list of modules: {error}") from error
    folders = [place for _, place in places if place]
    for kind, place in places:
        # The student's own encoder takes the place of the teacher's.
        is_root = place == "" and kind == "Transformer"
        is_inside = place == Path(place).name and place not in ("..", ".", "") and "\0" not in place
        is_single = folders.count(place) <= 1
        if kind not in _KINDS or not (
            is_root or (is_inside and is_single and kind != "Transformer")
        ):
            raise ExperimentError(
                f"{named} has the module {kind} in {place!r:.100}: only"
                f" {', '.join(_KINDS)} of sentence-transformers are kept, in folders of their own,"
                " and the Transformer in the folder itself: take it out of modules.json"
            )
    return folders


def keep_modules(source: Path, target: Path) -> None:
    """Copies the modules of a sentence encoder to a student of the same hidden size.

    Raises:
        ExperimentError: They are not what can be kept, see `check_modules`.
    """
    folders = check_modules(source)
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for place in folders:
        (target / place).mkdir()  # some have no file of their own
        for file in sorted((source / place).glob("*")):
            if file.suffix in (".json", ".safetensors") and file.is_file():
                shutil.copyfile(file, target / place / file.name)


def _kind(module: dict[str, Any]) -> str:
    """The class without its place in the library; the whole name of one from elsewhere."""
    name = str(module["type"])
    return name.rsplit(".", 1)[-1] if name.startswith("sentence_transformers.") else name
