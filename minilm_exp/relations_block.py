"""The relation loss and its gradient, computed together in blocks with PyTorch.

A block of teacher scores and one of student scores, of bounded size, give their share of the loss
and of the gradient and are overwritten by the next. With A a block of rows of the first
state and X the second, E = exp(scores), Z its row sums, c = H^-0.5 and w the weight of a row, all
that is needed are products of E with narrow matrices:

    expected teacher score  c_t A_t . (E_t X_t) / Z_t
    expected student score  c_s A_s . (E_t X_s) / Z_t
    KL(teacher || student)  their difference - log Z_t + log Z_s
    gradient of A_s         w c_s (E_s X_s / Z_s - E_t X_s / Z_t)
    gradient of X_s         w c_s (E_s' A_s / Z_s - E_t' A_s / Z_t)

which is the gradient of a softmax cross-entropy, w (q - p), multiplied out; so the gradient's
rounding is that of q X and p X, not of their difference. Memory beside the states and their
gradients: two blocks of scores and the narrow products, whatever heads x S^2 is.

Shape suffixes in this file:
    N sequences   S tokens per sequence, padded   D hidden size   P pairs
    R relation heads   H relation head size   G sequences x relation heads that are computed at once
    I rows of a block   C teacher's H and student's H
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Scores in a block. A processor's block stays in its cores' caches; a GPU's fills the GPU.
_SCORES_PER_THREAD = 2**19
_SCORES_ON_GPU = 2**26

# Scores up to here, either sign, need no subtraction of the row's highest: neither their exp, nor
# its sum over a row, nor a row's weight divided by that sum leaves the range of float32.
_SAFE_SCORE = 60.0

_Chunk = tuple[slice, slice, slice]


class _Scratch:
    """Buffers that every block uses again: fresh memory costs more than the arithmetic on it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """The buffer of that name, of that shape, with anything in it."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            with torch.inference_mode(False):  # or training could not use it later
                buffer = self._buffers[name] = torch.empty(
                    size, dtype=self._dtype, device=self._device
                )
        return buffer[:size].view(shape)


# A processor's are kept from step to step, a few MB for each thread that trains; a GPU's are large,
# and its allocator keeps them anyway.
_kept = threading.local()


def _scratch(dtype: torch.dtype, device: torch.device) -> _Scratch:
    if device.type != "cpu":
        return _Scratch(dtype, device)
    kept: _Scratch = vars(_kept).setdefault(str(dtype), _Scratch(dtype, device))
    return kept


def block_losses(
    teacher: dict[str, Tensor],
    student: dict[str, Tensor],
    pairs: list[tuple[str, str]],
    num_relation_heads: int,
    lengths: list[int],
    with_gradient: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The relation loss of each pair (P), and the gradient of their sum by student state (N, S, D).

    Args:
        teacher: States (N, S, D); each sequence's real tokens first, zeros behind them.
        student: The same.
        pairs: Names of first and second state.
        num_relation_heads: Number of parts of each hidden vector.
        lengths: Real tokens of each sequence, at least one, longest sequence first.
        with_gradient: False saves the work for the gradient and returns none. What it holds behind
            a sequence's real tokens is anything.
    """
    names = sorted({name for pair in pairs for name in pair})
    some_NSD = student[names[0]]
    device = some_NSD.device
    dtype = torch.promote_types(
        torch.promote_types(teacher[names[0]].dtype, some_NSD.dtype), torch.float32
    )
    losses_P = torch.zeros(len(pairs), dtype=torch.float64, device=device)
    gradients = {
        name: torch.empty_like(student[name], dtype=dtype) for name in names if with_gradient
    }
    are_safe = _are_safe(teacher, student, pairs, num_relation_heads)
    num_scores = min(
        _SCORES_ON_GPU if some_NSD.is_cuda else _SCORES_PER_THREAD * torch.get_num_threads(),
        len(lengths) * num_relation_heads * lengths[0] ** 2,
    )
    scratch = _scratch(dtype, device)
    for sequences, heads, num_rows in _chunks(lengths, num_relation_heads, num_scores):
        longest = lengths[sequences.start]
        chunk = (sequences, slice(longest), heads)
        lengths_N1 = torch.tensor(lengths[sequences], device=device)[:, None]
        is_token_NS = (torch.arange(longest, device=device) < lengths_N1).to(dtype)
        weight_NS = is_token_NS / (len(lengths) * num_relation_heads * lengths_N1)
        num_heads = heads.stop - heads.start
        weight_G1S = weight_NS.repeat_interleave(num_heads, dim=0)[:, None]
        is_ragged = lengths[sequences.stop - 1] < longest
        is_token_G1S = (
            is_token_NS.repeat_interleave(num_heads, dim=0)[:, None] if is_ragged else None
        )
        both_GCS = {
            name: _read(teacher[name], student[name], chunk, num_relation_heads, scratch, name)
            for name in names
        }
        teacher_sizes = {name: teacher[name].shape[-1] // num_relation_heads for name in names}
        gradient_GHS = {
            name: scratch(
                f"gradient {name}", *both_GCS[name][:, teacher_sizes[name] :].shape
            ).zero_()
            for name in gradients
        }
        for index, (first, second) in enumerate(pairs):
            for start in range(0, longest, num_rows):
                rows = slice(start, start + num_rows)
                losses_P[index] += _add_block(
                    both_GCS[first][..., rows],
                    both_GCS[second],
                    teacher_sizes[first],
                    weight_G1S[..., rows],
                    is_token_G1S,
                    are_safe[index],
                    first == second and num_rows >= longest,
                    scratch,
                    (gradient_GHS[first][..., rows], gradient_GHS[second]) if gradients else None,
                )
        for name in gradients:
            part_NSRH = gradients[name].unflatten(-1, (num_relation_heads, -1))[chunk]
            part_NRHS = gradient_GHS[name].unflatten(0, (part_NSRH.shape[0], -1))
            part_NSRH.copy_(part_NRHS.permute(0, 3, 1, 2))
    return losses_P, gradients


def _add_block(
    first_GCI: Tensor,
    second_GCS: Tensor,
    teacher_size: int,
    weight_G1I: Tensor,
    is_token_G1S: Tensor | None,
    is_safe: bool,
    is_symmetric: bool,
    scratch: _Scratch,
    gradients: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The loss of a block of rows; adds its gradient to those of the first and second state."""
    student_size = first_GCI.shape[1] - teacher_size
    teacher_scale, student_scale = teacher_size**-0.5, student_size**-0.5
    teacher_first_GHI, student_first_GHI = first_GCI.tensor_split([teacher_size], dim=1)
    teacher_second_GHS, student_second_GHS = second_GCS.tensor_split([teacher_size], dim=1)
    teacher_exp_GIS, teacher_shift, teacher_Z_G1I = _exp_scores(
        teacher_first_GHI, teacher_second_GHS, is_token_G1S, is_safe, scratch, "teacher"
    )
    student_exp_GIS, student_shift, student_Z_G1I = _exp_scores(
        student_first_GHI, student_second_GHS, is_token_G1S, is_safe, scratch, "student"
    )

    def sums(owner: str, columns_GCS: Tensor, exp_GIS: Tensor) -> Tensor:
        """Transposed E X; the untransposed product, where it is the same, is faster."""
        right = exp_GIS if is_symmetric and is_safe else exp_GIS.transpose(1, 2)
        out = scratch(f"{owner} sums", *columns_GCS.shape[:2], right.shape[2])
        return torch.bmm(columns_GCS, right, out=out)

    # E_t X_t, E_t X_s and E_s X_s.
    teacher_teacher_GHI, teacher_student_GHI = sums(
        "teacher", second_GCS, teacher_exp_GIS
    ).tensor_split([teacher_size], dim=1)
    student_student_GHI = sums("student", student_second_GHS, student_exp_GIS)
    expected_G1I = teacher_scale * (teacher_first_GHI * teacher_teacher_GHI).sum(1, keepdim=True)
    expected_G1I -= student_scale * (student_first_GHI * teacher_student_GHI).sum(1, keepdim=True)
    kl_G1I = expected_G1I / teacher_Z_G1I + (student_Z_G1I / teacher_Z_G1I).log()
    kl_G1I += student_shift - teacher_shift
    if gradients is not None:
        first_GHI, second_GHS = gradients
        by_student_G1I = weight_G1I * student_scale / student_Z_G1I
        by_teacher_G1I = weight_G1I * student_scale / teacher_Z_G1I
        first_GHI.addcmul_(student_student_GHI, by_student_G1I)
        first_GHI.addcmul_(teacher_student_GHI, by_teacher_G1I, value=-1)
        second_GHS.baddbmm_(student_first_GHI * by_student_G1I, student_exp_GIS)
        second_GHS.baddbmm_(student_first_GHI * by_teacher_G1I, teacher_exp_GIS, alpha=-1)
    return (kl_G1I * weight_G1I).sum()


def _exp_scores(
    first_GHI: Tensor,
    second_GHS: Tensor,
    is_token_G1S: Tensor | None,
    is_safe: bool,
    scratch: _Scratch,
    owner: str,
) -> tuple[Tensor, Tensor | float, Tensor]:
    """E = exp(scores - shift), the shift (zero, or the row's highest score) and the row sums Z.

    Z is no product with ones: there, one score that outweighs the rest would swallow it.
    """
    num_groups, head_size, num_rows = first_GHI.shape
    scores_GIS = scratch(f"{owner} scores", num_groups, num_rows, second_GHS.shape[-1])
    scores_GIS.baddbmm_(first_GHI.transpose(1, 2), second_GHS, beta=0, alpha=head_size**-0.5)
    shift: Tensor | float = 0.0
    if not is_safe:
        if is_token_G1S is not None:
            scores_GIS.masked_fill_(is_token_G1S == 0, torch.finfo(scores_GIS.dtype).min)
        highest_GI1 = scores_GIS.amax(dim=-1, keepdim=True)
        scores_GIS.sub_(highest_GI1)
        shift = highest_GI1.transpose(1, 2)
    exp_GIS = scores_GIS.exp_()
    if is_token_G1S is not None:
        exp_GIS.mul_(is_token_G1S)
    return exp_GIS, shift, exp_GIS.sum(dim=-1)[:, None]


def _are_safe(
    teacher: dict[str, Tensor],
    student: dict[str, Tensor],
    pairs: list[tuple[str, str]],
    num_heads: int,
) -> list[bool]:
    """Whether no score of a pair can be large, by the Cauchy-Schwarz inequality."""
    names = sorted({name for pair in pairs for name in pair})
    norms_2 = torch.stack(
        [
            torch.stack([_largest_norm(states[name], num_heads) for name in names])
            for states in (teacher, student)
        ]
    ).tolist()
    return [
        all(
            norms[names.index(first)]
            * norms[names.index(second)]
            * (states[first].shape[-1] // num_heads) ** -0.5
            <= _SAFE_SCORE
            for norms, states in zip(norms_2, (teacher, student))
        )
        for first, second in pairs
    ]


def _largest_norm(state_NSD: Tensor, num_heads: int) -> Tensor:
    heads = state_NSD.unflatten(-1, (num_heads, -1))
    dtype = torch.promote_types(heads.dtype, torch.float32)
    return torch.linalg.vector_norm(heads, dim=-1, dtype=dtype).max().float()


def _chunks(
    lengths: list[int], num_heads: int, num_scores: int
) -> Iterator[tuple[slice, slice, int]]:
    """Sequences, relation heads and number of rows that are computed at once."""
    start = 0
    while start < len(lengths):
        longest = lengths[start]
        stop = min(len(lengths), start + max(1, num_scores // (num_heads * longest**2)))
        heads_at_once = max(1, num_scores // longest**2)
        num_rows = max(1, num_scores // longest)
        for head in range(0, num_heads, heads_at_once):
            yield slice(start, stop), slice(head, min(head + heads_at_once, num_heads)), num_rows
        start = stop


def _read(
    teacher_NSD: Tensor,
    student_NSD: Tensor,
    chunk: _Chunk,
    num_heads: int,
    scratch: _Scratch,
    name: str,
) -> Tensor:
    """A chunk of a state of both models, (G, C, S), so that one product serves both."""
    parts = [
        state.unflatten(-1, (num_heads, -1))[chunk].permute(0, 2, 3, 1)
        for state in (teacher_NSD, student_NSD)
    ]
    num_sequences, num_heads_here, teacher_size, num_tokens = parts[0].shape
    num_columns = teacher_size + parts[1].shape[2]
    both_NRCS = scratch(f"both {name}", num_sequences, num_heads_here, num_columns, num_tokens)
    both_NRCS[:, :, :teacher_size] = parts[0]
    both_NRCS[:, :, teacher_size:] = parts[1]
    return both_NRCS.flatten(0, 1)
