"""Self-attention relations and the distillation loss over them.

Source: MiniLMv2, arXiv:2012.15828, equations 5 to 8.

Shape suffixes in this file:
    B sequences   S tokens per sequence, padded   D hidden size   P pairs
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from minilm_exp.errors import ExperimentError
from minilm_exp.relations_block import block_losses

Pair = tuple[str, str]

STATES = ("query", "key", "value")

# Relation head sizes up to which the Triton kernel fits into every GPU, and into a large one.
_WIDEST_HEAD_AUTO = 64
_WIDEST_HEAD = 128


def relation_loss(
    teacher: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    pairs: Iterable[Pair],
    num_relation_heads: int,
    attention_mask: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Sum of the self-attention relation losses over the chosen pairs (equation 5, weights 0 or 1).

    Each term is the mean over relation heads and real query tokens of KL(teacher || student)
    between the rows of the two relations (equation 6). A relation is the softmax over the keys of
    the scaled dot products of two states, split into relation heads; each side is scaled by the
    square root of its own relation head size (equations 7 and 8). The unit is nats.

    What the paper leaves open, and our choice:
        - It treats one sequence. A batch is the mean over its sequences, so that a short sequence
          counts as much as a long one.
        - It has no padding. Padded keys are left out of both softmaxes and padded query rows out
          of the mean; padding on either side, in any amount and with any content, changes
          neither the value nor the gradient.
        - Arithmetic is in float32 whatever the autocast data type, in float64 for float64 states.

    The gradient is computed with the value, in blocks of bounded size that are used again. So
    memory grows with the states only, and the loss cannot be differentiated twice.

    Args:
        teacher: The states "query", "key" and "value" that `pairs` needs, each (B, S, D_teacher).
        student: The same, each (B, S, D_student). Hidden sizes may differ from the teacher's.
        pairs: Relations as pairs of state names; ("query", "key") is the scaled dot product of
            queries with keys.
        num_relation_heads: Number of equal parts that each state vector is split into; must
            divide both hidden sizes. Need not be the number of attention heads of either model.
        attention_mask: (B, S), 1 for real tokens and 0 for padding; None where nothing is padded.
        kernel: "block" (PyTorch), "triton" (CUDA), or "auto", see `resolve_kernel`.

    Returns:
        A scalar. The gradient reaches `student` only.

    Raises:
        ValueError: No or unknown pairs, sizes that do not fit, or a sequence of padding only.
        RuntimeError: Inside a torch.func transform, or differentiated twice or forward.
        ExperimentError: The kernel that is asked for cannot run here.
    """
    return relation_losses(teacher, student, pairs, num_relation_heads, attention_mask, kernel)[0]


@torch.compiler.disable
def relation_losses(
    teacher: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    pairs: Iterable[Pair],
    num_relation_heads: int,
    attention_mask: Tensor | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`relation_loss`, and its terms (P), in the order of `pairs` and without a gradient."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"inside a torch.func transform: {_NOT_TWICE}")
    pairs = [(first, second) for first, second in pairs]
    _check(teacher, student, pairs, num_relation_heads, attention_mask)
    names = sorted({name for pair in pairs for name in pair})
    states = [owner[name] for owner in (teacher, student) for name in names]
    widest = max(state.shape[-1] for state in states) // num_relation_heads
    if kernel == "auto" and (
        widest > _WIDEST_HEAD_AUTO or any(state.dtype == torch.float64 for state in states)
    ):
        kernel = "block"
    kernel = resolve_kernel(kernel, student[names[0]].device.type)
    if kernel == "triton" and widest > _WIDEST_HEAD:
        raise ExperimentError(
            f"relation heads of size {widest} are above the {_WIDEST_HEAD} that"
            " runtime.relation_kernel=triton holds in a GPU's shared memory; use"
            " runtime.relation_kernel=block"
        )
    compute = _compute_with(kernel)
    teacher = {name: teacher[name].detach() for name in names}
    arrange, restore, lengths = _arranged(attention_mask, student[names[0]].shape)

    def value_and_gradient(
        states: dict[str, Tensor], with_gradient: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses_P, gradients = compute(
            {name: arrange(state) for name, state in teacher.items()},
            {name: arrange(state) for name, state in states.items()},
            pairs,
            num_relation_heads,
            lengths,
            with_gradient,
        )
        return losses_P, {name: restore(gradient) for name, gradient in gradients.items()}

    total, losses_P = _RelationLoss.apply(
        value_and_gradient, names, torch.is_grad_enabled(), *(student[name] for name in names)
    )
    return total, losses_P


def resolve_kernel(asked: str, device_type: str) -> str:
    """The kernel to use, "block" or "triton"; `auto` is triton on CUDA where it is installed.

    Raises:
        ExperimentError: triton is asked for where it cannot run.
    """
    if asked == "block" or (asked == "auto" and device_type != "cuda"):
        return "block"
    has_triton = importlib.util.find_spec("triton") is not None
    if asked == "auto":
        return "triton" if has_triton else "block"
    if not has_triton:
        raise ExperimentError(
            "runtime.relation_kernel=triton: the package triton is not installed; use"
            " runtime.relation_kernel=block"
        )
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ExperimentError(
            f"runtime.relation_kernel=triton does not run on {device_type}; use"
            " runtime.relation_kernel=block (TRITON_INTERPRET=1 runs it slowly, for tests)"
        )
    return "triton"


def _compute_with(kernel: str) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    if kernel == "triton":
        from minilm_exp.relations_triton import triton_losses

        return triton_losses
    return block_losses


class _RelationLoss(torch.autograd.Function):
    """The sum of the losses, with the gradient that was computed beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        value_and_gradient: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        names: list[str],
        is_grad_enabled: bool,
        *states: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(states[0].device.type, enabled=False):
            losses_P, gradients = value_and_gradient(
                dict(zip(names, states)),
                is_grad_enabled and any(state.requires_grad for state in states),
            )
        losses_P = losses_P.to(torch.promote_types(states[0].dtype, torch.float32))
        ctx.save_for_backward(*gradients.values())
        ctx.dtypes = [state.dtype for state in states]
        ctx.mark_non_differentiable(losses_P)
        return losses_P.sum(), losses_P

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"backward with create_graph=True: {_NOT_TWICE}")
        gradients = [
            (upstream * gradient).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return None, None, None, *gradients

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"forward-mode differentiation: {_NOT_TWICE}")


_NOT_TWICE = (
    "the relation loss computes its gradient together with its value and has no second derivative;"
    " differentiate it once, with loss.backward()"
)

_Rearrange = Callable[[Tensor], Tensor]


def _arranged(
    attention_mask: Tensor | None, shape: torch.Size
) -> tuple[_Rearrange, _Rearrange, list[int]]:
    """How to put real tokens first and the longest sequence first, how to undo it, and lengths.

    Neither order matters to the loss. What stands behind a sequence becomes zero, so that content
    that is not finite does no harm.
    """
    if attention_mask is None or attention_mask.bool().all():
        return lambda state: state, lambda gradient: gradient, [shape[1]] * shape[0]
    is_token_BS = attention_mask.bool()
    lengths_B, sequences_B = is_token_BS.sum(dim=1).sort(descending=True, stable=True)
    lengths = lengths_B.tolist()
    tokens_BS = is_token_BS.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    index = (sequences_B[:, None], tokens_BS[sequences_B, : lengths[0]])
    is_padding_BS1 = ~is_token_BS[index][..., None]

    def arrange(state_BSD: Tensor) -> Tensor:
        return state_BSD[index].masked_fill_(is_padding_BS1, 0)

    def restore(gradient_BSD: Tensor) -> Tensor:
        restored_BSD = gradient_BSD.new_zeros(*shape[:2], gradient_BSD.shape[-1])
        restored_BSD[index] = gradient_BSD.masked_fill(is_padding_BS1, 0)
        return restored_BSD

    return arrange, restore, lengths


def _check(
    teacher: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    pairs: list[Pair],
    num_relation_heads: int,
    attention_mask: Tensor | None,
) -> None:
    if not pairs:
        raise ValueError("pairs is empty: a relation loss needs at least one pair of states")
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"pairs names a relation twice: {pairs}")
    unknown = sorted({name for pair in pairs for name in pair} - set(STATES))
    if unknown:
        raise ValueError(f"pairs names {unknown}; a pair is made of {STATES}")
    names = sorted({name for pair in pairs for name in pair})
    shape_BS = student[names[0]].shape[:2]
    for owner, states in (("teacher", teacher), ("student", student)):
        for name in names:
            if states[name].dim() != 3 or states[name].shape[:2] != shape_BS:
                raise ValueError(
                    f"the {owner}'s {name} has shape {tuple(states[name].shape)}; every state must"
                    f" be (sequences, tokens, hidden size) with {tuple(shape_BS)} first"
                )
            hidden_size = states[name].shape[-1]
            if num_relation_heads < 1 or hidden_size % num_relation_heads:
                raise ValueError(
                    f"num_relation_heads={num_relation_heads} does not divide the {owner}'s"
                    f" hidden size {hidden_size}"
                )
        for first, second in pairs:
            if states[first].shape[-1] != states[second].shape[-1]:
                raise ValueError(f"the {owner}'s {first} and {second} differ in size")
    if attention_mask is not None:
        if attention_mask.shape != shape_BS:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, the states"
                f" {tuple(shape_BS)}"
            )
        if not attention_mask.bool().any(dim=1).all():
            raise ValueError("attention_mask has a sequence without a real token")
