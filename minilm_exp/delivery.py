"""What is made of a finished run: the model card of its student, and the report.

None of it is part of the run's result. A finished run gets what it lacks without being trained
again, and what goes wrong here leaves it finished.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from minilm_exp.errors import ExperimentError
from minilm_exp.model_card import write_model_card
from minilm_exp.report_page import REPORT
from minilm_exp.result import Result
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
        ExperimentError: Something of it cannot be made.
    """
    student = Path(result.folder) / "student"
    lacks_card = student.is_dir() and not (student / "README.md").is_file()
    lacks_report = settings.report and not _has_report(Path(result.folder))
    if not (lacks_card or lacks_report):
        return
    tracker = open_run(settings.tracking.uri, result)
    if lacks_card:
        write_model_card(student, settings, result)
        if tracker is not None:
            tracker.log_artifact(student / "README.md", "student")
    if lacks_report:
        report = write_run_report(settings, result, tracker)
        if tracker is not None:
            tracker.log_artifact(report)


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
