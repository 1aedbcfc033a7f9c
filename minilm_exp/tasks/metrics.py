"""Scores of classification, regression, cut-out answers and written texts, as fractions of 1."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import numpy
from scipy import stats
from sklearn import metrics

from minilm_exp.errors import ExperimentError
from minilm_exp.task_settings import SPAN_VALUES, AnyTask, Task
from minilm_exp.tasks.answers import mlqa_scores, squad_scores, squad_v2_scores
from minilm_exp.tasks.examples import Examples
from minilm_exp.tasks.spans import Answer
from minilm_exp.tasks.text_scores import has_wordnet, text_scores


def score_part(
    name: str, task: AnyTask, part: str, examples: Examples, predictions: list[Any]
) -> dict[str, float]:
    """Every metric of a task on one of its parts.

    Args:
        name: The task's name, for messages.
        task: Names the metrics.
        part: The name of the part; of a cross-lingual task, its language.
        examples: With the right answers.
        predictions: Classes, numbers, `Answer`s or texts, one for each example.

    Raises:
        ExperimentError: A metric is not defined for these values.
    """
    if task.kind == "spans":
        golds = [answers["text"] for answers in examples.rows["answers"][:]]
        return _span_scores(task.metrics, part, golds, predictions)
    if task.kind == "generation":
        return text_scores(task.metrics, examples.rows["target"][:], predictions)
    check_labels(name, task, part, examples)
    labels = numpy.asarray(examples.rows["label"][:])
    scores = {}
    for metric in task.metrics:
        value = float(_METRICS[metric](labels, numpy.asarray(predictions)))
        if not math.isfinite(value):
            raise ExperimentError(
                f"{metric} of {name} is not defined: all {len(labels)} predictions"
                f" {_of(part)}are {predictions[0]}; train otherwise (task_training.learning_rate,"
                " .epochs)"
            )
        scores[metric] = value
    return scores


def check_labels(name: str, task: AnyTask, part: str, examples: Examples) -> None:
    """Refuses labels for which a metric of the task is not defined, so before anything is trained.

    Raises:
        ExperimentError: All labels are the same, and not accuracy alone is asked for.
    """
    undefined = [metric for metric in task.metrics if metric != "accuracy"]
    if (
        task.kind in ("spans", "generation")
        or not undefined
        or len(set(examples.rows["label"][:])) > 1
    ):
        return
    advice = ["give data with several"]
    if (
        isinstance(task, Task)
        and not task.validation
        and not (task.files and task.files.validation)
    ):
        advice.append(f"raise tasks.{name}.held_out_fraction")
    if task.kind == "classification":
        advice.append(f"set tasks.{name}.metrics=[accuracy] and tasks.{name}.score=accuracy")
    raise ExperimentError(
        f"{undefined[0]} of {name} is not defined: all {len(examples)} labels {_of(part)}are"
        f" {examples.rows['label'][0]}; {', or '.join(advice)}"
    )


def check_score_names(name: str, task: AnyTask, parts: Iterable[str]) -> None:
    """Refuses a score that will not be measured, before anything is trained.

    Args:
        name: The task's name.
        task: The task.
        parts: Names of its validation parts.

    Raises:
        ExperimentError: Names what will be measured.
    """
    values = SPAN_VALUES if task.kind == "spans" else tuple(task.metrics)
    if task.kind == "generation":
        values = tuple(name for name in values if name != "meteor" or has_wordnet())
    measured = set(combine_parts({part: (dict.fromkeys(values, 0.0), 1) for part in parts}))
    for setting, value in (("score", task.score), ("select", task.selected_by)):
        if value not in measured:
            raise ExperimentError(
                f"tasks.{name}.{setting}={value} is not among what is measured:"
                f" {', '.join(sorted(measured))}"
            )


def _of(part: str) -> str:
    return f"of {part} " if part else ""


def _span_scores(
    names: list[str], part: str, golds: list[list[str]], answers: list[Answer]
) -> dict[str, float]:
    texts = [answer.text for answer in answers]
    scores: dict[str, float] = {}
    for name in names:
        if name == "squad_v2":
            scores |= squad_v2_scores(texts, golds, [answer.null_score for answer in answers])
        elif name == "mlqa":
            scores |= mlqa_scores(texts, golds, part)
        else:
            scores |= squad_scores(texts, golds)
    return scores


def combine_parts(parts: dict[str, tuple[dict[str, float], int]]) -> dict[str, float]:
    """One flat set of values: `metric_part` for each part, and two means over several parts.

    `metric_mean` weighs each part alike, `metric_joint` each example (the papers' joint development
    set of all languages).

    Args:
        parts: Scores and number of examples of each part; the only part may be called "".
    """
    flat = {
        f"{metric}_{part}" if part else metric: value
        for part, (scores, _) in parts.items()
        for metric, value in scores.items()
    }
    everywhere = set.intersection(*(set(scores) for scores, _ in parts.values()))
    if "" not in parts:
        total = sum(number for _, number in parts.values())
        for metric in sorted(everywhere):
            values = [(scores[metric], number) for scores, number in parts.values()]
            flat[f"{metric}_mean"] = statistics.fmean(value for value, _ in values)
            flat[f"{metric}_joint"] = sum(value * number for value, number in values) / total
    return flat


def _correlation(correlate: Callable[..., Any]) -> Callable[[numpy.ndarray, numpy.ndarray], float]:
    def correlation(labels: numpy.ndarray, predictions: numpy.ndarray) -> float:
        if len(set(predictions.tolist())) < 2:
            return math.nan
        return float(correlate(labels, predictions).statistic)

    return correlation


# What scikit-learn leaves to choose: a class that is never predicted counts 0 in the macro means
# (TweetEval), and so does Matthews' coefficient where all predictions agree (GLUE).
_METRICS: dict[str, Callable[[numpy.ndarray, numpy.ndarray], float]] = {
    "accuracy": metrics.accuracy_score,
    "f1": functools.partial(metrics.f1_score, pos_label=1, average="binary", zero_division=0),
    "macro_f1": functools.partial(metrics.f1_score, average="macro", zero_division=0),
    "macro_recall": functools.partial(metrics.recall_score, average="macro", zero_division=0),
    "matthews": metrics.matthews_corrcoef,
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}
