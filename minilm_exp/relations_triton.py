"""The relation loss and its gradient in fused GPU kernels, in the manner of flash attention.

No relation reaches the GPU's memory. A program owns a block of tokens of one relation head, loops
over the sequence's tokens in blocks, and computes the scores of its tokens with theirs on the spot.
With A the first state of a pair and X the second, p and q the teacher's and the student's
distribution of a row, c = H^-0.5, and w the weight of a row:

    KL of a row     sum_keys p (teacher score - student score) - log Z_t + log Z_s
    gradient of A   w c_s sum_keys (q - p) X
    gradient of X   w c_s sum_rows (q - p) A

A first pass over the rows gives the divergence and both log Z, online. The passes for the gradient
compute the scores again and take p and q from the stored log Z. The scores of a state with itself
are symmetric, so that one pass serves both places it has in the pair.

Scores are in units of log 2, since the GPU's own exponential and logarithm have base 2.

Shape suffixes in this file:
    N sequences   S tokens per sequence, padded   D hidden size   P pairs
    R relation heads   H relation head size, in kernels padded to a power of two
    I tokens that a program owns   J tokens of a block of its loop
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens of a block, warps of a program and depth of its pipeline, in half precision and in float32.
# Chosen for an H100 from the registers, the shared memory and the length of the loop that the
# compiler reports. NOT measured on a GPU.
_HALF = {"BLOCK_I": 64, "BLOCK_J": 64, "num_warps": 4, "num_stages": 2}
_FLOAT = {"BLOCK_I": 64, "BLOCK_J": 32, "num_warps": 8, "num_stages": 2}

# A padded key's score, in place of minus infinity: the teacher's less the student's must be 0.
_PADDING = tl.constexpr(-1e30)

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class _State(NamedTuple):
    """A state or gradient (N, S, D) as a kernel takes it."""

    pointer: Tensor
    stride_n: int
    stride_s: int
    stride_d: int


def triton_losses(
    teacher: dict[str, Tensor],
    student: dict[str, Tensor],
    pairs: list[tuple[str, str]],
    num_relation_heads: int,
    lengths: list[int],
    with_gradient: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The relation loss of each pair (P), and the gradient of their sum by student state (N, S, D).

    Where the student is in half precision, a GPU cuts q - p to tf32 for its product with a state,
    which makes the gradient some 0.04 % shorter. All else is float32.

    Args:
        teacher: States (N, S, D), with any strides; each sequence's real tokens first.
        student: The same.
        pairs: Names of first and second state.
        num_relation_heads: Number of parts of each hidden vector.
        lengths: Real tokens of each sequence, at least one, longest sequence first.
        with_gradient: False saves the work for the gradient and returns none.

    Returns:
        The losses in float64 and the gradients in float32, which are zero behind a sequence.

    Raises:
        ValueError: A state is float64.
    """
    names = sorted({name for pair in pairs for name in pair})
    dtypes = {states[name].dtype for states in (teacher, student) for name in names}
    if torch.float64 in dtypes:
        raise ValueError(
            "the triton kernels compute in float32, but a state is float64; use kernel='block'"
        )
    device = student[names[0]].device
    blocks = _FLOAT if torch.float32 in dtypes else _HALF
    grid = (len(lengths) * num_relation_heads * triton.cdiv(lengths[0], blocks["BLOCK_I"]),)
    lengths_N = torch.tensor(lengths, dtype=torch.int32, device=device)
    rows_shape = (len(lengths), num_relation_heads, lengths[0])
    kl_NRS = torch.zeros(rows_shape, device=device)
    teacher_log_sums_NRS = torch.empty(rows_shape, device=device)
    student_log_sums_NRS = torch.empty(rows_shape, device=device)
    losses_P = torch.empty(len(pairs), dtype=torch.float64, device=device)
    gradients = {
        name: torch.zeros_like(student[name], dtype=torch.float32)
        for name in names
        if with_gradient
    }
    with torch.cuda.device_of(lengths_N):
        for index, (first, second) in enumerate(pairs):
            teacher_size = teacher[first].shape[-1] // num_relation_heads
            student_size = student[first].shape[-1] // num_relation_heads
            shared = {
                "lengths": lengths_N,
                "longest": lengths[0],
                "num_heads": num_relation_heads,
                "teacher_log_sums": teacher_log_sums_NRS,
                "student_log_sums": student_log_sums_NRS,
                "TEACHER_SIZE": teacher_size,
                "STUDENT_SIZE": student_size,
                "TEACHER_H": _padded(teacher_size),
                "STUDENT_H": _padded(student_size),
                # Else the next triton computes every exponent in two instructions.
                "enable_fp_fusion": True,
                **blocks,
            }
            _divergence_kernel[grid](
                *_arguments(teacher, first, second),
                *_arguments(student, first, second),
                kl=kl_NRS,
                **shared,
            )
            kl_N = kl_NRS.sum(dim=(1, 2), dtype=torch.float64) / lengths_N
            losses_P[index] = kl_N.mean() / num_relation_heads
            if not with_gradient:
                continue
            # Of a state with itself there is one pass, for rows and keys.
            for own, other in dict.fromkeys([(first, second), (second, first)]):
                _gradient_kernel[grid](
                    *_arguments(teacher, own, other),
                    *_arguments(student, own, other),
                    *_arguments(gradients, own),
                    scale=student_size**-0.5 / (len(lengths) * num_relation_heads),
                    OWNS_ROWS=own == first,
                    OWNS_KEYS=own == second,
                    **shared,
                )
    return losses_P, gradients


def _padded(size: int) -> int:
    """A head size that the kernels' matrix products can take."""
    return max(16, triton.next_power_of_2(size))


def _arguments(states: dict[str, Tensor], *names: str) -> list[_State]:
    return [_State(states[name], *states[name].stride()) for name in names]


@triton.jit(do_not_specialize=["longest"])
def _divergence_kernel(  # type: ignore[no-untyped-def]
    teacher_first,
    teacher_second,
    student_first,
    student_second,
    kl,
    teacher_log_sums,
    student_log_sums,
    lengths,
    longest,
    num_heads,
    TEACHER_SIZE: tl.constexpr,
    STUDENT_SIZE: tl.constexpr,
    TEACHER_H: tl.constexpr,
    STUDENT_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """KL of each row, and the binary logarithms of the sums of both softmaxes, (N, R, S)."""
    sequence, head, start_I, row = _place(longest, num_heads, BLOCK_I)
    length = tl.load(lengths + sequence)
    if start_I >= length:
        return
    tokens_I = start_I + tl.arange(0, BLOCK_I)
    teacher_first_IH = _load(
        teacher_first, sequence, head, tokens_I, length, TEACHER_SIZE, TEACHER_H
    )
    student_first_IH = _load(
        student_first, sequence, head, tokens_I, length, STUDENT_SIZE, STUDENT_H
    )
    teacher_highest_I = tl.full((BLOCK_I,), float("-inf"), tl.float32)
    student_highest_I = tl.full((BLOCK_I,), float("-inf"), tl.float32)
    teacher_Z_I = tl.zeros((BLOCK_I,), tl.float32)
    student_Z_I = tl.zeros((BLOCK_I,), tl.float32)
    expected_I = tl.zeros((BLOCK_I,), tl.float32)
    for start_J in range(0, length, BLOCK_J):
        tokens_J = start_J + tl.arange(0, BLOCK_J)
        teacher_second_JH = _load(
            teacher_second, sequence, head, tokens_J, length, TEACHER_SIZE, TEACHER_H
        )
        student_second_JH = _load(
            student_second, sequence, head, tokens_J, length, STUDENT_SIZE, STUDENT_H
        )
        padding_1J = tl.where(tokens_J < length, 0.0, _PADDING)[None, :]
        teacher_IJ = _scores(teacher_first_IH, teacher_second_JH, TEACHER_SIZE) + padding_1J
        student_IJ = _scores(student_first_IH, student_second_JH, STUDENT_SIZE) + padding_1J
        teacher_new_I = tl.maximum(teacher_highest_I, tl.max(teacher_IJ, 1))
        student_new_I = tl.maximum(student_highest_I, tl.max(student_IJ, 1))
        teacher_exp_IJ = tl.exp2(teacher_IJ - teacher_new_I[:, None])
        student_exp_IJ = tl.exp2(student_IJ - student_new_I[:, None])
        teacher_shrink_I = tl.exp2(teacher_highest_I - teacher_new_I)
        student_shrink_I = tl.exp2(student_highest_I - student_new_I)
        teacher_Z_I = teacher_Z_I * teacher_shrink_I + tl.sum(teacher_exp_IJ, 1)
        student_Z_I = student_Z_I * student_shrink_I + tl.sum(student_exp_IJ, 1)
        expected_I = expected_I * teacher_shrink_I + tl.sum(
            teacher_exp_IJ * (teacher_IJ - student_IJ), 1
        )
        teacher_highest_I = teacher_new_I
        student_highest_I = student_new_I
    teacher_log_sum_I = teacher_highest_I + tl.log2(teacher_Z_I)
    student_log_sum_I = student_highest_I + tl.log2(student_Z_I)
    kl_I = (expected_I / teacher_Z_I - teacher_log_sum_I + student_log_sum_I) * _LN_2
    is_token_I = tokens_I < length
    tl.store(kl + row + tokens_I, kl_I, mask=is_token_I)
    tl.store(teacher_log_sums + row + tokens_I, teacher_log_sum_I, mask=is_token_I)
    tl.store(student_log_sums + row + tokens_I, student_log_sum_I, mask=is_token_I)


@triton.jit(do_not_specialize=["longest"])
def _gradient_kernel(  # type: ignore[no-untyped-def]
    teacher_own,
    teacher_other,
    student_own,
    student_other,
    gradient,
    scale,
    teacher_log_sums,
    student_log_sums,
    lengths,
    longest,
    num_heads,
    TEACHER_SIZE: tl.constexpr,
    STUDENT_SIZE: tl.constexpr,
    TEACHER_H: tl.constexpr,
    STUDENT_H: tl.constexpr,
    OWNS_ROWS: tl.constexpr,
    OWNS_KEYS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Adds the gradient of a program's own state; both flags are set where it is also the other."""
    sequence, head, start_I, row = _place(longest, num_heads, BLOCK_I)
    length = tl.load(lengths + sequence)
    if start_I >= length:
        return
    tokens_I = start_I + tl.arange(0, BLOCK_I)
    is_token_I = tokens_I < length
    teacher_own_IH = _load(teacher_own, sequence, head, tokens_I, length, TEACHER_SIZE, TEACHER_H)
    student_own_IH = _load(student_own, sequence, head, tokens_I, length, STUDENT_SIZE, STUDENT_H)
    if OWNS_ROWS:
        teacher_log_sum_I = _load_rows(teacher_log_sums, row, tokens_I, length)
        student_log_sum_I = _load_rows(student_log_sums, row, tokens_I, length)
    gradient_IH = tl.zeros((BLOCK_I, STUDENT_H), tl.float32)
    for start_J in range(0, length, BLOCK_J):
        tokens_J = start_J + tl.arange(0, BLOCK_J)
        teacher_other_JH = _load(
            teacher_other, sequence, head, tokens_J, length, TEACHER_SIZE, TEACHER_H
        )
        student_other_JH = _load(
            student_other, sequence, head, tokens_J, length, STUDENT_SIZE, STUDENT_H
        )
        teacher_IJ = _scores(teacher_own_IH, teacher_other_JH, TEACHER_SIZE)
        student_IJ = _scores(student_own_IH, student_other_JH, STUDENT_SIZE)
        if OWNS_ROWS:
            excess_IJ = _excess(
                teacher_IJ, student_IJ, teacher_log_sum_I[:, None], student_log_sum_I[:, None]
            )
            # The other state is zero at a padded key, but its q and p may be infinite.
            excess_IJ = tl.where((tokens_J < length)[None, :], excess_IJ, 0.0)
        if OWNS_KEYS:
            teacher_log_sum_J = _load_rows(teacher_log_sums, row, tokens_J, length)
            student_log_sum_J = _load_rows(student_log_sums, row, tokens_J, length)
            of_keys_IJ = _excess(
                teacher_IJ, student_IJ, teacher_log_sum_J[None, :], student_log_sum_J[None, :]
            )
            excess_IJ = excess_IJ + of_keys_IJ if OWNS_ROWS else of_keys_IJ
        gradient_IH = tl.dot(
            excess_IJ,
            student_other_JH.to(tl.float32),
            gradient_IH,
            input_precision="ieee" if student_other_JH.dtype == tl.float32 else "tf32",
        )
    columns_H = tl.arange(0, STUDENT_H)
    pointers_IH = _pointers(gradient, sequence, head, tokens_I, columns_H, STUDENT_SIZE)
    is_inside_IH = is_token_I[:, None] & (columns_H < STUDENT_SIZE)[None, :]
    gradient_IH = gradient_IH * (scale / length)
    before_IH = tl.load(pointers_IH, is_inside_IH)
    tl.store(pointers_IH, before_IH + gradient_IH, is_inside_IH)


@triton.jit
def _place(longest, num_heads, BLOCK_I: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's sequence, relation head, first token, and its row's start in an (N, R, S)."""
    num_blocks = tl.cdiv(longest, BLOCK_I)
    index = tl.program_id(0)
    sequence_head = (index // num_blocks).to(tl.int64)
    start = index % num_blocks * BLOCK_I
    return sequence_head // num_heads, sequence_head % num_heads, start, sequence_head * longest


@triton.jit
def _pointers(state, sequence, head, tokens, columns_H, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a relation head of some tokens lies; in 64 bits, since states may be that large."""
    start = state.pointer + sequence * state.stride_n
    columns = head * SIZE + columns_H
    return start + (
        tokens.to(tl.int64)[:, None] * state.stride_s + columns[None, :] * state.stride_d
    )


@triton.jit
def _load(state, sequence, head, tokens, length, SIZE: tl.constexpr, H: tl.constexpr):  # type: ignore[no-untyped-def]
    """A relation head of some tokens; zero behind the sequence and behind the head."""
    columns_H = tl.arange(0, H)
    return tl.load(
        _pointers(state, sequence, head, tokens, columns_H, SIZE),
        mask=(tokens < length)[:, None] & (columns_H < SIZE)[None, :],
        other=0.0,
    )


@triton.jit
def _scores(own_IH, other_JH, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    # The interpreter would multiply the bits of bfloat16 numbers as integers.
    if _IS_INTERPRETED or own_IH.dtype != other_JH.dtype:
        own_IH = own_IH.to(tl.float32)
        other_JH = other_JH.to(tl.float32)
    product_IJ = tl.dot(own_IH, tl.trans(other_JH), input_precision="ieee")
    return product_IJ * (_LOG2_E * SIZE**-0.5)


@triton.jit
def _load_rows(log_sums, row, tokens, length):  # type: ignore[no-untyped-def]
    """Logarithms of some rows' sums; infinite, for distributions of zeros, behind the sequence."""
    return tl.load(log_sums + row + tokens, mask=tokens < length, other=float("inf"))


@triton.jit
def _excess(teacher, student, teacher_log_sum, student_log_sum):  # type: ignore[no-untyped-def]
    """What the student gives a key more than the teacher does, q - p."""
    return tl.exp2(student - student_log_sum) - tl.exp2(teacher - teacher_log_sum)
