"""The relation loss against the loop form, by hand, and on input that must not matter."""

import importlib.util
import math
import threading

import pytest
import torch
from reference import relation_loss_reference
from torch.utils._python_dispatch import TorchDispatchMode

from minilm_exp import relations, relations_block
from minilm_exp.errors import ExperimentError
from minilm_exp.relations import STATES, relation_loss, relation_losses

QQ_KK_VV = [("query", "query"), ("key", "key"), ("value", "value")]
QK_VV = [("query", "key"), ("value", "value")]
ALL_NINE = [(first, second) for first in STATES for second in STATES]

RIGHT_PADDED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
MASKS = {
    "no_mask": None,
    "right": RIGHT_PADDED,
    "left": RIGHT_PADDED.flip(1),
}


def make_states(seed, hidden_size, shape=(3, 5), scale=1.2, dtype=torch.float32):
    """States large enough for relations that are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (scale * torch.randn(*shape, hidden_size, generator=generator)).to(dtype)
        for name in STATES
    }


def trainable(states):
    return {name: state.detach().clone().requires_grad_() for name, state in states.items()}


def value_and_gradient(loss_function, teacher, student, pairs, heads, mask, autocast=False):
    student = trainable(student)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_function(teacher, student, pairs, heads, mask)
    loss.backward()  # outside autocast, as PyTorch asks
    gradient = {name: state.grad for name, state in student.items() if state.grad is not None}
    return loss.detach(), gradient


def assert_near(actual, expected, atol=1e-6, rtol=1e-6):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, check_dtype=False)


@pytest.mark.parametrize("pairs", [QQ_KK_VV, QK_VV, ALL_NINE], ids=["qq_kk_vv", "qk_vv", "all"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize(
    "teacher_size, student_size, heads", [(8, 8, 2), (12, 6, 3), (4, 16, 4), (6, 10, 1)]
)
def test_equals_the_loop_form(teacher_size, student_size, heads, mask, pairs):
    """Averaging over the tokens of the batch, or scaling one side by the other's head size."""
    teacher, student = make_states(0, teacher_size), make_states(1, student_size)
    arguments = (teacher, student, pairs, heads, mask)
    expected, expected_gradient = value_and_gradient(relation_loss_reference, *arguments)
    actual, gradient = value_and_gradient(relation_loss, *arguments)
    assert expected > 0.1
    assert_near(actual, expected)
    assert gradient.keys() == expected_gradient.keys()
    for name, expected_grad in expected_gradient.items():
        assert expected_grad.abs().max() > 1e-2
        assert_near(gradient[name], expected_grad)


def test_two_tokens_by_hand():
    """Loop form and module sharing one misreading: scale, direction, mean over heads and tokens.

    Two relation heads; the second is zero on both sides. In the first the token 0 is zero, so that
    its row is uniform on both sides, and token 1 scores 0 and log 3 (teacher), 0 and log 2
    (student).
    """
    teacher, student = torch.zeros(1, 2, 8), torch.zeros(1, 2, 4)
    teacher[0, 1, :4] = math.sqrt(math.log(3) / 2)  # 4 a^2 / sqrt(4) = log 3
    student[0, 1, :2] = math.sqrt(math.log(2) / math.sqrt(2))  # 2 b^2 / sqrt(2) = log 2
    divergence = 1 / 4 * math.log((1 / 4) / (1 / 3)) + 3 / 4 * math.log((3 / 4) / (2 / 3))
    for loss_function in (relation_loss, relation_loss_reference):
        loss = loss_function({"key": teacher}, {"key": student}, [("key", "key")], 2)
        assert loss.item() == pytest.approx(divergence / (2 * 2), abs=1e-7)


@pytest.mark.parametrize("mask", [RIGHT_PADDED, None], ids=["padded", "no_mask"])
def test_terms_are_the_losses_of_the_single_pairs_and_sum_to_the_loss(mask):
    """Terms filed under the wrong pair, or a loss that is their mean."""
    teacher, student = make_states(2, 8), make_states(3, 8)
    total, terms = relation_losses(teacher, student, iter(ALL_NINE), 2, mask)
    assert terms.shape == (9,) and not terms.requires_grad
    assert_near(total, terms.sum())
    for pair, term in zip(ALL_NINE, terms):
        assert_near(term, relation_loss_reference(teacher, student, [pair], 2, mask))
    assert_near(relation_loss(teacher, student, iter(ALL_NINE), 2, mask), total)


def test_order_within_a_pair_matters():
    """Relations transposed: keys as queries."""
    teacher, student = make_states(4, 8), make_states(5, 8)
    pairs = [("query", "key"), ("key", "query")]
    _, terms = relation_losses(teacher, student, pairs, 2)
    assert abs(terms[0] - terms[1]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_more", [0, 1, 7])
@pytest.mark.parametrize("content", [0.0, 1e4, -1e30, math.inf, math.nan])
def test_padding_does_not_matter(content, num_more, side):
    """Padded keys in a softmax, padded rows in the mean, or 0 * inf in the backward pass."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    mask = mask.flip(1) if side == "left" else mask
    teacher, student = make_states(6, 8, (2, 4)), make_states(7, 4, (2, 4))
    expected, expected_gradient = value_and_gradient(
        relation_loss_reference, teacher, student, ALL_NINE, 2, mask
    )

    more = (num_more, 0) if side == "left" else (0, num_more)
    long_mask = torch.nn.functional.pad(mask, more)

    def pad(states):
        return {
            name: torch.nn.functional.pad(state, (0, 0, *more)).masked_fill(
                long_mask[..., None] == 0, content
            )
            for name, state in states.items()
        }

    actual, gradient = value_and_gradient(
        relation_loss, pad(teacher), pad(student), ALL_NINE, 2, long_mask
    )
    assert_near(actual, expected)
    for name, grad in gradient.items():
        assert_near(grad[long_mask == 1], expected_gradient[name][mask == 1])
        assert (grad[long_mask == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_of_any_dtype(dtype):
    """A mask inverted bitwise, right for bool and wrong for the tokenizer's integers."""
    teacher, student = make_states(8, 8), make_states(9, 8)
    expected = relation_loss(teacher, student, QQ_KK_VV, 2, RIGHT_PADDED)
    actual = relation_loss(teacher, student, QQ_KK_VV, 2, RIGHT_PADDED.to(dtype))
    assert torch.equal(actual, expected)


def test_mask_of_ones_is_no_mask():
    """The two branches that mean over tokens drifting apart."""
    teacher, student = make_states(10, 8), make_states(11, 8)
    ones = torch.ones(3, 5, dtype=torch.long)
    assert_near(
        relation_loss(teacher, student, ALL_NINE, 2, ones),
        relation_loss(teacher, student, ALL_NINE, 2, None),
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_zero_at_equality_positive_otherwise(mask):
    """Cross-entropy in place of the divergence: same gradient, but never zero."""
    teacher = make_states(12, 8)
    loss, gradient = value_and_gradient(relation_loss, teacher, teacher, ALL_NINE, 2, mask)
    assert loss == 0
    for grad in gradient.values():
        assert grad.abs().max() < 1e-6
    for seed in range(13, 18):
        _, terms = relation_losses(teacher, make_states(seed, 8), ALL_NINE, 2, mask)
        assert terms.min() > 1e-3


def test_one_real_token_gives_zero_and_a_zero_gradient():
    """NaN from a softmax over a single key."""
    mask = torch.tensor([[0, 1, 0]])
    teacher, student = make_states(18, 8, (1, 3)), make_states(19, 8, (1, 3))
    loss, gradient = value_and_gradient(relation_loss, teacher, student, ALL_NINE, 2, mask)
    assert abs(loss) < 1e-6
    assert all(grad.abs().max() < 1e-6 for grad in gradient.values())


def test_direction_is_teacher_then_student():
    """KL(student || teacher), which differs only where the two are far apart.

    KL(p || uniform) is at most log S; KL(uniform || peaked) grows without bound.
    """
    peaked = {"key": 6.0 * torch.eye(5)[None]}
    uniform = {"key": torch.zeros(1, 5, 5)}
    pairs = [("key", "key")]
    assert 0.9 * math.log(5) < relation_loss(peaked, uniform, pairs, 1) < math.log(5)
    assert relation_loss(uniform, peaked, pairs, 1) > 2 * math.log(5)


def test_teacher_gets_no_gradient():
    """A teacher that learns to be easy to imitate, when it is not frozen elsewhere."""
    teacher, student = trainable(make_states(20, 8)), trainable(make_states(21, 8))
    relation_loss(teacher, student, ALL_NINE, 2, RIGHT_PADDED).backward()
    assert all(state.grad is None for state in teacher.values())
    assert all(state.grad.abs().max() > 1e-2 for state in student.values())


@pytest.mark.parametrize("scale", [1.2, 30.0], ids=["ordinary", "saturated"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_low_precision_states_are_compared_in_float32(dtype, autocast, scale):
    """Products or softmax in bfloat16, which autocast turns on behind the loss's back."""
    teacher = make_states(22, 8, scale=scale, dtype=torch.bfloat16)
    student = make_states(23, 8, scale=scale, dtype=torch.bfloat16)
    exact = [{k: v.float() for k, v in states.items()} for states in (teacher, student)]
    expected, expected_gradient = value_and_gradient(
        relation_loss, *exact, QQ_KK_VV, 2, RIGHT_PADDED
    )
    given = [{k: v.to(dtype) for k, v in states.items()} for states in (teacher, student)]
    actual, gradient = value_and_gradient(
        relation_loss, *given, QQ_KK_VV, 2, RIGHT_PADDED, autocast=autocast
    )
    assert actual.dtype == torch.float32
    assert torch.isfinite(actual)
    assert_near(actual, expected, atol=1e-5, rtol=1e-6)
    for name, grad in gradient.items():
        assert grad.dtype == dtype
        assert torch.isfinite(grad).all()
        assert torch.equal(grad, expected_gradient[name].to(dtype))


@pytest.mark.parametrize("mask", [RIGHT_PADDED[:, :3], None], ids=["padded", "no_mask"])
def test_gradient_by_finite_differences(mask):
    """Float64 states cut to float32, or a gradient that is detached on one path."""
    teacher = make_states(24, 4, (3, 3), dtype=torch.float64)
    student = trainable(make_states(25, 6, (3, 3), dtype=torch.float64))

    def loss(*states):
        return relation_loss(teacher, dict(zip(STATES, states)), ALL_NINE, 2, mask)

    assert loss(*student.values()).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, tuple(student.values()), atol=1e-8, rtol=1e-6)


def test_strided_states_are_read_as_they_are():
    """Heads mixed up, or a crash, for states that are views of a fused projection."""
    teacher, student = make_states(26, 8), make_states(27, 8)
    expected = relation_loss(teacher, student, QQ_KK_VV, 2)
    fused = torch.cat(list(student.values()), dim=-1)
    views = dict(zip(STATES, fused.chunk(3, dim=-1)))
    assert not views["key"].is_contiguous()
    assert_near(relation_loss(teacher, views, QQ_KK_VV, 2), expected)
    turned = {name: state.mT.contiguous().mT for name, state in student.items()}
    assert_near(relation_loss(teacher, turned, QQ_KK_VV, 2), expected)


def changed(states, name, new):
    return {**states, name: new}


TEACHER, STUDENT = make_states(28, 12), make_states(29, 8)


REFUSED = {
    "no_pairs": ("pairs is empty", {"pairs": []}),
    "twice": ("names a relation twice", {"pairs": QQ_KK_VV + QQ_KK_VV[:1]}),
    "unknown": (r"names \['hidden'\]", {"pairs": [("query", "hidden")]}),
    "heads_teacher": (
        "num_relation_heads=8 does not divide the teacher's hidden size 12",
        {"num_relation_heads": 8},
    ),
    "heads_student": (
        "num_relation_heads=3 does not divide the student's hidden size 8",
        {"num_relation_heads": 3},
    ),
    "heads_none": ("num_relation_heads=0 does not divide", {"num_relation_heads": 0}),
    "heads_negative": ("num_relation_heads=-2 does not divide", {"num_relation_heads": -2}),
    "tokens_differ": (
        r"the teacher's key has shape \(3, 4, 12\)",
        {"teacher": changed(TEACHER, "key", torch.zeros(3, 4, 12))},
    ),
    "sequences_differ": (
        r"the student's value has shape \(1, 5, 8\)",
        {"student": changed(STUDENT, "value", torch.zeros(1, 5, 8))},
    ),
    "split_already": (
        r"the student's query has shape \(3, 5, 2, 4\)",
        {"student": changed(STUDENT, "query", torch.zeros(3, 5, 2, 4))},
    ),
    "keys_narrower": (
        "the teacher's query and key differ in size",
        {
            "teacher": changed(TEACHER, "key", torch.zeros(3, 5, 4)),
            "pairs": [("query", "key")],
        },
    ),
    "mask_shape": (
        r"attention_mask has shape \(3, 4\), the states \(3, 5\)",
        {"attention_mask": torch.ones(3, 4)},
    ),
    "mask_broadcasts": (
        r"attention_mask has shape \(1, 5\)",
        {"attention_mask": torch.ones(1, 5)},
    ),
    "mask_4d": (
        r"attention_mask has shape \(3, 1, 1, 5\)",
        {"attention_mask": torch.ones(3, 1, 1, 5)},
    ),
    "all_padding": (
        "a sequence without a real token",
        {"attention_mask": torch.tensor([[1] * 5, [0] * 5, [1] * 5])},
    ),
}


@pytest.mark.parametrize("message, arguments", REFUSED.values(), ids=REFUSED.keys())
def test_degenerate_input_is_refused(message, arguments):
    """A wrong setting that broadcasts, or divides by zero, into a plausible or NaN loss."""
    good = {
        "teacher": TEACHER,
        "student": STUDENT,
        "pairs": QQ_KK_VV,
        "num_relation_heads": 2,
        "attention_mask": RIGHT_PADDED,
    }
    relation_loss(**good)
    with pytest.raises(ValueError, match=message):
        relation_loss(**{**good, **arguments})


BLOCKS = {
    "everything_at_once": 10**6,
    "some_sequences": 2 * 3 * 7 * 7,
    "some_heads": 2 * 7 * 7,
    "some_rows": 3 * 7,
    "one_row": 1,
}


@pytest.mark.parametrize("num_scores", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("scale", [1.2, 6.0], ids=["ordinary", "large_scores"])
@pytest.mark.parametrize("mask", ["ragged", "holes", None])
def test_blocks_of_any_size_give_the_same(num_scores, mask, scale, monkeypatch):
    """A row, head or sequence counted twice or never where a block ends.

    Large scores take the way that subtracts each row's highest.
    """
    monkeypatch.setattr(relations_block, "_SCORES_PER_THREAD", num_scores)
    monkeypatch.setattr(relations_block.torch, "get_num_threads", lambda: 1)
    masks = {
        "ragged": torch.tensor([[1] * n + [0] * (7 - n) for n in (4, 7, 1, 7, 6)]),
        "holes": torch.tensor([[1, 0, 1, 1, 0, 0, 1], *[[0, 1, 1, 0, 1, 1, 1]] * 4]),
        None: None,
    }
    teacher = make_states(30, 15, (5, 7), scale, torch.float64)
    student = make_states(31, 6, (5, 7), scale, torch.float64)
    arguments = (teacher, student, ALL_NINE, 3, masks[mask])
    expected, expected_gradient = value_and_gradient(relation_loss_reference, *arguments)
    actual, gradient = value_and_gradient(relation_loss, *arguments)
    assert_near(actual, expected, atol=1e-10, rtol=1e-10)
    for name, expected_grad in expected_gradient.items():
        assert_near(gradient[name], expected_grad, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("sizes", [(768, 384, 48), (1024, 768, 64), (256, 128, 1)])
def test_sizes_of_the_papers_against_float64(sizes):
    """Float32 rounding that grows with the length of a row or of a head."""
    teacher_size, student_size, heads = sizes
    teacher = make_states(32, teacher_size, (2, 200), 1.0, torch.float64)
    student = make_states(33, student_size, (2, 200), 1.0, torch.float64)
    mask = torch.ones(2, 200)
    mask[0, 150:] = 0
    expected, expected_gradient = value_and_gradient(
        relation_loss, teacher, student, QQ_KK_VV, heads, mask
    )
    single = [{k: v.float() for k, v in states.items()} for states in (teacher, student)]
    actual, gradient = value_and_gradient(relation_loss, *single, QQ_KK_VV, heads, mask)
    assert_near(actual, expected)
    for name, expected_grad in expected_gradient.items():
        largest = expected_grad.abs().max()
        assert (gradient[name] - expected_grad).abs().max() < 3e-5 * largest


def test_scores_near_the_limit_of_what_needs_no_shift():
    """Scores that overflow, or a weight divided by a sum that vanishes, just below the limit."""
    teacher = make_states(34, 16, (1, 24), 1.0)
    student = make_states(35, 16, (1, 24), 1.0)
    for states in (teacher, student):
        for name, state in states.items():
            highest = (state.unflatten(-1, (2, 8)).norm(dim=-1).max() ** 2) / 8**0.5
            states[name] = state * (relations_block._SAFE_SCORE / highest * 0.999) ** 0.5
    exact = [{k: v.double() for k, v in states.items()} for states in (teacher, student)]
    expected, expected_gradient = value_and_gradient(
        relation_loss_reference, *exact, ALL_NINE, 2, None
    )
    actual, gradient = value_and_gradient(relation_loss, teacher, student, ALL_NINE, 2, None)
    assert_near(actual, expected, rtol=1e-5)
    for name, expected_grad in expected_gradient.items():
        assert (gradient[name] - expected_grad).abs().max() < 1e-5 * expected_grad.abs().max()


def test_one_call_leaves_nothing_for_the_next():
    """Buffers that are kept from step to step, read before they are written."""
    sizes = [(16, (4, 9)), (8, (2, 5)), (32, (1, 20)), (8, (3, 5))]
    for seed, (hidden_size, shape) in enumerate(sizes):
        teacher, student = make_states(seed, hidden_size, shape), make_states(9, 8, shape)
        arguments = (teacher, student, QK_VV, 4, None)
        expected, expected_gradient = value_and_gradient(relation_loss_reference, *arguments)
        actual, gradient = value_and_gradient(relation_loss, *arguments)
        assert_near(actual, expected)
        for name, expected_grad in expected_gradient.items():
            assert_near(gradient[name], expected_grad)


def test_backward_twice_with_retained_graph_gives_the_same_gradient_again():
    """A saved gradient that the first backward pass changed in place."""
    teacher, student = make_states(36, 8), trainable(make_states(37, 8))
    loss = relation_loss(teacher, student, QQ_KK_VV, 2)
    (3.0 * loss).backward(retain_graph=True)
    first = {name: state.grad.clone() for name, state in student.items()}
    for state in student.values():
        state.grad = None
    loss.backward()
    for name, state in student.items():
        assert_near(3.0 * state.grad, first[name])


def test_second_derivatives_are_refused():
    """A gradient of the gradient that is silently zero."""
    teacher, student = make_states(38, 8), trainable(make_states(39, 8))
    loss = relation_loss(teacher, student, QQ_KK_VV, 2)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, list(student.values()), create_graph=True)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_function_transforms_are_refused(transform):
    """An unreadable error from inside, or a wrong derivative."""
    teacher, student = make_states(40, 8), make_states(41, 8)

    def loss(key):
        return relation_loss(teacher, {**student, "key": key}, [("key", "key")], 2)

    with pytest.raises(RuntimeError, match=r"torch\.func"):
        transform(loss)(student["key"])


def test_without_gradient_nothing_is_computed_for_it(monkeypatch):
    """Validation that pays for a backward pass."""
    seen = []
    whole = relations.block_losses
    monkeypatch.setattr(relations, "block_losses", lambda *a: seen.append(a[-1]) or whole(*a))
    teacher, student = make_states(42, 8), trainable(make_states(43, 8))
    with torch.no_grad():
        relation_loss(teacher, student, QQ_KK_VV, 2)
    relation_loss(teacher, make_states(43, 8), QQ_KK_VV, 2)
    relation_loss(teacher, student, QQ_KK_VV, 2)
    assert seen == [False, False, True]


def test_no_tensor_grows_with_the_square_of_the_length():
    """A relation that is held whole."""
    num_tokens = 1500
    teacher, student = make_states(44, 8, (1, num_tokens)), make_states(45, 8, (1, num_tokens))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor) and result.dtype.is_floating_point:
                largest = max(largest, result.numel())
            return result

    with Watch():
        relation_loss(teacher, trainable(student), QQ_KK_VV, 8).backward()
    assert largest <= relations_block._SCORES_PER_THREAD * torch.get_num_threads()
    assert largest < 8 * num_tokens**2 / 4


def test_forward_differentiation_is_refused():
    """An unreadable error from inside."""
    teacher, student = make_states(46, 8), make_states(47, 8)
    with torch.autograd.forward_ad.dual_level():
        key = torch.autograd.forward_ad.make_dual(student["key"], torch.ones(3, 5, 8))
        with pytest.raises(RuntimeError, match="forward-mode"):
            relation_loss(teacher, {**student, "key": key}, [("key", "key")], 2)


def test_inference_mode_does_not_spoil_training():
    """Buffers that are kept from step to step, made where training cannot use them."""
    relations_block._kept = threading.local()
    teacher, student = make_states(48, 8), make_states(49, 8)
    with torch.inference_mode():
        expected = relation_loss(teacher, student, QQ_KK_VV, 2)
    loss, gradient = value_and_gradient(relation_loss, teacher, student, QQ_KK_VV, 2, None)
    assert_near(loss, expected)
    assert all(grad.abs().max() > 0 for grad in gradient.values())


def test_wide_heads_do_not_go_to_triton(monkeypatch):
    """A kernel that asks for more shared memory than a GPU has, at the first step."""
    seen = []
    monkeypatch.setattr(
        relations, "resolve_kernel", lambda kernel, device: seen.append(kernel) or "block"
    )
    for hidden_size, heads, dtype in ((128, 2, "float32"), (128, 1, "float32"), (8, 2, "float64")):
        states = make_states(50, hidden_size, dtype=getattr(torch, dtype))
        relation_loss(states, states, QK_VV, heads)
    assert seen == ["auto", "block", "block"]
    monkeypatch.setattr(relations, "resolve_kernel", lambda *_: "triton")
    states = make_states(50, 256)
    with pytest.raises(ExperimentError, match=r"size 256.*relation_kernel=block"):
        relation_loss(states, states, QK_VV, 1, kernel="triton")


def test_kernels_by_name(monkeypatch):
    """Triton chosen where it cannot run, or an unknown name taken for block."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert relations.resolve_kernel("auto", "cpu") == "block"
    assert relations.resolve_kernel("block", "cuda") == "block"
    has_triton = importlib.util.find_spec("triton") is not None
    assert relations.resolve_kernel("auto", "cuda") == ("triton" if has_triton else "block")
    with pytest.raises(ExperimentError, match="relation_kernel=block"):
        relations.resolve_kernel("triton", "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert relations.resolve_kernel("auto", "cuda") == "block"
    with pytest.raises(ExperimentError, match="not installed"):
        relations.resolve_kernel("triton", "cuda")
