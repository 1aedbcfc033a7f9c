"""Scores against values by hand and against scikit-learn and SciPy called in another way."""

import random
from fractions import Fraction

import numpy
import pytest
from datasets import Dataset
from scipy import stats
from sklearn import metrics as sklearn_metrics

from minilm_exp.errors import ExperimentError
from minilm_exp.task_settings import METRICS, NextPassage, Task
from minilm_exp.tasks.examples import Examples
from minilm_exp.tasks.metrics import check_labels, check_score_names, combine_parts, score_part
from minilm_exp.tasks.spans import Answer


def make_task(*metrics, kind="classification", score=None, select=None):
    return Task(1, kind, "glue", list(metrics), score or metrics[0], select)


def make_examples(labels):
    return Examples(Dataset.from_dict({"label": labels}), "")


def score(metric, labels, predictions, part=""):
    kind = "regression" if metric in METRICS["regression"] else "classification"
    task = make_task(metric, kind=kind)
    scores = score_part("mine", task, part, make_examples(labels), predictions)
    assert list(scores) == [metric] and isinstance(scores[metric], float)
    return scores[metric]


# By hand

# Gold 1 1 1 0 0 2 against 1 0 1 1 0 0. Class 0: 1 of 3 predictions, 1 of 2 golds; class 1: 2 of 3
# and 2 of 3; class 2: never predicted, 0 of 1.
GOLD = [1, 1, 1, 0, 0, 2]
PREDICTED = [1, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", Fraction(3, 6)),
        # F1 is 2 hits / (predictions + golds) of a class.
        ("macro_f1", (Fraction(2, 5) + Fraction(4, 6) + 0) / 3),
        ("macro_recall", (Fraction(1, 2) + Fraction(2, 3) + 0) / 3),
    ],
)
def test_three_classes_by_hand(metric, expected):
    """Precision for recall, weights by the size of a class, or a class that is left out."""
    assert score(metric, GOLD, PREDICTED) == pytest.approx(float(expected), abs=1e-12)


# 3 hits of class 1, 2 of class 0, 1 wrong alarm, 4 missed.
BINARY_GOLD = [1] * 7 + [0] * 3
BINARY_PREDICTED = [1, 1, 1, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", 5 / 10),
        ("f1", 2 * 3 / (4 + 7)),
        ("macro_f1", (2 * 3 / (4 + 7) + 2 * 2 / (6 + 3)) / 2),
        ("macro_recall", (3 / 7 + 2 / 3) / 2),
        # (hits 1 x hits 0 - alarms x missed) / root of the product of the margins.
        ("matthews", (3 * 2 - 1 * 4) / (4 * 6 * 7 * 3) ** 0.5),
    ],
)
def test_two_classes_by_hand(metric, expected):
    """F1 of class 0 for that of class 1, or the mean of both."""
    assert score(metric, BINARY_GOLD, BINARY_PREDICTED) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        # Deviations -1.5 -0.5 0.5 1.5 and -3 -1 -1 5: 12 / root of 5 x 36.
        ("pearson", 12 / 180**0.5),
        # Ranks 1 2 3 4 and 1 2.5 2.5 4: 4.5 / root of 5 x 4.5.
        ("spearman", 4.5 / 22.5**0.5),
    ],
)
def test_correlation_by_hand(metric, expected):
    """Ranks that break ties by position, or one coefficient for the other."""
    found = score(metric, [1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 2.0, 8.0])
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", [*METRICS["classification"], *METRICS["regression"]])
def test_everything_right_and_everything_wrong(metric):
    """A percentage, a distance that is best at 0, or a coefficient without its sign."""
    labels = [0, 1, 1, 0]
    assert score(metric, labels, labels) == pytest.approx(1.0, abs=1e-12)
    worst = -1.0 if metric in ("matthews", "pearson", "spearman") else 0.0
    assert score(metric, labels, [1, 0, 0, 1]) == pytest.approx(worst, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("accuracy", 0.75), ("f1", 0.0), ("macro_f1", 3 / 7), ("macro_recall", 0.5),
     ("matthews", 0.0)],
)  # fmt: skip
def test_one_class_is_predicted_throughout(metric, expected):
    """A warning of the library and an undefined value in place of what GLUE and TweetEval count."""
    assert score(metric, [0, 0, 0, 1], [0, 0, 0, 0]) == pytest.approx(expected, abs=1e-12)


# Against the libraries, in other words


def draw_classes(seed, number=200, classes=3):
    draw = random.Random(seed)
    labels = [draw.randrange(classes) for _ in range(number)]
    predictions = [
        label if draw.random() < 0.6 else draw.randrange(classes) for label in labels
    ]  # right more often than by chance
    return labels, predictions


@pytest.mark.parametrize("seed", range(5))
def test_means_over_classes_against_a_report(seed):
    """An average over examples in place of classes."""
    labels, predictions = draw_classes(seed, classes=4)
    report = sklearn_metrics.classification_report(labels, predictions, output_dict=True)
    assert score("accuracy", labels, predictions) == pytest.approx(report["accuracy"], abs=1e-12)
    macro = report["macro avg"]
    assert score("macro_f1", labels, predictions) == pytest.approx(macro["f1-score"], abs=1e-12)
    assert score("macro_recall", labels, predictions) == pytest.approx(macro["recall"], abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_binary_metrics_against_a_report(seed):
    """The other class is the positive one."""
    labels, predictions = draw_classes(seed, classes=2)
    report = sklearn_metrics.classification_report(labels, predictions, output_dict=True)
    assert score("f1", labels, predictions) == pytest.approx(report["1"]["f1-score"], abs=1e-12)
    # Of two classes Matthews' coefficient is Pearson's.
    expected = numpy.corrcoef(labels, predictions)[0, 1]
    assert score("matthews", labels, predictions) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_matthews_of_several_classes(seed):
    """The binary formula, which takes class 2 for class 1."""
    labels, predictions = draw_classes(seed, classes=3)
    table = sklearn_metrics.confusion_matrix(labels, predictions).astype(object)
    golds, guesses = table.sum(axis=1), table.sum(axis=0)
    total, hits = sum(golds), table.trace()
    covariance = hits * total - golds @ guesses
    expected = (
        covariance / float((total**2 - golds @ golds) * (total**2 - guesses @ guesses)) ** 0.5
    )
    assert score("matthews", labels, predictions) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_correlations_against_numpy(seed):
    """Labels and predictions with ties, as STS-B's steps of 0.2 give them."""
    draw = numpy.random.default_rng(seed)
    labels = numpy.round(draw.uniform(0, 5, 100) * 5) / 5
    predictions = numpy.round(labels + draw.normal(0, 1, 100), 1)
    ranks = [stats.rankdata(values) for values in (labels, predictions)]
    given = labels.tolist(), predictions.tolist()
    expected = numpy.corrcoef(labels, predictions)[0, 1]
    assert score("pearson", *given) == pytest.approx(expected, abs=1e-12)
    assert score("spearman", *given) == pytest.approx(numpy.corrcoef(*ranks)[0, 1], abs=1e-12)


def test_several_metrics_of_one_task():
    """One metric under the name of another."""
    task = make_task("macro_recall", "accuracy", "f1")
    scores = score_part("mine", task, "", make_examples(BINARY_GOLD), BINARY_PREDICTED)
    assert scores == {
        name: score(name, BINARY_GOLD, BINARY_PREDICTED)
        for name in ("macro_recall", "accuracy", "f1")
    }


# What is not defined


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
@pytest.mark.parametrize("part", ["", "de"])
def test_constant_predictions_have_no_correlation(metric, part):
    """NaN, or a score of 0 that no one has measured."""
    with pytest.raises(ExperimentError) as caught:
        score(metric, [1.0, 2.0, 3.0], [2.5] * 3, part)
    of_part = f"of {part} " if part else ""
    assert str(caught.value) == (
        f"{metric} of mine is not defined: all 3 predictions {of_part}are 2.5; train otherwise"
        " (task_training.learning_rate, .epochs)"
    )


@pytest.mark.parametrize("metric", [*METRICS["classification"], *METRICS["regression"]])
def test_labels_that_are_all_the_same(metric):
    """A score of 0 or 1 for labels that cannot be told apart."""
    kind = "regression" if metric in METRICS["regression"] else "classification"
    task = make_task(metric, kind=kind)
    examples = make_examples([1, 1, 1])
    if metric == "accuracy":
        check_labels("mine", task, "", examples)
        assert score(metric, [1, 1, 1], [1, 0, 1]) == 2 / 3
        return
    for check in (
        lambda part: check_labels("mine", task, part, examples),
        lambda part: score_part("mine", task, part, examples, [1, 0, 1]),
    ):
        with pytest.raises(ExperimentError) as caught:
            check("de")
        expected = f"{metric} of mine is not defined: all 3 labels of de are 1; give data with"
        assert str(caught.value).startswith(expected)
        # Advice that settings would refuse is none.
        assert ("tasks.mine.metrics=[accuracy]" in str(caught.value)) == (kind != "regression")
        assert "raise tasks.mine.held_out_fraction" in str(caught.value)
    task.validation = ["validation"]
    with pytest.raises(ExperimentError) as caught:
        check_labels("mine", task, "", examples)
    assert "held_out" not in str(caught.value)


def test_accuracy_beside_another_metric_does_not_excuse_it():
    """F1 of one class only, because accuracy is defined."""
    with pytest.raises(ExperimentError, match="f1 of mine is not defined: all 2 labels are 0"):
        check_labels("mine", make_task("accuracy", "f1"), "", make_examples([0, 0]))


# Parts


def test_only_part_has_plain_names():
    """accuracy_ and a mean over one part."""
    assert combine_parts({"": ({"accuracy": 0.5, "f1": 0.25}, 4)}) == {"accuracy": 0.5, "f1": 0.25}


def test_means_over_parts_by_hand():
    """Each example weighs alike in the mean, or each language in the joint value."""
    combined = combine_parts(
        {
            "en": ({"accuracy": 3 / 4}, 4),
            "de": ({"accuracy": 1 / 2}, 2),
            "sw": ({"accuracy": 0.0}, 1),
        }
    )
    assert combined == {
        "accuracy_en": 3 / 4,
        "accuracy_de": 1 / 2,
        "accuracy_sw": 0.0,
        "accuracy_mean": pytest.approx(float((Fraction(3, 4) + Fraction(1, 2)) / 3), abs=1e-15),
        "accuracy_joint": pytest.approx(4 / 7, abs=1e-15),
    }


def test_joint_accuracy_is_that_of_all_examples_together():
    """A joint value that is not what scoring one joint set gives."""
    drawn = {name: draw_classes(seed, number=10 + 7 * seed) for seed, name in enumerate("abc")}
    parts = {
        name: ({"accuracy": score("accuracy", *pair)}, len(pair[0])) for name, pair in drawn.items()
    }
    labels, predictions = (
        [value for pair in drawn.values() for value in pair[side]] for side in (0, 1)
    )
    together = score("accuracy", labels, predictions)
    assert combine_parts(parts)["accuracy_joint"] == pytest.approx(together, abs=1e-12)


def test_one_language_that_is_left():
    """A score of a cross-lingual task has another name where one language is there."""
    assert combine_parts({"en": ({"f1": 0.5, "exact_match": 0.25}, 3)}) == {
        "f1_en": 0.5, "exact_match_en": 0.25,
        "f1_mean": 0.5, "exact_match_mean": 0.25,
        "f1_joint": 0.5, "exact_match_joint": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("task", "parts", "wrong"),
    [
        (make_task("accuracy", score="accuracy_matched"), ["matched", "mismatched"], None),
        (make_task("accuracy", score="accuracy_matched"), ["mismatched"], "score=accuracy_matched"),
        (make_task("accuracy", "f1", score="f1"), [""], None),
        (make_task("accuracy", score="f1"), [""], "score=f1"),
        (make_task("accuracy", score="accuracy_mean"), [""], "score=accuracy_mean"),
        (make_task("mlqa", kind="spans", score="f1_mean", select="f1_en"), ["de", "en"], None),
        (make_task("mlqa", kind="spans", score="f1_mean", select="f1_en"), ["de"], "select=f1_en"),
        (make_task("squad_v2", kind="spans", score="f1"), [""], None),
        (make_task("squad", kind="spans", score="squad"), [""], "score=squad"),
    ],
)
def test_score_that_will_not_be_measured(task, parts, wrong):
    """A KeyError after the first epoch."""
    if wrong is None:
        check_score_names("mine", task, parts)
        return
    with pytest.raises(ExperimentError) as caught:
        check_score_names("mine", task, parts)
    assert f"tasks.mine.{wrong} is not among what is measured: " in str(caught.value)
    measured = str(caught.value).split("measured: ")[1].split(", ")
    values = ["exact_match", "f1"] if task.kind == "spans" else task.metrics
    assert set(measured) == set(combine_parts({p: (dict.fromkeys(values, 0.0), 1) for p in parts}))


# Answers


def make_questions(*golds):
    answers = [{"text": list(texts), "answer_start": [0] * len(texts)} for texts in golds]
    return Examples(Dataset.from_dict({"answers": answers}), "")


@pytest.mark.parametrize(
    ("metric", "part", "expected"),
    [
        # "the cat" is "cat" for SQuAD; "el gato" is "gato" for MLQA in Spanish only.
        ("squad", "", {"exact_match": 1 / 2, "f1": 1 / 2 + (2 / 3) / 2}),
        ("mlqa", "es", {"exact_match": 1 / 2, "f1": (2 / 3) / 2 + 1 / 2}),
        ("mlqa", "en", {"exact_match": 1 / 2, "f1": 1 / 2 + (2 / 3) / 2}),
    ],
)
def test_answers_are_scored_by_the_rules_of_their_language(metric, part, expected):
    """MLQA scored with English articles throughout."""
    examples = make_questions(["cat", "dog"], ["el gato"])
    answers = [Answer("the cat", 0.0), Answer("gato", 0.0)]
    task = make_task(metric, kind="spans", score="f1")
    found = score_part("mine", task, part, examples, answers)
    assert found == {name: pytest.approx(value, abs=1e-12) for name, value in expected.items()}
    check_labels("mine", task, part, examples)


def test_unanswerable_questions_are_scored():
    """An empty gold answer that no prediction can match."""
    examples = make_questions(["a cat"], [])
    answers = [Answer("cat", -1.0), Answer("", 1.0)]
    scores = score_part("mine", make_task("squad_v2", kind="spans"), "", examples, answers)
    assert (scores["exact_match"], scores["f1"]) == (1.0, 1.0)


def test_tasks_of_the_corpus_are_scored_too():
    """The task without settings for its metrics has none."""
    task = NextPassage(version=1, num_train=8, num_validation=8, passage_characters=10)
    assert score_part("mine", task, "", make_examples([0, 1]), [0, 0]) == {"accuracy": 0.5}
