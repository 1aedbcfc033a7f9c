"""Terms on predictions against loops in Python's own floats, and on input that must not matter."""

import itertools
import math

import pytest
import torch

from minilm_exp.head_terms import (
    NO_LABEL,
    HardLabels,
    SoftLabels,
    head_states,
    label_loss,
    mean_by_sequence,
)
from minilm_exp.states import State

# Padding on the right, on the left, in the middle, nowhere.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [1, 0, 1, 0, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1],
    ]
)
NO = NO_LABEL
LABELS = {
    "classification": torch.tensor([2, 0, 1, 1]),
    "regression": torch.tensor([0.5, -1.0, 3.25, 0.0], dtype=torch.float64),
    # Start and end.
    "spans": torch.tensor([[0, 3], [4, 4], [2, 4], [0, 6]]),
    # Two, one, one and four tokens are selected.
    "masked_lm": torch.tensor(
        [
            [NO, 4, NO, 0, NO, NO, NO],
            [NO, NO, NO, NO, 2, NO, NO],
            [NO, NO, 3, NO, NO, NO, NO],
            [1, 1, NO, 0, NO, NO, 4],
        ]
    ),
}
HEADS = list(LABELS)
SHAPES = {
    "classification": (4, 3),
    "regression": (4, 1),
    "spans": (4, 7),
    "masked_lm": (4, 7, 5),
}
NAMES = {head: ["logits"] for head in HEADS} | {"spans": ["start_logits", "end_logits"]}
# Distance and temperature.
DISTANCES = [("ce", 1.0), ("ce", 2.5), ("kl", 1.0), ("kl", 2.5), ("mse", 1.0)]
SOFT_CASES = [
    (head, distance, temperature, tokens)
    for head in HEADS
    for tokens in (("masked", "all") if head == "masked_lm" else ("masked",))
    for distance, temperature in DISTANCES
]


def draw(head, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        State(name): torch.randn(SHAPES[head], generator=generator, dtype=torch.float64).to(dtype)
        for name in NAMES[head]
    }


def inputs_for(term, dtype=torch.float64):
    teacher, student = draw(term.head, 1, dtype), draw(term.head, 2, dtype)
    return teacher, {state: tensor.requires_grad_() for state, tensor in student.items()}


def detached(logits):
    return {state: tensor.detach() for state, tensor in logits.items()}


def labels_for(term):
    return LABELS[term.head] if term.reads_labels else None


def gradients_of(term, teacher, student, labels=None):
    labels = labels_for(term) if labels is None else labels
    total, _ = term(teacher, student, MASK, labels)
    return torch.autograd.grad(total, list(student.values()))


# The oracle: one token at a time, in Python's own floats.


def softmax(values):
    highest = max(values)
    exponentials = [math.exp(value - highest) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def tokens_of(table, sequence, nothing):
    return [token for token, value in enumerate(table[sequence].tolist()) if value != nothing]


def predictions(head, tokens, logits, sequence):
    """Vectors of which a sequence has one loss each; over them goes the mean."""
    vectors = [tensor[sequence].tolist() for tensor in logits.values()]
    if head == "spans":
        return [[vector[token] for token in tokens_of(MASK, sequence, 0)] for vector in vectors]
    if head == "masked_lm":
        real = tokens_of(MASK, sequence, 0)
        selected = tokens_of(LABELS["masked_lm"], sequence, NO_LABEL)
        return [vectors[0][token] for token in (real if tokens == "all" else selected)]
    return vectors


def mean(values):
    return sum(values) / len(values)


def distance_by_hand(distance, temperature, teacher, student):
    if distance == "mse":
        return mean([(t - s) ** 2 for t, s in zip(teacher, student)])
    p, q = (softmax([value / temperature for value in side]) for side in (teacher, student))
    if distance == "ce":
        return temperature**2 * sum(-a * math.log(b) for a, b in zip(p, q))
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q))


def soft_by_hand(term_arguments, teacher, student):
    head, distance, temperature, tokens = term_arguments
    distance = "mse" if head == "regression" else distance
    losses = []
    for sequence in range(len(MASK)):
        sides = [predictions(head, tokens, logits, sequence) for logits in (teacher, student)]
        losses.append(
            mean([distance_by_hand(distance, temperature, *pair) for pair in zip(*sides)])
        )
    return mean(losses)


def hard_by_hand(head, student):
    losses = []
    for sequence in range(len(MASK)):
        vectors = predictions(head, "masked", student, sequence)
        labels = LABELS[head][sequence].tolist()
        if head == "regression":
            losses.append((vectors[0][0] - labels) ** 2)
            continue
        if head == "classification":
            labels = [labels]
        elif head == "spans":
            labels = [tokens_of(MASK, sequence, 0).index(label) for label in labels]
        else:
            labels = [label for label in labels if label != NO_LABEL]
        assert len(labels) == len(vectors)
        losses.append(mean([-math.log(softmax(v)[label]) for v, label in zip(vectors, labels)]))
    return mean(losses)


def gradients_by_hand(loss, logits, step=1e-5):
    """Central differences for every logit."""
    gradients = []
    for state, values in logits.items():
        gradient = torch.zeros_like(values)
        for place in itertools.product(*map(range, values.shape)):
            sides = []
            for change in (step, -step):
                moved = values.clone()
                moved[place] += change
                sides.append(loss({**logits, state: moved}))
            gradient[place] = (sides[0] - sides[1]) / (2 * step)
        gradients.append(gradient)
    return gradients


def assert_agrees(loss, total, parts, student):
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(loss(detached(student)), rel=1e-10)
    assert parts.tolist() == [total.item()] and not parts.requires_grad
    found = torch.autograd.grad(total, list(student.values()))
    for gradient, expected in zip(found, gradients_by_hand(loss, detached(student))):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", SOFT_CASES, ids=str)
def test_soft_labels_by_hand(case):
    """Padding averaged in, a mean where a sum is said, no T^2, or a divergence turned round."""
    term = SoftLabels(*case)
    teacher, student = inputs_for(term)
    total, parts = term(teacher, student, MASK, labels_for(term))
    assert_agrees(lambda logits: soft_by_hand(case, teacher, logits), total, parts, student)


@pytest.mark.parametrize("head", HEADS)
def test_hard_labels_by_hand(head):
    """An answer in the padding, ends summed with starts, or long sequences that count for more."""
    term = HardLabels(head)
    _, student = inputs_for(term)
    total, parts = term({}, student, MASK, LABELS[head])
    assert_agrees(lambda logits: hard_by_hand(head, logits), total, parts, student)
    assert label_loss(head, student, MASK, LABELS[head]).item() == total.item()


# What must not matter


TERMS = {"+".join(map(str, case)): SoftLabels(*case) for case in SOFT_CASES} | {
    f"{head}+hard": HardLabels(head) for head in HEADS
}
PADDED = [name for name, term in TERMS.items() if term.head in ("spans", "masked_lm")]
SOFT = [name for name in TERMS if not name.endswith("hard")]
SELECTING = [name for name, t in TERMS.items() if t.head == "masked_lm" and t.reads_labels]


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("content", [1e3, math.nan, math.inf, -math.inf], ids=str)
def test_content_of_padding_does_not_matter(name, content):
    """A padded token as a class or in a mean, or 0 x nan in a gradient."""
    term = TERMS[name]
    teacher, student = inputs_for(term)

    def filled(logits):
        return {
            state: t.detach().masked_fill(
                (MASK == 0).view(*MASK.shape, *[1] * (t.dim() - 2)), content
            )
            for state, t in logits.items()
        }

    other_teacher = filled(teacher)
    other_student = {state: tensor.requires_grad_() for state, tensor in filled(student).items()}
    total, _ = term(teacher, student, MASK, labels_for(term))
    other_total, _ = term(other_teacher, other_student, MASK, labels_for(term))
    assert other_total.item() == pytest.approx(total.item(), rel=1e-12)
    gradients = gradients_of(term, teacher, student)
    for gradient, other in zip(gradients, gradients_of(term, other_teacher, other_student)):
        torch.testing.assert_close(other, gradient, rtol=1e-9, atol=1e-12)
        assert (other[MASK == 0] == 0).all()


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_amount_of_padding_does_not_matter(name, side):
    """A loss that hangs on the longest sequence of the batch."""
    term = TERMS[name]
    teacher, student = inputs_for(term)
    width = (5, 0) if side == "left" else (0, 5)

    def padded(tensor, value):
        others = (0, 0) * (tensor.dim() - 2)
        return torch.nn.functional.pad(tensor.detach(), (*others, *width), value=value)

    labels = wider_labels = labels_for(term)
    if labels is not None:
        wider_labels = labels + width[0] if term.head == "spans" else padded(labels, NO_LABEL)
    total, _ = term(teacher, student, MASK, labels)
    wider, _ = term(
        {state: padded(tensor, 3.0) for state, tensor in teacher.items()},
        {state: padded(tensor, 2.0) for state, tensor in student.items()},
        padded(MASK, 0),
        wider_labels,
    )
    assert wider.item() == pytest.approx(total.item(), rel=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_no_mask_is_a_mask_of_ones(name):
    """A corpus without padding trained on another loss."""
    term = TERMS[name]
    teacher, student = inputs_for(term)
    without, _ = term(teacher, student, None, labels_for(term))
    ones, _ = term(teacher, student, torch.ones_like(MASK), labels_for(term))
    assert without.item() == pytest.approx(ones.item(), rel=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_a_sequence_counts_the_same_in_every_batch(name):
    """Long sequences, or those with many selected tokens, that count for more than others."""
    term = TERMS[name]
    teacher, student = inputs_for(term)
    labels = labels_for(term)
    total, _ = term(teacher, student, MASK, labels)
    alone = [
        term(
            {state: tensor[i : i + 1] for state, tensor in teacher.items()},
            {state: tensor[i : i + 1] for state, tensor in student.items()},
            MASK[i : i + 1],
            None if labels is None else labels[i : i + 1],
        )[0].item()
        for i in range(len(MASK))
    ]
    assert total.item() == pytest.approx(mean(alone), rel=1e-12)


@pytest.mark.parametrize("name", SOFT)
def test_teacher_gets_no_gradient(name):
    """A teacher that is trained towards its student, or whose graph is kept."""
    term = TERMS[name]
    teacher, student = inputs_for(term)
    for tensor in teacher.values():
        tensor.requires_grad_()
    term(teacher, student, MASK, labels_for(term))[0].backward()
    assert all(tensor.grad is None for tensor in teacher.values())
    assert all(tensor.grad.abs().sum() > 0 for tensor in student.values())


@pytest.mark.parametrize("distance", ["ce", "kl", "mse"])
def test_values_of_labels_do_not_matter_to_soft_labels(distance):
    """Soft labels that look at the right answer, not only at where one is asked for."""
    term = SoftLabels("masked_lm", distance)
    teacher, student = inputs_for(term)
    labels = LABELS["masked_lm"]
    total, _ = term(teacher, student, MASK, labels)
    other, _ = term(teacher, student, MASK, labels.masked_fill(labels != NO_LABEL, 1))
    assert other.item() == total.item()


def test_order_of_what_a_model_returns_does_not_matter():
    """Starts that are compared with the labels of ends."""
    _, student = inputs_for(HardLabels("spans"))
    turned = dict(reversed(student.items()))
    losses = [label_loss("spans", logits, MASK, LABELS["spans"]) for logits in (student, turned)]
    assert losses[0].item() == losses[1].item()


# Masked language modelling where nothing is selected


@pytest.mark.parametrize("name", SELECTING)
def test_sequence_without_selected_tokens_counts_as_zero(name):
    """0 / 0, or a mean over the other sequences only."""
    term = TERMS[name]
    teacher, student = inputs_for(term)
    labels = LABELS["masked_lm"].clone()
    labels[1] = NO_LABEL
    whole, _ = term(teacher, student, MASK, labels)
    others, _ = term(
        {state: tensor[[0, 2, 3]] for state, tensor in teacher.items()},
        {state: tensor[[0, 2, 3]] for state, tensor in student.items()},
        MASK[[0, 2, 3]],
        labels[[0, 2, 3]],
    )
    assert whole.item() == pytest.approx(others.item() * 3 / 4, rel=1e-12)
    (gradient,) = gradients_of(term, teacher, student, labels=labels)
    assert gradient.isfinite().all() and (gradient[1] == 0).all() and (gradient[3] != 0).any()


@pytest.mark.parametrize("name", SELECTING)
def test_batch_without_selected_tokens_has_no_loss(name):
    """A mean over nothing, which is nan and ends the training."""
    term = TERMS[name]
    teacher, student = inputs_for(term)
    labels = torch.full_like(LABELS["masked_lm"], NO_LABEL)
    total, _ = term(teacher, student, MASK, labels)
    assert total.item() == 0
    assert (gradients_of(term, teacher, student, labels=labels)[0] == 0).all()


def test_mean_by_sequence():
    """Losses of one sequence that are handed to another, or a sum where a mean is said."""
    losses = torch.tensor([1.0, 2.0, 6.0, 5.0], dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    means = mean_by_sequence(losses, counts)
    assert means.tolist() == [3.0, 0.0, 5.0]
    (gradient,) = torch.autograd.grad(means.sum(), losses)
    assert gradient.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])


# What soft labels are


@pytest.mark.parametrize("name", SOFT)
def test_equal_predictions(name):
    """Teacher and student treated differently, or an entropy at another temperature."""
    term = TERMS[name]
    teacher = draw(term.head, 3)
    student = {state: tensor.clone().requires_grad_() for state, tensor in teacher.items()}
    total, _ = term(teacher, student, MASK, labels_for(term))
    expected = 0.0
    if term.distance == "ce":
        for sequence in range(len(MASK)):
            entropies = []
            for vector in predictions(term.head, term.tokens, teacher, sequence):
                p = softmax([value / term.temperature for value in vector])
                entropies.append(-sum(value * math.log(value) for value in p))
            expected += term.temperature**2 * mean(entropies) / len(MASK)
    assert total.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)
    for gradient in gradients_of(term, teacher, student):
        assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("head", "tokens"),
    [
        ("classification", "masked"),
        ("spans", "masked"),
        ("masked_lm", "masked"),
        ("masked_lm", "all"),
    ],
)
def test_kl_trains_as_ce(head, tokens, temperature):
    """The teacher's entropy with the wrong sign, or a factor that only one of the two has."""
    terms = [SoftLabels(head, distance, temperature, tokens) for distance in ("ce", "kl")]
    teacher, student = inputs_for(terms[0])
    for ce, kl in zip(*(gradients_of(term, teacher, student) for term in terms)):
        torch.testing.assert_close(kl, ce, rtol=1e-10, atol=1e-14)


def two_classes(*shares):
    return {State("logits"): torch.tensor([[math.log(share) for share in shares]])}


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        ("kl", 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)),
        ("ce", -0.9 * math.log(0.6) - 0.1 * math.log(0.4)),
    ],
)
def test_direction(distance, expected):
    """The student as the target: KL(student || teacher) would be 0.311 instead of 0.226."""
    teacher, student = two_classes(0.9, 0.1), two_classes(0.6, 0.4)
    total, _ = SoftLabels("classification", distance)(teacher, student, None)
    assert total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distance", ["ce", "kl"])
def test_gradient_does_not_shrink_with_the_temperature(distance):
    """No factor T^2: soft labels that fade against hard ones where T is large (Hinton, eq. 4)."""
    teacher, student = inputs_for(SoftLabels("classification"))
    differences = (student[State("logits")] - teacher[State("logits")]).detach()
    limit = (differences - differences.mean(dim=1, keepdim=True)) / differences.numel()
    sizes = []
    for temperature in (3.0, 30.0, 1e4):
        term = SoftLabels("classification", distance, temperature)
        (gradient,) = gradients_of(term, teacher, student)
        sizes.append(gradient.norm().item())
    torch.testing.assert_close(gradient, limit, rtol=1e-3, atol=1e-5)
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("distance", ["ce", "kl", "mse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_regression_is_always_mse(distance, temperature):
    """The softmax of one number, which is 1 whatever the number is."""
    term = SoftLabels("regression", distance, temperature)
    teacher, student = inputs_for(term)
    total, _ = term(teacher, student, MASK)
    pairs = zip(*(logits[State("logits")][:, 0].tolist() for logits in (teacher, student)))
    assert total.item() == pytest.approx(mean([(t - s) ** 2 for t, s in pairs]), rel=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_mse_has_no_temperature(head):
    """A factor T^2 that nothing cancels."""
    warm, plain = SoftLabels(head, "mse", 2.5), SoftLabels(head, "mse")
    teacher, student = inputs_for(plain)
    totals = [term(teacher, student, MASK, labels_for(term))[0].item() for term in (warm, plain)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-12)


def test_mse_of_spans_is_a_mean_over_real_tokens():
    """Squares divided by the padded length, so that a short sequence counts for less."""
    mask = torch.tensor([[1, 1, 0, 0, 0]])
    teacher = {State(name): torch.zeros(1, 5) for name in NAMES["spans"]}
    student = {
        State("start_logits"): torch.tensor([[1.0, 3.0, 9.0, 9.0, 9.0]]),
        State("end_logits"): torch.tensor([[2.0, 4.0, 9.0, 9.0, 9.0]]),
    }
    total, _ = SoftLabels("spans", "mse")(teacher, student, mask)
    assert total.item() == ((1 + 9) / 2 + (4 + 16) / 2) / 2


@pytest.mark.parametrize("distance", ["ce", "kl"])
def test_certain_predictions_are_finite(distance):
    """The logarithm of a probability that is 0 in float32."""
    teacher = {State("logits"): torch.tensor([[1e4, 0.0]])}
    student = {State("logits"): torch.tensor([[0.0, 1e4]], requires_grad=True)}
    term = SoftLabels("classification", distance)
    assert term(teacher, student, None)[0].item() == pytest.approx(1e4)
    assert gradients_of(term, teacher, student)[0].tolist() == [[-1.0, 1.0]]


# Precision


@pytest.mark.parametrize("case", SOFT_CASES, ids=str)
def test_soft_labels_of_bfloat16_are_in_float32(case):
    """Logarithms and means with two digits."""
    term = SoftLabels(*case)
    teacher, student = inputs_for(term, torch.bfloat16)
    total, parts = term(teacher, student, MASK, labels_for(term))
    assert total.dtype == parts.dtype == torch.float32
    expected = soft_by_hand(case, detached(teacher), detached(student))
    assert total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_hard_labels_of_bfloat16_are_in_float32(head):
    """Logarithms and means with two digits."""
    _, student = inputs_for(HardLabels(head), torch.bfloat16)
    total, parts = HardLabels(head)({}, student, MASK, LABELS[head])
    assert total.dtype == parts.dtype == torch.float32
    assert total.item() == pytest.approx(hard_by_hand(head, detached(student)), rel=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_autocast_does_not_matter(name):
    """An operation that autocast does in bfloat16, or one whose data types then do not fit."""
    term = TERMS[name]
    teacher, student = inputs_for(term, torch.float32)
    expected, _ = term(teacher, student, MASK, labels_for(term))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = term(teacher, student, MASK, labels_for(term))
    assert found.dtype == torch.float32
    assert found.item() == expected.item()


# What a term asks for


@pytest.mark.parametrize("name", TERMS)
def test_what_a_term_asks_for(name):
    """States that the model with this head lacks, or labels that the term is not given."""
    term = TERMS[name]
    wanted = [State(state) for state in NAMES[term.head]]
    is_hard = name.endswith("hard")
    assert head_states(term.head) == term.student_states == wanted
    assert term.teacher_states == ([] if is_hard else wanted)
    assert term.reads_labels == (is_hard or (term.head == "masked_lm" and term.tokens == "masked"))
    assert term.part_names == [""]
