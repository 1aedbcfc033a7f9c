"""What a checkpoint's own files may ask for, before a library follows them.

A checkpoint comes from somebody else. Weights are read from safetensors, or by a reader that
builds tensors only; code that a checkpoint brings along (`auto_map`) is run for a teacher whose
config says so, and never fetched from another repository.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minilm_exp.errors import ExperimentError

_CONFIGS = ("config*.json", "tokenizer_config.json")
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def check_folder(folder: Path, named: str, trusts_code: bool = False) -> None:
    """Refuses a checkpoint that asks for code or for files outside of its folder.

    Args:
        folder: The checkpoint; a file is taken for its config.json.
        named: The setting that gives it.
        trusts_code: Whether code in the folder itself may be run.

    Raises:
        ExperimentError: It does.
    """
    files = [folder]
    if folder.is_dir():
        files = sorted(file for pattern in _CONFIGS for file in folder.glob(pattern))
    for file in files:
        _check_config(_read(file), f"{named}: {file}", named, trusts_code)
    for file in sorted(folder.glob("*.index.json")):
        weights = _read(file).get("weight_map")
        for name in weights.values() if isinstance(weights, dict) else ():
            if not isinstance(name, str) or name in ("", "..") or name != Path(name).name:
                raise ExperimentError(
                    f"{named}: {file} names the weights {name!r:.100}, which is no file of the"
                    " same folder: copy the checkpoint as it was published"
                )


@functools.cache
def check_hub_model(hub_id: str, commit: str | None, named: str, trusts_code: bool) -> None:
    """The same of a commit of the hub; what cannot be had is left to its loader."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    for read in (
        lambda: PreTrainedConfig.get_config_dict(hub_id, revision=commit)[0],
        lambda: get_tokenizer_config(hub_id, revision=commit),
    ):
        try:
            config: Any = read()
        except Exception:  # the loader raises it again, and says what to do
            continue
        _check_config(config, f"{named}: {hub_id}", named, trusts_code)


def code_files(folder: Path) -> list[Path]:
    """The Python files of a checkpoint, in a fixed order."""
    return sorted(path for path in folder.rglob("*.py") if path.is_file())


def _check_config(config: Any, where: str, named: str, trusts_code: bool) -> None:
    if not isinstance(config, dict):
        return
    for name in _ATTENTION:
        if "/" in str(config.get(name) or ""):
            raise ExperimentError(
                f"{where} asks for the attention kernel {config[name]!r:.100} of another"
                f" repository, which is code: leave {name} out of it"
            )
    for entry in _entries(config.get("auto_map")):
        if "--" in entry:
            raise ExperimentError(
                f"{where} asks for code of another repository ({entry:.100}): it is not run;"
                " copy that code into the checkpoint's folder, and its auto_map without the part up"
                " to --"
            )
        if not trusts_code and named.startswith("teacher."):
            raise ExperimentError(
                f"{where} brings code of its own (auto_map: {entry:.100}), which is not run: read"
                " it, and where you trust it set teacher.trust_remote_code=true"
            )
        if not trusts_code:
            raise ExperimentError(
                f"{where} brings code of its own (auto_map: {entry:.100}), which is run for a"
                " teacher only: give a checkpoint of an architecture that transformers has"
            )


def _entries(auto_map: Any) -> Iterator[str]:
    """The classes that it names, in whichever form."""
    if isinstance(auto_map, str):
        yield auto_map
    elif isinstance(auto_map, (dict, list)):
        for value in auto_map.values() if isinstance(auto_map, dict) else auto_map:
            yield from _entries(value)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # the loader says what is wrong with it
    return found if isinstance(found, dict) else {}
