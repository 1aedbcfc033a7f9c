"""How a checkpoint makes sentence embeddings, in the files of sentence-transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minilm_exp.terms import pool

# B sequences   S tokens per sequence, padded   D hidden size

# Its modes that `terms.pool` has, by their names in newer and in older files.
_MODES = {
    "mean": "mean",
    "cls": "first_token",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first_token",
}


@dataclass(frozen=True)
class Pooling:
    """Of sentence embeddings.

    Attributes:
        name: mean or first_token, over real tokens.
        normalises: Whether embeddings have length 1.
    """

    name: str
    normalises: bool


def read_pooling(folder: Path) -> Pooling | None:
    """What modules.json says; None where there is none, or it asks for more than this."""
    try:
        modules = json.loads((folder / "modules.json").read_text("utf-8"))
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            return None
        text = (folder / modules[1]["path"] / "config.json").read_text("utf-8")
        config: dict[str, Any] = json.loads(text)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _MODES:
        return None
    return Pooling(_MODES[modes[0]], "Normalize" in kinds)


def embed(states: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """Sentence embeddings (B, D) of last hidden states (B, S, D)."""
    embeddings = pool(states, attention_mask, pooling.name)
    return nn.functional.normalize(embeddings, dim=-1) if pooling.normalises else embeddings
