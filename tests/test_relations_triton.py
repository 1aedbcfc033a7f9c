"""The fused kernels: in triton's interpreter against slower forms, and compiled for a real GPU.

The interpreter must be chosen before triton is imported, so it has a process of its own here. It
multiplies exactly where a GPU rounds to tf32.
"""

import importlib.util
import multiprocessing
import os
import pickle
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch
from reference import relation_loss_reference
from test_relations import ALL_NINE, MASKS, assert_near, make_states, value_and_gradient

from minilm_exp.relations import STATES, relation_loss
from minilm_exp.relations_block import block_losses

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

A_FEW = [("query", "query"), ("query", "key"), ("value", "query")]
QK = [("query", "key")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def run_pickled(call):
    function, arguments = pickle.loads(call)
    return pickle.dumps(function(*arguments))


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function in a process where triton interprets its kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()  # starts the process while the variable is set

    # Bytes, since torch would hand tensors over in shared memory.
    def call(function, *arguments):
        return pickle.loads(pool.submit(run_pickled, pickle.dumps((function, arguments))).result())

    with pool:
        yield call


def triton_losses(*arguments):
    from minilm_exp.relations_triton import triton_losses

    return triton_losses(*arguments)


def is_token(lengths):
    return (torch.arange(lengths[0]) < torch.tensor(lengths)[:, None])[..., None]


def padded_with(content, states, lengths):
    return {name: state.masked_fill(~is_token(lengths), content) for name, state in states.items()}


def assert_equals_float64_blocks(
    interpreted, teacher, student, pairs, heads, lengths, tolerance=3e-6
):
    """Compares with block_losses in float64, gradients relative to their largest element."""
    losses, gradients = interpreted(triton_losses, teacher, student, pairs, heads, lengths, True)
    exact = [
        padded_with(0, {name: state.double() for name, state in states.items()}, lengths)
        for states in (teacher, student)
    ]
    expected, expected_gradients = block_losses(*exact, pairs, heads, lengths, True)
    assert losses.shape == (len(pairs),)
    assert expected.min() > 1e-2
    assert_near(losses, expected, atol=0, rtol=3e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient.masked_fill(is_token(lengths), 0) == 0).all()
        expected_gradient = expected_gradients[name] * is_token(lengths)
        largest = expected_gradient.abs().max().item()
        assert_near(gradient, expected_gradient, atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("teacher_size, student_size, heads", [(8, 12, 2), (48, 30, 3), (33, 7, 1)])
def test_equals_the_loop_form(interpreted, teacher_size, student_size, heads, mask):
    """The kernels sharing a misreading with the blocks, or mixing up rearranged tokens."""
    teacher, student = make_states(0, teacher_size), make_states(1, student_size)
    arguments = (teacher, student, A_FEW, heads, mask)
    expected, expected_gradient = value_and_gradient(relation_loss_reference, *arguments)
    actual, gradient = interpreted(
        value_and_gradient, partial(relation_loss, kernel="triton"), *arguments
    )
    assert_near(actual, expected)
    assert gradient.keys() == expected_gradient.keys()
    for name, expected_grad in expected_gradient.items():
        assert expected_grad.abs().max() > 1e-2
        assert_near(gradient[name], expected_grad)


def test_all_pairs_over_several_blocks_of_ragged_sequences(interpreted):
    """Sums that start again with each block, a state's second pair overwriting its first, padding.

    What stands behind a sequence is NaN, so that reading it would show.
    """
    lengths = [141, 64, 1]
    teacher = padded_with(torch.nan, make_states(2, 20, (3, 141)), lengths)
    student = padded_with(torch.nan, make_states(3, 24, (3, 141)), lengths)
    assert_equals_float64_blocks(interpreted, teacher, student, ALL_NINE, 2, lengths)


@pytest.mark.parametrize("size", [8, 10, 12, 16, 24, 32, 64, 96, 128])
def test_every_head_size(interpreted, size):
    """A head that reaches into its neighbour, or a scale by the padded size."""
    teacher, student = make_states(4, 2 * size, (1, 9)), make_states(5, 24, (1, 9))
    for states in [(teacher, student), (student, teacher)]:
        assert_equals_float64_blocks(interpreted, *states, QK, 2, [9])


@pytest.mark.parametrize("scale", [1.2, 30.0], ids=["ordinary", "saturated"])
@pytest.mark.parametrize(
    "teacher_dtype, student_dtype",
    [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP16), (FP32, FP32)],
)
def test_every_precision_and_large_scores(interpreted, teacher_dtype, student_dtype, scale):
    """Products rounded to half precision, or an exponential that overflows in a later block."""
    lengths = [97, 5]
    teacher = make_states(6, 16, (2, 97), scale, teacher_dtype)
    student = make_states(7, 12, (2, 97), scale, student_dtype)
    tolerance = 3e-6 if scale < 2 else 1e-4
    assert_equals_float64_blocks(interpreted, teacher, student, A_FEW[:2], 1, lengths, tolerance)


def test_scores_far_below_zero(interpreted):
    """A padded key's score of 0 beating all real ones: infinite weights, times its zeros."""
    states = [make_states(seed, 8, (1, 5)) for seed in (20, 21)]
    states = [{"query": 9 + state["query"], "key": state["key"] - 9} for state in states]
    assert_equals_float64_blocks(interpreted, *states, [*QK, ("key", "query")], 1, [5], 1e-4)


def test_mixed_precision_within_a_model(interpreted):
    """A crash in the product of a query and a key that differ in data type."""
    teacher = make_states(8, 16, (1, 5))
    student = {**make_states(9, 16, (1, 5)), "key": make_states(10, 16, (1, 5), dtype=BF16)["key"]}
    assert_equals_float64_blocks(interpreted, teacher, student, QK, 2, [5])


def test_any_strides(interpreted):
    """States taken for contiguous: views of a fused projection, or tokens first."""
    teacher, student = make_states(11, 16, (2, 5)), make_states(12, 12, (2, 5))
    fused = torch.cat(list(student.values()), dim=-1)
    student = dict(zip(STATES, fused.chunk(3, dim=-1)))
    teacher = {
        name: state.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        for name, state in teacher.items()
    }
    assert teacher["key"].stride() == (1, 2, 10) and student["key"].stride() == (180, 36, 1)
    assert_equals_float64_blocks(interpreted, teacher, student, A_FEW, 2, [5, 3])


def test_zero_at_equality(interpreted):
    """Two sides that round differently."""
    states = make_states(13, 24, (2, 70), dtype=BF16)
    losses, gradients = interpreted(triton_losses, states, states, A_FEW, 2, [70, 70], True)
    assert (losses == 0).all()
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_no_gradient_where_none_is_asked_for(interpreted):
    """An evaluation that pays for a gradient, or has another value for want of one."""
    arguments = (make_states(14, 8), make_states(15, 8), A_FEW, 2, [5, 5, 5])
    losses, gradients = interpreted(triton_losses, *arguments, False)
    assert gradients == {}
    assert torch.equal(losses, interpreted(triton_losses, *arguments, True)[0])


def test_float64_is_refused():
    """Float64 states cut to float32 in silence."""
    states = make_states(16, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="use kernel='block'"):
        triton_losses(states, states, QK, 2, [5, 5, 5], True)


class AbsentH100:
    """The driver of a GPU that is not here. No real device has its number."""

    def get_current_device(self):
        return -1

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Gives the kernels that triton_losses would launch on an H100."""
    import triton
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        pytest.skip("triton interprets its kernels here")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentH100())
    kernels = {}
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        kernels[kernel.hash] = kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)

    def kernels_of(*arguments):
        triton_losses(*arguments, True)
        return list(kernels.values())

    return kernels_of


def stack_bytes(kernel, folder):
    """What a thread keeps in memory for want of registers."""
    import triton

    (folder / "cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", folder / "cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.mark.parametrize(
    "teacher_dtype, student_dtype, teacher_size, student_size, heads",
    [
        pytest.param(BF16, BF16, 16, 12, 64, id="bert_large"),
        pytest.param(BF16, BF16, 64, 64, 16, id="attention_heads"),
        pytest.param(FP32, FP32, 128, 128, 8, id="wide_fp32"),
        pytest.param(BF16, FP32, 16, 12, 64, id="mixed"),
    ],
)
def test_fits_on_an_h100(
    compiled, tmp_path, teacher_dtype, student_dtype, teacher_size, student_size, heads
):
    """What only the interpreter takes; spilled registers; half precision off the tensor cores."""
    teacher = make_states(17, teacher_size * heads, (1, 512), dtype=teacher_dtype)
    student = make_states(18, student_size * heads, (1, 512), dtype=student_dtype)
    kernels = compiled(teacher, student, A_FEW[:2], heads, [512])
    names = [kernel.metadata.name for kernel in kernels]
    assert names == ["_divergence_kernel"] + 3 * ["_gradient_kernel"]
    for kernel in kernels:
        assert kernel.metadata.shared < 227 * 1024
        assert stack_bytes(kernel, tmp_path) == 0
        assert ("wgmma" in kernel.asm["ptx"]) == (teacher_dtype == BF16)
        is_half_gradient = kernel.metadata.name == "_gradient_kernel" and student_dtype == BF16
        assert ("tf32" in kernel.asm["ptx"]) == is_half_gradient


def test_compiles_for_sizes_of_one(compiled):
    """An argument of 1, which triton compiles in as a constant without a tensor's methods."""
    states = make_states(19, 1, (1, 1), dtype=BF16)
    assert len(compiled(states, states, A_FEW[:2], 1, [1])) == 4
