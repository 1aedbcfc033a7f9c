"""What a result came from: content, code and versions, and the key that names a run by them."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError
from minilm_exp.hub import pinned_commit
from minilm_exp.precision import teacher_dtype
from minilm_exp.resolvers import REPOSITORY
from minilm_exp.settings import NEUTRAL, Settings, as_dict
from minilm_exp.task_settings import GENERATION_SETTINGS, Task

# Raised by every change that CHANGELOG.md declares "changes results".
RESULTS_VERSION = 3

_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "mlflow", "hydra-core")
_MODEL_FILES = (
    "config.json", "*.safetensors", "*.bin", "*.index.json", "tokenizer*", "vocab*", "*.model",
    "merges.txt", "special_tokens_map.json",
)  # fmt: skip


def run_key(settings: Settings, precision: str, fingerprints: dict[str, str]) -> str:
    """A name for everything that can change the result of a run.

    Args:
        settings: The run. How fast it runs, where it is recorded and where it is written do not
            count, and neither do the names of its inputs.
        precision: The resolved precision.
        fingerprints: Of the content behind every input path.
    """
    plain = _plain(settings, precision)
    plain["recipe"]["stages"] = [
        [
            stage.name,
            stage.settings.data,
            stage.teacher,
            stage.start,
            stage.task_training,
            stage.head_only,
            _plain(stage.settings, precision),
        ]
        for stage in settings.stages
    ]
    plain["inputs"] = fingerprints
    plain["results_version"] = RESULTS_VERSION
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _plain(settings: Settings, precision: str) -> dict[str, Any]:
    plain = as_dict(settings)
    for name in NEUTRAL:
        del plain[name]
    for task in plain["tasks"].values():
        for name in ("data", "train_data", "files"):
            task.pop(name, None)
        if task.get("kind") != "similarity":
            task.pop("pooling", None)
        if task.get("kind") != "generation":
            task.pop("target_column", None)
    for group, names in {
        # The code that it allows is in the teacher's fingerprint.
        # The pooling is in the terms that read it.
        "teacher": (
            "name",
            "path",
            "hub_id",
            "revision",
            "package",
            "trust_remote_code",
            "pooling",
        ),
        # What a budget chose counts, not how.
        "student": ("path", "config", "budget"),
        "corpus": ("files", "datasets"),
    }.items():
        for name in names:
            del plain[group][name]
    for name in ("logging_steps", "evaluation_steps", "checkpoint_steps", "keep_checkpoints"):
        del plain["training"][name]
    if plain["teacher"]["head"] == "new":
        del plain["teacher"]["head"]
    # In their order, in which linear maps are drawn.
    plain["objective"]["terms"] = list(plain["objective"]["terms"].items())
    plain["training"]["precision"] = precision
    del plain["task_training"]["checkpoint_steps"]
    _leave_out_generation(plain)
    if settings.recipe.name == "finetune" or not settings.corpus_stages:
        plain["precision"] = precision
    else:
        plain["teacher_dtype"] = str(teacher_dtype(precision, settings.runtime.teacher_cache))
    for group in settings.unread_groups:
        del plain[group]
    return plain


def hub_commits(settings: Settings) -> dict[str, str]:
    """The commit of each repository of the hub that a run reads, by input."""
    found: dict[str, list[str]] = {}

    def note(name: str, hub_id: str, revision: str | None, kind: str) -> None:
        commit = pinned_commit(hub_id, revision, kind)
        if commit is not None:
            found.setdefault(f"commit.{name}", []).append(f"{hub_id}@{commit}")

    teacher, unread = settings.teacher, settings.unread_groups
    source = teacher.path or (None if teacher.package else teacher.hub_id)
    if "teacher" not in unread and teacher.weights != "random" and source is not None:
        note("teacher", source, teacher.revision, "model")
    if "corpus" not in unread:
        for data_set in settings.corpus.datasets:
            note("corpus", data_set.path, data_set.revision, "dataset")
    for name, task in settings.tasks.items():
        is_of_hub = isinstance(task, Task) and task.files is None and settings.data_root is None
        for data in (task.data, task.train_data) if is_of_hub else ():
            if data is not None:
                note(f"task.{name}", data.hub_id, data.revision, "dataset")
    return {name: " ".join(dict.fromkeys(commits)) for name, commits in found.items()}


def _leave_out_generation(plain: dict[str, Any]) -> None:
    """Runs without such a task have the keys that they had before there was the kind."""
    training = plain["task_training"]
    used = {task["family"] for task in plain["tasks"].values() if task.get("kind") == "generation"}
    for name, family in list(training["families"].items()):
        if family["max_target_length"] is not None and name not in used:
            del training["families"][name]
    for given in (training, *training["families"].values()):
        for name in GENERATION_SETTINGS:
            if given[name] is None:
                del given[name]


def fingerprint_model(path: Path) -> str:
    """Hash of a checkpoint's configuration, weights and tokenizer."""
    files = sorted({file for pattern in _MODEL_FILES for file in path.glob(pattern)})
    return fingerprint_files(files, names=True)


def fingerprint_files(files: list[Path], names: bool = False) -> str:
    """Hash of the content of files, in the order given."""
    digest = xxhash.xxh3_128()
    for file in files:
        try:
            if names:
                digest.update(file.name.encode())
            digest.update(str(file.stat().st_size).encode())
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise ExperimentError(f"{file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def fingerprint_text(text: str) -> str:
    """Hash of a text."""
    return xxhash.xxh3_128(text.encode()).hexdigest()


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Names what a tokenizer does, not the truncation and padding that a call has left in it."""
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    content = backend.to_str()
    if truncation is not None:
        backend.enable_truncation(**truncation)
    if padding is not None:
        backend.enable_padding(**padding)
    # What the library adds to the backend.
    around = [
        tokenizer.model_input_names,
        tokenizer.special_tokens_map,
        tokenizer.truncation_side,
        tokenizer.padding_side,
        tokenizer.split_special_tokens,
    ]
    return fingerprint_text(f"{json.dumps(around, default=str)} {content}")


@functools.cache
def git_state() -> dict[str, str]:
    """Commit, whether the tree differs from it, and the difference.

    What lies in outputs/ makes no difference to what is computed.
    """
    code = ["--", ".", ":(exclude)outputs"]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout if done.returncode == 0 else ""

    try:
        return {
            "commit": git("rev-parse", "HEAD").strip() or "unknown",
            "dirty": str(bool(git("status", "--porcelain", *code).strip())).lower(),
            "diff": git("diff", "--no-ext-diff", "HEAD", *code),
        }
    except OSError:  # git is not installed
        return {"commit": "unknown", "dirty": "unknown", "diff": ""}


def device_name(device: str) -> str:
    """The hardware by name."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of what computes the results."""
    found: dict[str, Any] = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}
