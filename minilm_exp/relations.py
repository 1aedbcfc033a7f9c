"""Self-attention relations and the distillation loss over them.

Source: MiniLMv2, arXiv:2012.15828, equations 5 to 8.

Shape suffixes in this file:
    B sequences   S tokens per sequence, padded   D hidden size
    R relation heads (A_r in the paper)   H relation head size, D / R
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

Pair = tuple[str, str]

STATES = ("query", "key", "value")


def relation_loss(
    teacher: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    pairs: Iterable[Pair],
    num_relation_heads: int,
    attention_mask: Tensor | None = None,
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
          Call backward outside the autocast block, as torch advises, and it is so there too.

    Args:
        teacher: The states "query", "key" and "value" that `pairs` needs, each (B, S, D_teacher).
        student: The same, each (B, S, D_student). Hidden sizes may differ from the teacher's.
        pairs: Relations as pairs of state names; ("query", "key") is the scaled dot product of
            queries with keys.
        num_relation_heads: Number of equal parts that each state vector is split into; must
            divide both hidden sizes. Need not be the number of attention heads of either model.
        attention_mask: (B, S), 1 for real tokens and 0 for padding; None where nothing is padded.

    Returns:
        A scalar. The gradient reaches `student` only.

    Raises:
        ValueError: No or unknown pairs, sizes that do not fit, or a sequence of padding only.
    """
    losses = relation_losses(teacher, student, pairs, num_relation_heads, attention_mask)
    return torch.stack(list(losses.values())).sum()


def relation_losses(
    teacher: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    pairs: Iterable[Pair],
    num_relation_heads: int,
    attention_mask: Tensor | None = None,
) -> dict[Pair, Tensor]:
    """The terms of `relation_loss`, one scalar for each pair."""
    pairs = [(first, second) for first, second in pairs]
    _check(teacher, student, pairs, num_relation_heads, attention_mask)
    is_token_BS = None if attention_mask is None else attention_mask.bool()
    names = sorted({name for pair in pairs for name in pair})
    device_type = student[names[0]].device.type
    with torch.autocast(device_type, enabled=False):
        teacher_heads = {
            name: _split_heads(teacher[name].detach(), num_relation_heads, is_token_BS)
            for name in names
        }
        student_heads = {
            name: _split_heads(student[name], num_relation_heads, is_token_BS) for name in names
        }
        return {
            (first, second): _relation_kl(
                _relation_logits(teacher_heads[first], teacher_heads[second]),
                _relation_logits(student_heads[first], student_heads[second]),
                is_token_BS,
            )
            for first, second in pairs
        }


def _split_heads(state_BSD: Tensor, num_relation_heads: int, is_token_BS: Tensor | None) -> Tensor:
    state_BSD = state_BSD if state_BSD.dtype == torch.float64 else state_BSD.float()
    if is_token_BS is not None:
        # A padded state that is not finite would reach the others as 0 * inf.
        state_BSD = state_BSD.masked_fill(~is_token_BS[..., None], 0.0)
    num_sequences, num_tokens, hidden_size = state_BSD.shape
    head_size = hidden_size // num_relation_heads
    return state_BSD.view(num_sequences, num_tokens, num_relation_heads, head_size).transpose(1, 2)


def _relation_logits(first_BRSH: Tensor, second_BRSH: Tensor) -> Tensor:
    return first_BRSH @ second_BRSH.transpose(-1, -2) * first_BRSH.shape[-1] ** -0.5


def _relation_kl(
    teacher_logits_BRSS: Tensor, student_logits_BRSS: Tensor, is_token_BS: Tensor | None
) -> Tensor:
    if is_token_BS is not None:
        # The lowest finite number, because 0 * log(0) would be NaN with minus infinity.
        lowest = torch.finfo(student_logits_BRSS.dtype).min
        is_padded_key = ~is_token_BS[:, None, None, :]
        teacher_logits_BRSS = teacher_logits_BRSS.masked_fill(is_padded_key, lowest)
        student_logits_BRSS = student_logits_BRSS.masked_fill(is_padded_key, lowest)
    kl_BRS = functional.kl_div(
        functional.log_softmax(student_logits_BRSS, dim=-1),
        functional.log_softmax(teacher_logits_BRSS, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(dim=-1)
    kl_BS = kl_BRS.mean(dim=1)
    if is_token_BS is None:
        return kl_BS.mean()
    return (kl_BS.masked_fill(~is_token_BS, 0.0).sum(dim=1) / is_token_BS.sum(dim=1)).mean()


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
