"""A few settings compared by short runs, before the whole budget goes into one of them."""

from __future__ import annotations

import logging
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table

from minilm_exp.corpus import fingerprint_corpus, prepare_corpus
from minilm_exp.errors import ExperimentError
from minilm_exp.pipeline import run_experiment
from minilm_exp.result import Result
from minilm_exp.settings import Settings
from minilm_exp.sizing import settings_of
from minilm_exp.task_settings import NextPassage
from minilm_exp.tasks.next_passage import make_next_passage
from minilm_exp.teacher import load_tokenizer
from minilm_exp.tracking import tag_run

_log = logging.getLogger(__name__)
# Of the task that stands in where the run has none.
_PROXY = {"version": 1, "num_train": 400, "num_validation": 400, "passage_characters": 100}
# Of the run's own tasks in a short run.
_TASK_EXAMPLES = 1000
_FEWEST_STEPS = 10


@dataclass(frozen=True)
class Variant:
    """One of the settings that are compared.

    Attributes:
        name: What is different.
        changes: Settings by name.
        width: Hidden size of the student, where it is another one.
        losses_compare: Whether its validation loss means the same as that of the first.
    """

    name: str
    changes: dict[str, Any]
    width: int | None = None
    losses_compare: bool = True


def search(
    config: DictConfig, settings: Settings, teacher_was_chosen: bool, typed: Container[str]
) -> Settings:
    """The settings of the best of a few variants; itself where nothing is to be searched.

    The settings by the papers' rules come first; then a student as wide as the teacher, the other
    of the papers' teacher layers, and twice the learning rate, each changed by itself where it
    differs and is not given on the command line. All of them together have
    student.budget.search_share of training.max_steps. The best has the highest mean score on the
    run's tasks, or on `next_passage` where it has none; without held-out documents for that, the
    lowest validation loss of those that compare. Each is a run of its own in MLflow (tag
    `quick_search`), which is found again when the command is repeated.

    Args:
        config: Of which the settings are.
        settings: The run, its shape chosen.
        teacher_was_chosen: See `parse`.
        typed: See `parse`.

    Raises:
        ExperimentError: There is nothing to compare by short runs, or one of them fails.
    """
    budget = settings.student.budget
    if budget.search == "none":
        return settings
    if not settings.corpus_stages:
        raise ExperimentError(
            f"student.budget.search=quick compares short distillations on the corpus, and"
            f" recipe={settings.recipe.name} has none: set student.budget.search=none"
        )
    proxy = None if settings.tasks else _proxy(settings)
    has_score = bool(settings.tasks) or proxy is not None
    variants = [v for v in _variants(settings, typed) if has_score or v.losses_compare]
    steps = int(budget.search_share * settings.training.max_steps / len(variants))
    if steps < _FEWEST_STEPS:
        raise ExperimentError(
            f"student.budget.search_share={budget.search_share} of"
            f" training.max_steps={settings.training.max_steps} gives each of {len(variants)}"
            f" variants {steps} steps, fewer than {_FEWEST_STEPS}: raise one of them, or set"
            " student.budget.search=none"
        )
    _log.info(
        "student.budget.search=quick: %d variants of %d steps, compared by %s",
        len(variants), steps,
        ", ".join(settings.tasks) or ("next_passage" if has_score else "validation loss alone"),
    )  # fmt: skip
    results = []
    for variant in variants:
        given = _changed(config, variant.changes | _short(settings, steps, proxy))
        short = settings_of(given, teacher_was_chosen, typed, variant.width)
        short.notes.clear()
        result = run_experiment(short)
        assert isinstance(result, Result)
        tag_run(settings.tracking.uri, result.run_id, {"quick_search": variant.name})
        results.append(result)
    best = max(range(len(variants)), key=lambda number: results[number].score or 0.0)
    _print(variants, results, best)
    chosen = variants[best]
    found = settings_of(_changed(config, chosen.changes), teacher_was_chosen, typed, chosen.width)
    found.notes.append(f"student.budget.search=quick: {chosen.name} was best of {len(variants)}")
    return found


def _variants(settings: Settings, typed: Container[str]) -> list[Variant]:
    teacher, student = settings.teacher, settings.student
    found = [Variant("by the papers' rules", {})]
    meets = {row["hidden_size"] for row in settings.candidates if row["meets_budget"]}
    if student.hidden_size != teacher.hidden_size and teacher.hidden_size in meets:
        found.append(Variant("as wide as the teacher", {}, teacher.hidden_size, False))
    layer = settings.layer_selection.teacher_layer
    other = teacher.num_layers if layer != teacher.num_layers else teacher.upper_middle_layer
    is_free = not {"layer_selection", "layer_selection.teacher_layer"} & {*_names(typed)}
    if settings.objective.reads_relation_set and other != layer and is_free:
        changes = {"layer_selection.teacher_layer": other}
        found.append(Variant(f"teacher layer {other}", changes, None, False))
    if "training.learning_rate" not in typed:
        rate = 2 * settings.training.learning_rate
        found.append(Variant(f"learning rate {rate:g}", {"training.learning_rate": rate}))
    return found


def _names(typed: Container[str]) -> list[str]:
    return [n for n in ("layer_selection", "layer_selection.teacher_layer") if n in typed]


def _short(settings: Settings, steps: int, proxy: dict[str, int] | None) -> dict[str, Any]:
    """What makes a short run of one."""
    training = settings.training
    changes: dict[str, Any] = {
        "training.max_steps": steps,
        "training.warmup_steps": min(training.warmup_steps, steps // 10),
        "training.evaluation_steps": steps,
        "recipe.models": ["student"],
        "recipe.keep_models": False,
        "export": [],
        "push_to": None,
        "report": False,
    }
    if settings.tasks:
        given = settings.task_training.max_train_examples or _TASK_EXAMPLES
        changes["task_training.max_train_examples"] = min(given, _TASK_EXAMPLES)
    elif proxy is not None:
        changes["tasks.next_passage"] = proxy
    return changes


def _proxy(settings: Settings) -> dict[str, int] | None:
    """A task made from the held-out text, where that has passages enough."""
    if settings.corpus.pretokenized:
        return None
    corpus = prepare_corpus(
        settings, load_tokenizer(settings.teacher), fingerprint_corpus(settings.corpus)
    )
    try:
        make_next_passage(corpus.held_out_documents(), NextPassage(**_PROXY))
    except ExperimentError:
        return None
    return _PROXY


def _changed(config: DictConfig, changes: dict[str, Any]) -> DictConfig:
    given = config.copy()
    with open_dict(given):
        # What has just been measured counts for all of them.
        given.student.budget.remeasure = False
        for name, value in changes.items():
            OmegaConf.update(given, name, value, merge=False)
    return given


def _print(variants: list[Variant], results: list[Result], best: int) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("quick search")
    tasks = list(results[0].scores)
    for heading in ("validation loss", *tasks, ""):
        table.add_column(heading, justify="right")
    for number, (variant, result) in enumerate(zip(variants, results)):
        loss = result.validation_loss
        shown = "-" if loss is None else f"{loss:.4f}{'' if variant.losses_compare else ' *'}"
        scores = [f"{result.scores[task]:.3f}" for task in tasks]
        table.add_row(variant.name, shown, *scores, "chosen" if number == best else "")
    console = Console(markup=False)
    console.print()
    console.print(table)
    if not all(variant.losses_compare for variant in variants):
        console.print("* does not compare with the first: other relations, or another start")
    console.print()
