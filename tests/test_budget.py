"""Shapes to choose from, and what a budget says of them."""

import pytest

from minilm_exp.budget import (
    Candidate,
    Shape,
    check_budget,
    meets,
    num_params,
    ranked,
    shapes,
    table_row,
)
from minilm_exp.errors import ExperimentError
from minilm_exp.settings import Budget, Teacher


def teacher_of(num_layers, hidden_size, num_heads, intermediate_size=None):
    return Teacher(
        name="t", hub_id=None, revision=None, package=None, path=None, weights="random",
        model_type="bert", vocab_size=100, num_layers=num_layers, hidden_size=hidden_size,
        num_attention_heads=num_heads, intermediate_size=intermediate_size or 4 * hidden_size,
        max_position_embeddings=512, paper_layer=num_layers, upper_middle_layer=1,
        num_relation_heads=1, initializer_range=None,
    )  # fmt: skip


def candidate(num_layers, width, speedup, transformer, parameters=None, milliseconds=1.0):
    shape = Shape(num_layers, width, 1)
    return Candidate(shape, parameters or transformer, transformer, milliseconds, speedup)


CANDIDATES = [
    candidate(6, 768, 2.0, 42_000_000, 66_000_000, 20.0),
    candidate(3, 768, 3.9, 21_200_000, 45_000_000, 10.0),
    candidate(12, 384, 2.6, 21_200_000, 33_000_000, 15.0),
    candidate(6, 384, 5.2, 10_600_000, 22_000_000, 7.0),
]


def test_papers_shapes_are_among_them():
    """A grid that leaves out what the MiniLM students are."""
    found = shapes(teacher_of(12, 768, 12), Budget(), False)
    for layers, width, heads in ((6, 768, 12), (3, 768, 12), (12, 384, 12), (6, 384, 12)):
        assert any(
            (shape.num_layers, shape.hidden_size, shape.num_attention_heads)
            == (layers, width, heads)
            for shape in found
        )
    large = shapes(teacher_of(24, 1024, 16), Budget(), False)
    assert {(12, 768), (6, 768), (12, 512)} <= {(s.num_layers, s.hidden_size) for s in large}


@pytest.mark.parametrize(
    "sizes", [(12, 768, 12), (6, 384, 12), (24, 1024, 16), (4, 32, 4), (1, 60, 3)]
)
def test_every_shape_can_be_built_and_is_smaller(sizes):
    """The teacher itself as its student, heads that do not divide, a shape twice."""
    teacher = teacher_of(*sizes)
    if sizes[0] == 1:
        with pytest.raises(ExperimentError, match="no shape smaller"):
            shapes(teacher, Budget(), True)
        teacher = teacher_of(2, 60, 3)
    found = shapes(teacher, Budget(), False)
    assert len({(s.num_layers, s.hidden_size) for s in found}) == len(found)
    for shape in found:
        assert shape.hidden_size % shape.num_attention_heads == 0
        assert 1 <= shape.num_layers <= teacher.num_layers
        assert (shape.num_layers, shape.hidden_size) != (teacher.num_layers, teacher.hidden_size)


def test_students_as_wide_have_the_teachers_feed_forward():
    """A student that cannot begin with the teacher's layers although it is as wide."""
    found = shapes(teacher_of(4, 64, 4, 100), Budget(), False)
    assert {s.intermediate_size for s in found if s.hidden_size == 64} == {100}
    assert {s.intermediate_size for s in found if s.hidden_size < 64} == {None}


def test_equal_widths_only_where_states_are_compared():
    """A narrow student, for which hours later there is no loss."""
    found = shapes(teacher_of(6, 384, 12), Budget(), True)
    assert {shape.hidden_size for shape in found} == {384}
    with pytest.raises(ExperimentError, match=r"hidden_sizes=\[192\].*384"):
        shapes(teacher_of(6, 384, 12), Budget(hidden_sizes=[192]), True)


def test_sizes_can_be_named():
    """Names that are ignored, or a student larger than its teacher."""
    found = shapes(teacher_of(6, 384, 12), Budget(num_layers=[2, 3], hidden_sizes=[96]), False)
    assert [(s.num_layers, s.hidden_size) for s in found] == [(3, 96), (2, 96)]
    for budget in (Budget(num_layers=[7]), Budget(hidden_sizes=[512])):
        with pytest.raises(ExperimentError, match=r"larger than the teacher's 6 x 384"):
            shapes(teacher_of(6, 384, 12), budget, False)


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (Budget(speedup=2.0), (6, 768)),
        (Budget(speedup=2.5), (3, 768)),  # as large as 12 x 384, and wider
        (Budget(speedup=4.0), (6, 384)),
        (Budget(params="40M"), (12, 384)),
        (Budget(params=22_000_000), (6, 384)),
        (Budget(latency_ms=10), (3, 768)),
        (Budget(latency_ms=15, params="44M"), (12, 384)),
        (Budget(speedup=1.5, latency_ms=9.0), (6, 384)),
    ],
)
def test_largest_that_meets_all_is_chosen(budget, chosen):
    """The fastest one, or one that meets only the last of two."""
    best = ranked(CANDIDATES, budget)[0]
    assert (best.shape.num_layers, best.shape.hidden_size) == chosen
    assert meets(best, budget)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(speedup=50.0), ["speedup=50.0", "4 shapes", "6 x 384", "x5.20"]),
        (Budget(params="1M"), ["params=1M", "6 x 384", "22M"]),
        (Budget(latency_ms=0.5), ["latency_ms=0.5", "6 x 384", "7.00 ms"]),
        (Budget(speedup=3.0, params="30k"), ["speedup=3.0", "params=30k"]),
    ],
)
def test_nearest_is_named_where_none_meets_it(budget, words):
    """A budget that is quietly missed."""
    with pytest.raises(ExperimentError) as raised:
        ranked(CANDIDATES, budget)
    assert all(word in str(raised.value) for word in words), raised.value


def test_pruning_is_named_where_embeddings_are_too_many():
    """A multilingual teacher whose smallest student is too large, and no way out."""
    large = candidate(1, 384, 9.0, 1_000_000, 97_000_000)
    with pytest.raises(ExperimentError, match="vocabulary=prune_to_corpus"):
        ranked([large], Budget(params="20M"))
    with pytest.raises(ExperimentError) as raised:
        ranked([candidate(1, 384, 9.0, 20_000_000, 22_000_000)], Budget(params="20M"))
    assert "prune_to_corpus" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("20M", 20e6), ("1.5m", 1.5e6), ("500k", 5e5), ("0.1B", 1e8), (7_000_000, 7e6), (None, None)],
)
def test_numbers_of_parameters_are_read(text, number):
    """20M as 20."""
    assert num_params(text) == number


@pytest.mark.parametrize(
    "text", ["20X", "", "M", "-3M", "0", 0, "1e6", "20 million", "nan", True, [1], "2" * 90 + "Q"]
)
def test_what_is_no_number_of_parameters_is_named(text):
    """A budget that means something else than was written."""
    with pytest.raises(ExperimentError, match=r"student\.budget\.params="):
        num_params(text)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"speedup": 1.0}, "speedup=1.0 must be a finite number above 1"),
        ({"speedup": float("nan")}, "speedup=nan"),
        ({"speedup": float("inf")}, "speedup=inf"),
        ({"latency_ms": 0.0}, "latency_ms=0.0"),
        ({"latency_ms": -1.0}, "latency_ms=-1.0"),
        ({"speedup": 2.0, "search": "slow"}, "search=slow is not none or quick"),
        ({"speedup": 2.0, "search_share": 1.5}, "search_share=1.5 must not be above 1"),
        ({"speedup": 2.0, "search_share": 0.0}, "search_share=0.0"),
        ({"speedup": 2.0, "batch_size": 0}, "batch_size=0"),
        ({"speedup": 2.0, "sequence_length": -3}, "sequence_length=-3"),
        ({"speedup": 2.0, "threads": 0}, "threads=0"),
        ({"speedup": 2.0, "num_layers": []}, r"num_layers=\[\]"),
        ({"speedup": 2.0, "hidden_sizes": [0]}, r"hidden_sizes=\[0\]"),
        ({"search": "quick"}, "search=quick makes no difference"),
        ({"batch_size": 4}, "batch_size=4 makes no difference"),
    ],
)
def test_wrong_budgets_are_named(given, words):
    """One that is taken for another, or found wrong after the measuring."""
    with pytest.raises(ExperimentError, match=words):
        check_budget(Budget(**given))


def test_table_says_what_was_chosen():
    """A table in which two are chosen, or none."""
    budget = Budget(speedup=3.0)
    chosen = ranked(CANDIDATES, budget)[0]
    rows = [table_row(one, budget, chosen) for one in CANDIDATES]
    assert [row["chosen"] for row in rows] == [False, True, False, False]
    assert [row["meets_budget"] for row in rows] == [False, True, False, True]
    assert rows[1]["num_layers"] == 3 and rows[1]["parameters"] == 45_000_000
