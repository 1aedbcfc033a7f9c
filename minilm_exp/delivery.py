"""What is made of a finished run: exports, the model card, the report, a push to the hub.

None of it is part of the run's result. A finished run gets what it lacks without being trained
again, and what goes wrong here leaves it finished.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.model_card import is_card_of, write_model_card
from minilm_exp.pushing import check_push, push
from minilm_exp.redaction import redact
from minilm_exp.report_page import REPORT
from minilm_exp.result import Result
from minilm_exp.run_exports import make_exports
from minilm_exp.run_report import write_run_report
from minilm_exp.settings import Settings
from minilm_exp.tasks.splits import Splits
from minilm_exp.tracking import Tracker, open_tracker

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        precision: fp32 or bf16.
        fingerprints: Of the content behind every input path, see `run_key`.
        splits: Where the data of its tasks are.
    """

    precision: str
    fingerprints: dict[str, str]
    splits: dict[str, Splits]


def deliver(settings: Settings, inputs: Inputs, result: Result) -> None:
    """Makes what is asked for and not yet there.

    Args:
        settings: The run.
        inputs: What it read.
        result: Of the run, which has finished; is written again.

    Raises:
        ExperimentError: Something of it cannot be made; the run stays finished.
    """
    models = _models(settings, Path(result.folder))
    lacks_card = not all(is_card_of(model, result) for model in models)
    lacks_report = settings.report and not _has_report(Path(result.folder))
    if not (lacks_card or lacks_report or settings.export or settings.push_to):
        return
    tracker = open_run(settings.tracking.uri, result)
    failed = None
    try:
        make_exports(settings, inputs.fingerprints, inputs.splits, result, tracker)
    except ExperimentError as error:
        failed = error  # what can be had without them comes first
    cards = [model for model in models if not is_card_of(model, result)]
    for model in cards:
        write_model_card(model, settings, result, models[model])
        if tracker is not None:
            tracker.log_artifact(model / "README.md", str(model.relative_to(result.folder)))
    if cards:
        # The repository has what was there before.
        result.pushed_to = None
        result.write()
        if tracker is not None:
            tracker.log_artifact(Path(result.folder) / "result.json")
    if settings.report and not _has_report(Path(result.folder)):
        try:
            report = write_run_report(settings, result, tracker)
            if tracker is not None:
                tracker.log_artifact(report)
        except Exception as error:  # nobody asked for it by name
            _log.warning("there is no report: %s", redact(reason_of(error)))
    if failed is not None:
        raise failed
    if settings.push_to not in (None, result.pushed_to):
        _publish(settings, models, result, tracker)


def _publish(
    settings: Settings, models: dict[Path, str | None], result: Result, tracker: Tracker | None
) -> None:
    assert settings.push_to is not None
    check_push(settings.push_to)
    url = _push(settings, models, result)
    report = Path(result.folder) / REPORT
    was_new = settings.report and _has_report(Path(result.folder))
    result.pushed_to = settings.push_to
    result.write()
    if was_new:
        report.touch()  # it does not say where the student was pushed
    if tracker is not None:
        tracker.set_tags({"pushed_to": url})
        tracker.log_artifact(Path(result.folder) / "result.json")


def check_delivery(settings: Settings) -> None:
    """Before training, whether what is asked for can be made afterwards, as far as that is known.

    Raises:
        ExperimentError: It cannot.
    """
    if settings.push_to is not None:
        check_push(settings.push_to)


def _models(settings: Settings, folder: Path) -> dict[Path, str | None]:
    """The student and what it became on each task where that was kept, with the task's name."""
    models: dict[Path, str | None] = {folder / "student": None}
    if settings.recipe.keep_models:
        models |= {folder / "models" / f"{name}-student": name for name in settings.tasks}
    return {model: task for model, task in models.items() if model.is_dir()}


def _push(settings: Settings, models: dict[Path, str | None], result: Result) -> str:
    """The model that the run is for, see `Settings.pushes_task_model`."""
    assert settings.push_to is not None
    for model, task in models.items():
        if (task is not None) == settings.pushes_task_model:
            exports = Path(result.folder) / "exports" / (task or "student")
            url = push(settings.push_to, model, exports if exports.is_dir() else None)
            _log.info("pushed to %s (a new repository is private)", url)
            return url
    raise ExperimentError(f"push_to={settings.push_to}: {result.folder} has no student")


def _has_report(folder: Path) -> bool:
    """Whether there is one that was made of the result as it is now."""
    report = folder / REPORT
    made_of = (folder / "result.json").stat().st_mtime_ns
    return report.is_file() and report.stat().st_mtime_ns >= made_of


def open_run(uri: str, result: Result) -> Tracker | None:
    """Writes to the run's MLflow run; None where the store has lost it."""
    try:
        return open_tracker(uri, result.run_id)
    except ExperimentError as error:
        _log.warning("what is made of the run is not recorded in MLflow: %s", error)
        return None
