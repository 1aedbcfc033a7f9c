"""What is made of a finished run: the model card of its student.

None of it is part of the run's result. A finished run gets what it lacks without being trained
again, and what goes wrong here leaves it finished.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from minilm_exp.errors import ExperimentError
from minilm_exp.model_card import write_model_card
from minilm_exp.result import Result
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
    if not student.is_dir() or (student / "README.md").is_file():
        return
    tracker = _tracker(settings, result)
    write_model_card(student, settings, result)
    if tracker is not None:
        tracker.log_artifact(student / "README.md", "student")


def _tracker(settings: Settings, result: Result) -> Tracker | None:
    """Of the run; None where the store has lost it."""
    try:
        return open_tracker(settings.tracking.uri, result.run_id)
    except ExperimentError as error:
        _log.warning("what is made of the run is not recorded in MLflow: %s", error)
        return None
