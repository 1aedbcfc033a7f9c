"""Heads on encoders: of tasks, and of masked language modelling."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from minilm_exp.errors import ExperimentError
from minilm_exp.settings import Teacher
from minilm_exp.teacher import source_of, told_simply


def put_under_head(model: PreTrainedModel, encoder: PreTrainedModel, head: str) -> None:
    """Gives a model with a head the encoder's weights.

    Args:
        model: With a new head.
        encoder: Of the same architecture and shape.
        head: What the head is called in the error.

    Raises:
        ExperimentError: The architecture has another encoder under this head.
    """
    loaded = model.base_model.load_state_dict(encoder.state_dict(), strict=False)
    # Some architectures predict without the encoder's pooler, or with one of their own.
    unmatched = [
        key for key in (*loaded.missing_keys, *loaded.unexpected_keys) if "pooler" not in key
    ]
    if unmatched:
        raise ExperimentError(
            f"{encoder.config.model_type} has another encoder under its {head} head than the one"
            f" that is trained ({unmatched[0]})"
        )


def take_from_under_head(encoder: PreTrainedModel, model: PreTrainedModel) -> None:
    """Gives the encoder the weights that it has under the head; what is not there stays."""
    encoder.load_state_dict(model.base_model.state_dict(), strict=False)


def head_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters above the encoder's layers: the head's own, and a pooler's."""
    prefix = f"{model.base_model_prefix}."
    return {
        name
        for name, _ in model.named_parameters()
        if not name.startswith(prefix) or "pooler" in name
    }


def compute_heads_in_float32(model: PreTrainedModel) -> None:
    """In bf16 a score between 0 and 5 would be a multiple of 1/64, and spans would tie."""
    for name, module in model.named_children():
        if name != model.base_model_prefix:
            module.forward = functools.partial(_in_float32, module.forward)


def _in_float32(forward: Callable[..., Any], states: Tensor, *more: Any, **named: Any) -> Any:
    with torch.autocast(states.device.type, enabled=False):
        return forward(states.float(), *more, **named)


def load_masked_lm(teacher: Teacher, encoder: PreTrainedModel) -> PreTrainedModel:
    """The teacher with its head of masked language modelling, frozen and in evaluation mode.

    Args:
        teacher: Names the checkpoint; with weights=random the head is drawn like the rest.
        encoder: The same teacher without it.

    Raises:
        ExperimentError: The checkpoint has none; tables write `unavailable`.
    """
    if teacher.weights == "random":
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(
            encoder.config, dtype=torch.float32, trust_remote_code=False
        )
        put_under_head(model, encoder, "masked language modelling")
        return model.eval().requires_grad_(False)
    source, revision = source_of(teacher)
    with told_simply(source):
        model, found = AutoModelForMaskedLM.from_pretrained(
            source,
            revision=revision,
            config=AutoConfig.from_pretrained(
                source, revision=revision, trust_remote_code=teacher.trust_remote_code
            ),
            trust_remote_code=teacher.trust_remote_code,
            dtype=torch.float32,
            output_loading_info=True,
        )
    missing = sorted(str(key) for key in {*found["missing_keys"], *found["mismatched_keys"]})
    if missing:
        raise ExperimentError(
            f"teacher={teacher.name}: unavailable, because the checkpoint {source} has no head of"
            f" masked language modelling ({missing[0]} is missing), whose predictions the terms"
            " logits and labels compare on a corpus; choose a teacher that has one, another"
            " objective, or recipe=task_specific for the predictions of a task"
        )
    return model.eval().requires_grad_(False)


def load_classifier(teacher: Teacher) -> PreTrainedModel:
    """The teacher with its own head of sequence classification, frozen and in evaluation mode.

    Raises:
        ExperimentError: The checkpoint has none.
    """
    source, revision = source_of(teacher)
    with told_simply(source):
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            source, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    model, found = loaded
    missing = sorted(str(key) for key in {*found["missing_keys"], *found["mismatched_keys"]})
    if missing:
        raise ExperimentError(
            f"teacher.head=own: the checkpoint {source} has no head of sequence classification"
            f" ({missing[0]} is missing); set teacher.head=new, which fine-tunes it on the task"
        )
    compute_heads_in_float32(model)
    classifier: PreTrainedModel = model.eval().requires_grad_(False)
    return classifier


def load_lm_head(source: Path | str, revision: str | None = None) -> dict[str, Tensor]:
    """The checkpoint's head of masked language modelling without its embeddings; empty if none.

    A model that writes begins with it.
    """
    with told_simply(source):
        loaded: Any = AutoModelForMaskedLM.from_pretrained(
            source, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    model, found = loaded
    if found["missing_keys"] or found["mismatched_keys"]:
        return {}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{model.base_model_prefix}.")
        and not name.endswith("decoder.weight")
    }


def add_masked_lm_head(
    encoder: PreTrainedModel, teacher: PreTrainedModel, seed: int, of_teacher: bool
) -> PreTrainedModel:
    """A copy of the student under a head of masked language modelling.

    Args:
        encoder: The student.
        teacher: With its head.
        seed: Of a new head.
        of_teacher: Whether the head begins with the teacher's weights, where its sizes are the
            student's; the output embeddings are the student's own in any case, where the
            architecture ties them.
    """
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_config(
        copy.deepcopy(encoder.config), dtype=torch.float32, trust_remote_code=False
    )
    if of_teacher:
        own = model.state_dict()
        prefix = f"{model.base_model_prefix}."
        model.load_state_dict(
            {
                name: tensor
                for name, tensor in teacher.state_dict().items()
                if not name.startswith(prefix) and name in own and own[name].shape == tensor.shape
            },
            strict=False,
        )
        model.tie_weights()
    # Last, because tied output embeddings came with the teacher's head.
    put_under_head(model, encoder, "masked language modelling")
    return model
