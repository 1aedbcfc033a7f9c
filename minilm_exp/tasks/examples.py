"""What a task hands to fine-tuning: tables with the same columns for every data set."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset


@dataclass(frozen=True)
class Examples:
    """Examples of one split.

    Classification and regression have the columns `first`, `second` (of pairs) and `label`; spans
    have `id`, `question`, `context` and `answers`, as SQuAD has on the hub; generation has `source`
    and `target`.
    """

    rows: Dataset
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    def at_most(self, number: int | None) -> Examples:
        """So many examples at even distances, or all."""
        if number is None or number >= len(self):
            return self
        chosen = [index * len(self) // number for index in range(number)]
        return Examples(self.rows.select(chosen), f"{self.fingerprint} {number}")


def part_name(split: str, part: str) -> str:
    """One name for a part of a split: test_de, or test for the only part."""
    return f"{split}_{part}" if part else split


@dataclass(frozen=True)
class TaskData:
    """Examples to train on (none of similarity) and to score on.

    The parts to score on are named by their split's suffix (matched) or their language; the only
    one of a task has the name "". `label_names` are those of a task whose labels are names.
    """

    train: Examples
    validation: dict[str, Examples]
    test: dict[str, Examples]
    num_labels: int
    label_names: list[str] | None = None

    @property
    def fingerprint(self) -> str:
        """Names the content of all parts."""
        parts = [self.train, *self.validation.values(), *self.test.values()]
        return " ".join(part.fingerprint for part in parts)
