"""The student: its shape, its first weights, and what distillation will leave untrained."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from minilm_exp.checkpoint_code import check_folder
from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.settings import Student, init_layers
from minilm_exp.states import StateTap, layers_of
from minilm_exp.teacher import load_whole_encoder

_HIDDEN_DROPOUT = ("hidden_dropout_prob", "hidden_dropout", "dropout", "embedding_dropout",
                   "mlp_dropout", "resid_pdrop", "embd_pdrop")  # fmt: skip
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


def build_student(
    student: Student,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    teacher_layer: int,
    dropout: tuple[float, float],
    seed: int,
    teacher_ids: Tensor | None = None,
) -> PreTrainedModel:
    """An encoder of the teacher's architecture in the student's shape, with its first weights.

    The feed-forward size is 4 x hidden_size, as in the released students (the papers do not say),
    or the teacher's own ratio where the feed-forward is gated. Random weights are drawn as the
    architecture's library class does it. With init=teacher_layers they are those of the teacher's
    layers that `init_layers` names, and of its embeddings.

    Args:
        student: Shape and start.
        teacher: Gives the architecture, and the weights where init asks for them.
        tokenizer: The student's.
        teacher_layer: The layer that is distilled, counted from 1.
        dropout: Probabilities for hidden states and attention while distilling.
        seed: Of the random weights.
        teacher_ids: The teacher's id of each token of the student, where those differ.

    Raises:
        ExperimentError: The shape does not exist in this architecture, or the tokens differ.
    """
    if student.path is not None:
        return _load(student.path, teacher, tokenizer, dropout)
    if student.config is not None:
        file = Path(student.config).expanduser()
        check_folder(file, "student.config")
        config = AutoConfig.from_pretrained(file, trust_remote_code=False)
    else:
        config = _shaped_config(student, teacher, teacher_layer)
    set_dropout(config, *dropout)
    if teacher_ids is not None:
        config.vocab_size = len(teacher_ids)
        for name in ("pad", "bos", "eos", "sep", "cls", "mask"):
            if getattr(config, f"{name}_token_id", None) is not None:
                setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    torch.manual_seed(seed)
    try:
        # The class of a custom teacher is known by now.
        encoder = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ExperimentError(
            f"student: {config.model_type} cannot be built in this shape: {error}"
        ) from error
    if student.init == "teacher_layers":
        layers = init_layers(student, teacher_layer, len(layers_of(teacher)))
        _copy_teacher_layers(encoder, teacher, layers, teacher_ids)
    return encoder


def set_dropout(config: PreTrainedConfig, hidden: float, attention: float) -> None:
    """Sets the dropout probabilities under the names that the architecture uses."""
    for names, value in ((_HIDDEN_DROPOUT, hidden), (_ATTENTION_DROPOUT, attention)):
        for name in names:
            if getattr(config, name, None) is not None:
                setattr(config, name, value)


def untrained_parameters(tap: StateTap) -> list[str]:
    """Names of the model's parameters that no gradient of a loss over the tap's states reaches.

    The relation loss ends at the last layer's query, key and value, so that layer's attention
    output and feed-forward, and a pooler, keep their first weights (true of the method, not of this
    code).
    """
    device = next(tap.encoder.parameters()).device
    states = tap(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))
    total = torch.stack([states[state].float().sum() for state in sorted(states)]).sum()
    parameters = {
        name: parameter
        for name, parameter in tap.encoder.named_parameters()
        if parameter.requires_grad  # fixed sinusoids do not
    }
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return [name for name, gradient in zip(parameters, gradients) if gradient is None]


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of an encoder without its pooler, as MiniLM's Table 4 counts them.

    Attributes:
        total: All.
        embedding: Of the token embeddings alone, the column "Emd".
        transformer: Of the Transformer layers, the column "Trm".
    """

    total: int
    embedding: int
    transformer: int


def count_parameters(encoder: PreTrainedModel) -> ParameterCounts:
    """Counts the parameters of an encoder."""
    total = sum(
        parameter.numel() for name, parameter in encoder.named_parameters() if "pooler" not in name
    )
    try:
        layers: nn.Module = layers_of(encoder)
    except ExperimentError:
        layers = getattr(encoder, "encoder", encoder)
    return ParameterCounts(
        total=total,
        embedding=sum(p.numel() for p in encoder.get_input_embeddings().parameters()),
        transformer=sum(p.numel() for p in layers.parameters()),
    )


def _shaped_config(
    student: Student, teacher: PreTrainedModel, teacher_layer: int
) -> PreTrainedConfig:
    config = copy.deepcopy(teacher.config)
    old_hidden_size, old_heads = config.hidden_size, config.num_attention_heads
    config.num_hidden_layers = student.num_layers
    config.hidden_size = student.hidden_size
    if getattr(config, "pooler_hidden_size", None) == old_hidden_size:
        config.pooler_hidden_size = student.hidden_size
    config.num_attention_heads = student.num_attention_heads
    feed_forward = "hidden_dim" if hasattr(config, "hidden_dim") else "intermediate_size"
    old_intermediate_size = getattr(config, feed_forward)
    if student.intermediate_size is not None:
        intermediate_size = student.intermediate_size
    elif _is_gated(teacher, old_intermediate_size):
        intermediate_size = round(old_intermediate_size * student.hidden_size / old_hidden_size)
    else:
        intermediate_size = 4 * student.hidden_size
    setattr(config, feed_forward, intermediate_size)
    if getattr(config, "head_dim", None) is not None:
        config.head_dim = student.hidden_size // student.num_attention_heads
    if getattr(config, "num_key_value_heads", None) is not None:
        group = old_heads // config.num_key_value_heads
        config.num_key_value_heads = max(1, student.num_attention_heads // group)
    if getattr(config, "layer_types", None):
        config.layer_types = _layer_types(config.layer_types, student.num_layers, teacher_layer)
    _set_embedding_size(config, student, old_hidden_size)
    return config


def _is_gated(teacher: PreTrainedModel, intermediate_size: int) -> bool:
    """Whether the feed-forward multiplies two projections, together or apart."""
    return any(
        isinstance(module, nn.Linear)
        and (module.out_features == 2 * intermediate_size or "gate" in name.rsplit(".", 1)[-1])
        for name, module in teacher.named_modules()
    )


def _layer_types(teacher_types: list[str], num_layers: int, teacher_layer: int) -> list[str]:
    """Global or local attention per layer: the teacher's pattern counted down from its layer.

    So the student's last layer sees as far as the teacher layer that it learns from.
    """
    return [
        teacher_types[(teacher_layer - num_layers + index) % len(teacher_types)]
        for index in range(num_layers)
    ]


def _set_embedding_size(
    config: PreTrainedConfig, student: Student, teacher_hidden_size: int
) -> None:
    teacher_size = getattr(config, "embedding_size", None)
    if teacher_size is None:
        if student.embedding_size not in (None, student.hidden_size):
            raise ExperimentError(
                f"student.embedding_size={student.embedding_size}: {config.model_type} has no"
                " embedding size apart from its hidden size; leave it at null"
            )
    elif student.embedding_size is not None:
        config.embedding_size = student.embedding_size
    elif teacher_size == teacher_hidden_size:
        config.embedding_size = student.hidden_size


def _copy_teacher_layers(
    encoder: PreTrainedModel,
    teacher: PreTrainedModel,
    sources: list[int],
    teacher_ids: Tensor | None,
) -> None:
    student_layers, teacher_layers = layers_of(encoder), layers_of(teacher)
    try:
        for layer, source in zip(student_layers, sources):
            layer.load_state_dict(teacher_layers[source - 1].state_dict())
        prefix = next(name for name, m in encoder.named_modules() if m is student_layers)
        outside = {
            name: tensor
            for name, tensor in teacher.state_dict().items()
            if not name.startswith(f"{prefix}.")
        }
        if teacher_ids is not None:
            embeddings = teacher.get_input_embeddings()
            name = next(name for name, m in teacher.named_modules() if m is embeddings)
            outside[f"{name}.weight"] = outside[f"{name}.weight"][teacher_ids]
        encoder.load_state_dict(outside, strict=False)
    except RuntimeError as error:
        raise ExperimentError(
            "student.init=teacher_layers: the sizes of student and teacher layers differ (set"
            f" student.intermediate_size={getattr(teacher.config, 'intermediate_size', '...')}?):"
            f" {str(error).splitlines()[-1].strip()}"
        ) from error


def load_checkpoint(
    path: str,
    dropout: tuple[float, float] | None = None,
    named: str = "student.path",
    trusts_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The encoder and tokenizer of a folder; a task head in it is left out.

    Args:
        path: The folder.
        dropout: Probabilities for hidden states and attention, instead of the checkpoint's.
        named: What the error calls the folder.
        trusts_code: Whether code in it is run: that of the run's own teacher, in its own folders.

    Raises:
        ExperimentError: They cannot be loaded.
    """
    folder = Path(path).expanduser()
    tokenizer = load_checkpoint_tokenizer(path, named, trusts_code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusts_code)
        if dropout is not None:
            set_dropout(config, *dropout)
        encoder = load_whole_encoder(folder, config, None, trusts_code)
    except ExperimentError:
        raise
    except Exception as error:  # files can be wrong in as many ways as there are loaders
        raise ExperimentError(f"{named}: {folder} cannot be loaded: {reason_of(error)}") from error
    return encoder, tokenizer


def load_checkpoint_tokenizer(
    path: str, named: str = "student.path", trusts_code: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder; the rest as for `load_checkpoint`.

    Raises:
        ExperimentError: It cannot be loaded, or is not a fast one.
    """
    folder = Path(path).expanduser()
    check_folder(folder, named, trusts_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts_code)
    except Exception as error:  # files can be wrong in as many ways as there are loaders
        raise ExperimentError(f"{named}: {folder} cannot be loaded: {reason_of(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ExperimentError(
            f"{named}: {folder} has no fast tokenizer (tokenizer.json); convert it with"
            " transformers first"
        )
    return tokenizer


def _load(
    path: str,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    dropout: tuple[float, float],
) -> PreTrainedModel:
    encoder, own_tokenizer = load_checkpoint(path, dropout)
    if own_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ExperimentError(
            f"student.path: the tokenizer of {path} has another vocabulary than expected;"
            " relations need the same tokens on both sides"
        )
    if type(encoder) is not type(teacher):
        raise ExperimentError(
            f"student.path: {path} is a {type(encoder).__name__}, the teacher a"
            f" {type(teacher).__name__}; a student has its teacher's architecture"
        )
    return encoder
