"""What a task hands to fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """Two texts and a class."""

    first: str
    second: str
    label: int


@dataclass(frozen=True)
class TaskData:
    """Examples to train on and to score on; no document is in both."""

    train: list[Example]
    validation: list[Example]
