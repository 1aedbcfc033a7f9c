"""The terms of objectives against loops in float64, and on input that must not matter."""

import math

import numpy
import pytest
import torch
from reference import relation_loss_reference
from transformers import AutoConfig, AutoModel

from minilm_exp.errors import ExperimentError
from minilm_exp.objective_settings import LAYERS, layer_pairs
from minilm_exp.objectives import Objective, build_objective
from minilm_exp.states import State, StateTap
from minilm_exp.terms import AttentionScores, Relations, StateDistance

NUM_HEADS = 4
HIDDEN = [(State("hidden", 4), State("hidden", 2)), (State("hidden", 0), State("hidden", 0))]

# Padding on the right, on the left, in the middle, nowhere.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [1, 0, 1, 0, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1],
    ]
)


def draw(states, size, seed, dtype=torch.float64, shape=MASK.shape):
    generator = torch.Generator().manual_seed(seed)
    return {
        state: torch.randn(*shape, size, generator=generator, dtype=torch.float64).to(dtype)
        for state in states
    }


def inputs_for(term, teacher_size=16, student_size=16, dtype=torch.float64):
    teacher = draw(term.teacher_states, teacher_size, 1, dtype)
    student = draw(term.student_states, student_size, 2, dtype)
    return teacher, {state: tensor.requires_grad_() for state, tensor in student.items()}


# The oracle: one vector at a time, in Python's own floats.


def softmax(values):
    highest = max(values)
    exponentials = [math.exp(value - highest) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def normalized(vector):
    length = math.sqrt(sum(entry * entry for entry in vector))
    return [entry / length for entry in vector]


def distance_of(kind, teacher, student):
    pairs = list(zip(teacher, student))
    if kind == "mse":
        return sum((t - s) ** 2 for t, s in pairs) / len(pairs)
    if kind == "l1":
        return sum(abs(t - s) for t, s in pairs) / len(pairs)
    if kind == "cosine":
        return 1 - sum(t * s for t, s in zip(normalized(teacher), normalized(student)))
    p, q = softmax(teacher), softmax(student)
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def real_vectors(states, sequence):
    tokens = [token for token in range(MASK.shape[1]) if MASK[sequence, token]]
    return [states[sequence, token].tolist() for token in tokens]


def distance_by_hand(kind, transforms, teacher, student):
    """Of states that are already of one size."""
    losses = []
    for sequence in range(len(MASK)):
        sides = [real_vectors(states, sequence) for states in (teacher, student)]
        for transform in transforms:
            if transform == "first_token":
                sides = [side[:1] for side in sides]
            elif transform == "mean":
                sides = [[list(numpy.mean(side, axis=0))] for side in sides]
            else:
                sides = [[normalized(vector) for vector in side] for side in sides]
        losses.append(numpy.mean([distance_of(kind, t, s) for t, s in zip(*sides)]))
    return float(numpy.mean(losses))


def scores_by_hand(teacher, student):
    losses = []
    for sequence in range(len(MASK)):
        squares = []
        sides = []
        for states, layer in ((teacher, 4), (student, 2)):
            query = real_vectors(states[State("query", layer)], sequence)
            key = real_vectors(states[State("key", layer)], sequence)
            size = len(query[0]) // NUM_HEADS
            scores = [
                sum(
                    a * b
                    for a, b in zip(q[h * size : (h + 1) * size], k[h * size : (h + 1) * size])
                )
                / math.sqrt(size)
                for h in range(NUM_HEADS)
                for q in query
                for k in key
            ]
            sides.append(scores)
        squares = [(t - s) ** 2 for t, s in zip(*sides)]
        losses.append(sum(squares) / len(squares))
    return sum(losses) / len(losses)


TRANSFORMS = [
    [],
    ["first_token"],
    ["mean"],
    ["normalize"],
    ["first_token", "normalize"],
    ["mean", "normalize"],
    ["normalize", "mean"],
]


@pytest.mark.parametrize("transforms", TRANSFORMS, ids="+".join)
@pytest.mark.parametrize("kind", ["mse", "l1", "cosine", "kl"])
def test_state_distance_by_hand(kind, transforms):
    """Padding averaged in, a sum where a mean is said, or a divergence the wrong way round."""
    term = StateDistance(HIDDEN, [(16, 16)] * 2, transforms, kind)
    teacher, student = inputs_for(term)
    total, parts = term(teacher, student, MASK)
    expected = sum(
        distance_by_hand(kind, transforms, teacher[t], student[s].detach()) for t, s in HIDDEN
    )
    assert total.item() == pytest.approx(expected, rel=1e-10)
    assert parts.tolist() == [total.item()] and not parts.requires_grad


@pytest.mark.parametrize("projection", ["shared", "each"])
def test_projection_by_hand(projection):
    """The map applied to the teacher, one map where there should be two, or no bias."""
    term = StateDistance(HIDDEN, [(16, 8)] * 2, [], "mse", projection).double()
    teacher, student = inputs_for(term, student_size=8)
    assert len(term.projections) == (1 if projection == "shared" else 2)
    expected = 0.0
    for number, (teacher_state, student_state) in enumerate(HIDDEN):
        linear = term.projections[number if projection == "each" else 0]
        projected = student[student_state] @ linear.weight.T + linear.bias
        expected += distance_by_hand("mse", [], teacher[teacher_state], projected.detach())
    total, _ = term(teacher, student, MASK)
    assert total.item() == pytest.approx(expected, rel=1e-10)
    total.backward()
    for linear in term.projections:
        assert linear.weight.grad.abs().sum() > 0 and linear.bias.grad.abs().sum() > 0


def test_attention_scores_by_hand():
    """Scores over the whole hidden size, without the scale, or with padded keys in the mean."""
    term = AttentionScores([(4, 2)], NUM_HEADS)
    # The heads are as many, not as large.
    teacher, student = inputs_for(term, teacher_size=16, student_size=8)
    total, _ = term(teacher, student, MASK)
    expected = scores_by_hand(teacher, {state: t.detach() for state, t in student.items()})
    assert total.item() == pytest.approx(expected, rel=1e-10)


def test_relations_of_several_layers_are_summed():
    """A mean over layers, or the states of another layer."""
    pairs = [("query", "key"), ("value", "value")]
    term = Relations([(2, 1), (4, 2)], pairs, NUM_HEADS)
    teacher, student = inputs_for(term)
    total, parts = term(teacher, student, MASK)
    expected = [
        sum(
            relation_loss_reference(
                {name: teacher[State(name, t)] for name in ("query", "key", "value")},
                {name: student[State(name, s)].detach() for name in ("query", "key", "value")},
                [pair],
                NUM_HEADS,
                MASK,
            ).item()
            for t, s in [(2, 1), (4, 2)]
        )
        for pair in pairs
    ]
    assert parts.tolist() == pytest.approx(expected, rel=1e-9)
    assert total.item() == pytest.approx(sum(expected), rel=1e-9)
    assert term.part_names == ["query-key", "value-value"]


# What must not matter


def terms():
    yield "relations", Relations([(4, 2)], [("query", "key"), ("value", "value")], NUM_HEADS)
    yield "scores", AttentionScores([(4, 2)], NUM_HEADS)
    for kind in ("mse", "l1", "cosine", "kl"):
        for transforms in TRANSFORMS:
            name = "+".join([kind, *transforms])
            yield name, StateDistance(HIDDEN, [(16, 16)] * 2, transforms, kind, "each").double()


TERMS = dict(terms())


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("content", [1e3, math.nan, math.inf], ids=str)
def test_content_of_padding_does_not_matter(name, content):
    """A padded token in a mean, or 0 x nan in a gradient."""
    term = TERMS[name]
    teacher, student = inputs_for(term)
    total, _ = term(teacher, student, MASK)
    gradients = torch.autograd.grad(total, list(student.values()))
    is_padding = (MASK == 0)[..., None]
    other_teacher = {state: t.masked_fill(is_padding, content) for state, t in teacher.items()}
    other_student = {
        state: t.detach().masked_fill(is_padding, content).requires_grad_()
        for state, t in student.items()
    }
    other_total, _ = term(other_teacher, other_student, MASK)
    assert other_total.item() == pytest.approx(total.item(), rel=1e-12)
    other_gradients = torch.autograd.grad(other_total, list(other_student.values()))
    for gradient, other in zip(gradients, other_gradients):
        torch.testing.assert_close(other, gradient, rtol=1e-9, atol=1e-12)
        assert (other * is_padding == 0).all()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_amount_of_padding_does_not_matter(name, side):
    """A loss that hangs on the longest sequence of the batch."""
    term = TERMS[name]
    teacher, student = inputs_for(term)
    width = (5, 0) if side == "left" else (0, 5)

    def padded(states):
        return {
            state: torch.nn.functional.pad(t.detach(), (0, 0, *width), value=3.0)
            for state, t in states.items()
        }

    total, _ = term(teacher, student, MASK)
    mask = torch.nn.functional.pad(MASK, width)
    wider, _ = term(padded(teacher), padded(student), mask)
    assert wider.item() == pytest.approx(total.item(), rel=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_no_mask_is_a_mask_of_ones(name):
    """A corpus without padding trained on another loss."""
    term = TERMS[name]
    teacher, student = inputs_for(term)
    without, _ = term(teacher, student, None)
    ones, _ = term(teacher, student, torch.ones_like(MASK))
    assert without.item() == pytest.approx(ones.item(), rel=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_a_sequence_counts_the_same_in_every_batch(name):
    """Long sequences that count for more than short ones."""
    term = TERMS[name]
    teacher, student = inputs_for(term)
    total, _ = term(teacher, student, MASK)
    alone = [
        term(
            {state: t[i : i + 1] for state, t in teacher.items()},
            {state: t[i : i + 1] for state, t in student.items()},
            MASK[i : i + 1],
        )[0].item()
        for i in range(len(MASK))
    ]
    assert total.item() == pytest.approx(sum(alone) / len(alone), rel=1e-9)


@pytest.mark.parametrize("name", TERMS)
def test_equal_states_have_no_loss(name):
    """Teacher and student treated differently."""
    term = TERMS[name]
    if getattr(term, "projections", None):
        for linear in term.projections:
            torch.nn.init.eye_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    values = draw([State("any")], 16, 3)[State("any")]
    same = dict.fromkeys((*term.teacher_states, *term.student_states), values)
    total, _ = term(same, {state: t.clone().requires_grad_() for state, t in same.items()}, MASK)
    assert total.item() == pytest.approx(0, abs=1e-12)


def test_arithmetic_is_in_float32_under_autocast():
    """A mean squared difference of hidden states in bfloat16, with two digits."""
    term = StateDistance(HIDDEN, [(16, 8)] * 2, [], "mse", "shared")
    objective = Objective({"hidden": term}, {"hidden": 1.0})
    teacher, student = inputs_for(term, student_size=8, dtype=torch.float32)
    expected, _ = objective(teacher, student, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = objective(teacher, student, MASK)
    assert found.dtype == torch.float32
    assert found.item() == expected.item()


# MiniLM's attention distribution


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_query_key_relation_is_the_attention_distribution(model_type):
    """minilmv1 that compares something else than what the attention of the model computes."""
    config = AutoConfig.for_model(
        model_type, vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    models = [AutoModel.from_config(config, attn_implementation="eager").eval() for _ in range(2)]
    ids = torch.randint(5, 50, MASK.shape)
    inputs = {"input_ids": ids, "attention_mask": MASK}
    weights = []
    for model in models:
        with torch.no_grad():
            weights.append(model(**inputs, output_attentions=True).attentions[-1].double())
    losses = []
    for sequence in range(len(MASK)):
        is_real = MASK[sequence].bool()
        p, q = (w[sequence][:, is_real][:, :, is_real] for w in weights)
        losses.append((p * (p / q).log()).sum(-1).mean().item())
    term = Relations([(2, 2)], [("query", "key")], 4)
    states = []
    for model in models:
        tap = StateTap(model, term.teacher_states)
        with torch.no_grad():
            states.append(tap(**inputs))
        tap.close()
    total, _ = term(*states, MASK)
    assert total.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


# The weighted sum


def test_weights_and_names():
    """A weight that is not applied, or applied to what is logged; names that hide a term."""
    relations = Relations([(4, 2)], [("query", "key"), ("value", "value")], NUM_HEADS)
    hidden = StateDistance(HIDDEN[:1], [(16, 16)])
    both = {"relations": relations, "hidden": hidden}
    objective = Objective(both, {"relations": 2.0, "hidden": 0.5})
    assert objective.names == ["relations/query-key", "relations/value-value", "hidden"]
    teacher = draw(objective.teacher_states, 16, 1)
    student = draw(objective.student_states, 16, 2)
    total, terms_T = objective(teacher, student, MASK)
    first, second, third = terms_T.tolist()
    assert total.item() == pytest.approx(2 * (first + second) + 0.5 * third, rel=1e-6)
    assert third == pytest.approx(hidden(teacher, student, MASK)[0].item(), rel=1e-6)
    assert Objective({"relations": relations}, {"relations": 1.0}).names == [
        "query-key", "value-value"
    ]  # fmt: skip
    assert Objective({"hidden": hidden}, {"hidden": 1.0}).names == ["hidden"]


# Layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("selected", [(10, 6)]),
        ("last", [(12, 6)]),
        # TinyBERT's g(m) = 2 m.
        ("uniform", [(2, 1), (4, 2), (6, 3), (8, 4), (10, 5), (12, 6)]),
        ("uniform_from_embeddings", [(0, 0), (2, 1), (4, 2), (6, 3), (8, 4), (10, 5), (12, 6)]),
        # Patient-KD's presets, counted from 0 there: 1, 3, 5, 7, 9 and 6 to 10.
        ("skip", [(2, 1), (4, 2), (6, 3), (8, 4), (10, 5)]),
        ("last_layers", [(7, 1), (8, 2), (9, 3), (10, 4), (11, 5)]),
        ([[1, 1], [9, 6]], [(1, 1), (9, 6)]),
    ],
    ids=str,
)
def test_layers_of_twelve_and_six(layers, expected):
    """Layers counted from 0, or the last hidden states among Patient-KD's."""
    assert layer_pairs(layers, 12, 6, teacher_layer=10) == expected


@pytest.mark.parametrize("name", LAYERS)
def test_layers_exist_in_any_pair_of_models(name):
    """A mapping that fits only where one number of layers divides the other."""
    for teacher in range(1, 13):
        for student in range(1, teacher + 1):
            for t, s in layer_pairs(name, teacher, student, teacher):
                assert 0 <= t <= teacher and 0 <= s <= student


# Made from settings


OBJECTIVES = {
    "minilmv2": ["query-query", "key-key", "value-value"],
    "minilmv1": ["query-key", "value-value"],
    "attention_only": ["query-key"],
    "value_mse": ["attention/query-key", "values"],
    "layer_to_layer": ["query-key", "value-value"],
    "tinybert": ["attention", "hidden"],
    "sentence_embedding": ["embedding"],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_of_the_config_train(name, settings_for, tiny_bert, tiny_teacher_folder):
    """An option that asks for states that no model has, or a term without a gradient."""
    narrow = 32 if name == "sentence_embedding" else 16
    settings = settings_for(
        "teacher=custom", f"teacher.path={tiny_teacher_folder}", "student=tiny", "task=none",
        "corpus.block_length=16", f"objective={name}", f"student.hidden_size={narrow}",
        "student.num_attention_heads=4", "relation_set.num_relation_heads=4",
        "student.num_layers=2",
    )  # fmt: skip
    config = tiny_bert.config.__class__(**tiny_bert.config.to_dict() | {
        "hidden_size": narrow, "num_hidden_layers": 2, "intermediate_size": 24
    })  # fmt: skip
    torch.manual_seed(0)
    student = AutoModel.from_config(config)
    objective = build_objective(settings, tiny_bert, student)
    assert objective.names == OBJECTIVES[name]
    ids = torch.randint(5, 40, MASK.shape)
    states = []
    for model, wanted in (
        (tiny_bert, objective.teacher_states),
        (student, objective.student_states),
    ):
        tap = StateTap(model, wanted)
        states.append(tap(input_ids=ids, attention_mask=MASK))
        tap.close()
    total, _ = objective({state: t.detach() for state, t in states[0].items()}, states[1], MASK)
    total.backward()
    assert total.item() > 0
    assert student.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    for parameter in objective.parameters():
        assert parameter.grad.abs().sum() > 0


def test_other_number_of_heads_has_no_scores(settings_for, tiny_bert):
    """Scores of four heads compared with those of two."""
    settings = settings_for("objective=tinybert", "task=none")
    config = tiny_bert.config.__class__(
        **tiny_bert.config.to_dict() | {"num_attention_heads": 2, "num_hidden_layers": 2}
    )
    with pytest.raises(
        ExperimentError, match=r"objective\.terms\.attention.*num_attention_heads=4"
    ):
        build_objective(settings, tiny_bert, AutoModel.from_config(config))


def test_other_size_needs_a_projection():
    """Broadcasting, or an error from the middle of training."""
    with pytest.raises(ExperimentError, match=r"8 entries.*16.*projection"):
        StateDistance(HIDDEN, [(16, 8)] * 2)
    with pytest.raises(ExperimentError, match="projection=each"):
        StateDistance(HIDDEN, [(16, 8), (16, 4)], projection="shared")
