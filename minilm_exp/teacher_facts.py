"""What a checkpoint's config.json says of its shape, under the same names for all architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minilm_exp.errors import ExperimentError
from minilm_exp.hub import hub_commit
from minilm_exp.sentence_modules import PATTERNS, is_sentence_encoder, read_pooling

_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "dim", "d_model", "n_embd"),
    "num_attention_heads": ("num_attention_heads", "n_heads", "n_head"),
    "intermediate_size": ("intermediate_size", "hidden_dim", "n_inner"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
}


def read_facts(source: str, revision: str | None) -> dict[str, Any]:
    """Model type and sizes of a folder, a config.json or a hub id.

    Raises:
        ExperimentError: There is no readable config.json, or it lacks a size.
    """
    return facts_of(read_config(source, revision), source)


def read_config(source: str, revision: str | None) -> dict[str, Any]:
    """The content of the config.json of a folder, of the file itself, or of a hub id.

    Raises:
        ExperimentError: There is none that can be read.
    """
    path = Path(source)
    absent = "does not exist: give a folder with a config.json"
    if is_there(source):
        path = path.expanduser()
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ExperimentError(f"{path} {absent}") from error
        except OSError as error:
            raise ExperimentError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ExperimentError(f"{path} is not valid JSON: {error}") from error
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ExperimentError(f"{path} {absent}")
    else:
        config = _read_from_hub(source, revision)
    if not isinstance(config, dict) or "model_type" not in config:
        raise ExperimentError(f"{path} names no model_type: it is not a transformers config.json")
    return config


def kind_of(source: str, revision: str | None) -> str:
    """What a checkpoint is for: sentence_encoder, classifier, or encoder.

    Raises:
        ExperimentError: There is no readable config.json.
    """
    if modules_folder(source, revision) is not None:
        return "sentence_encoder"
    names = read_config(source, revision).get("architectures")
    is_classifier = isinstance(names, list) and any(
        str(name).endswith("ForSequenceClassification") for name in names
    )
    return "classifier" if is_classifier else "encoder"


def pooling_of(source: str, revision: str | None) -> str | None:
    """How a sentence encoder pools; None for what is no sentence encoder.

    Raises:
        ExperimentError: In a way that no objective here has.
    """
    folder = modules_folder(source, revision)
    if folder is None:
        return None
    pooling = read_pooling(folder)
    if pooling is None:
        raise ExperimentError(
            f"teacher.path: the modules of {source} make embeddings in another way than by mean or"
            " [CLS] pooling: set teacher.pooling=mean or first_token to distil embeddings pooled so"
        )
    return pooling.name


def modules_folder(source: str, revision: str | None) -> Path | None:
    """The folder with the modules of a sentence encoder, those of the hub fetched."""
    if is_there(source):
        folder = Path(source).expanduser()
        return folder if is_sentence_encoder(folder) else None
    from huggingface_hub import snapshot_download

    try:
        commit = model_commit(source, revision)
        folder = Path(snapshot_download(source, revision=commit, allow_patterns=PATTERNS))
    except Exception:  # offline; the encoder itself is missed with a better word
        return None
    return folder if is_sentence_encoder(folder) else None


def is_there(path: str) -> bool:
    """Whether there is such a file or folder; what cannot be the name of one is not."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, or the home of nobody
        return False


def facts_of(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The same from the content of a config.json."""
    facts: dict[str, Any] = {"model_type": config["model_type"]}
    if not isinstance(config["model_type"], str):
        raise ExperimentError(f"{source}: model_type={config['model_type']!r:.100} is no name")
    for fact, names in _NAMES.items():
        values = [config[name] for name in names if config.get(name) is not None]
        if not values:
            if fact == "intermediate_size" and "hidden_size" in facts:
                values = [4 * facts["hidden_size"]]
            else:
                raise ExperimentError(
                    f"{source} ({config['model_type']}) names none of {', '.join(names)}; add it,"
                    " or choose an encoder that has it"
                )
        if type(values[0]) is not int or not 0 < values[0] < 2**31:
            raise ExperimentError(
                f"{source}: {fact}={values[0]!r:.100} is no size; it must be a whole number above 0"
            )
        facts[fact] = values[0]
    return facts


def _read_from_hub(hub_id: str, revision: str | None) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    commit = model_commit(hub_id, revision)
    try:
        config, _ = PreTrainedConfig.get_config_dict(hub_id, revision=commit)
    except (OSError, ValueError) as error:
        raise ExperimentError(no_model(hub_id)) from error
    return config


def model_commit(hub_id: str, revision: str | None) -> str:
    """The commit behind a model's revision; offline, that of an earlier download.

    Raises:
        ExperimentError: The hub does not answer or does not have it, and nothing was downloaded.
    """
    try:
        return hub_commit(hub_id, revision, "model")
    except Exception as error:  # the hub client raises many kinds, all meaning the same here
        raise ExperimentError(no_model(hub_id)) from error


def no_model(hub_id: str) -> str:
    """What to do when the hub does not answer or does not have a model."""
    return (
        f"{hub_id} is no folder here and cannot be had from the hub (no network, or no such model);"
        " give a local copy with teacher.path=FOLDER, or teacher.weights=random for a smoke run"
    )
