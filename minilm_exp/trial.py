"""A run's place in a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """What ties a run to the sweep that it is a trial of.

    Attributes:
        parent_id: The MLflow run of the sweep.
        tags: For the MLflow run of this trial.
        started: Is told the id of the MLflow run.
    """

    parent_id: str
    tags: dict[str, str]
    started: Callable[[str], None]
