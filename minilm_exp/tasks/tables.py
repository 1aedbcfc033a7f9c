"""Columns of the splits of a task, read as plain values."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from datasets import load_dataset
from pyarrow import parquet

from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.task_settings import Task
from minilm_exp.tasks.splits import Split, not_to_be_had


@dataclass(frozen=True)
class Table:
    """The columns that a task needs of one split, as plain values."""

    split: Split
    columns: dict[str, list[Any]]
    sizes: list[tuple[str, int]]

    def place(self, row: int) -> str:
        """Where a row stands, for messages."""
        for name, size in self.sizes:
            if row < size:
                return f"{name}, row {row + 1}"
            row -= size
        raise IndexError(row)


def read_table(task: Task, split: Split) -> Table:
    """The columns that a task needs of a split.

    Raises:
        ExperimentError: A file cannot be read, a column is missing, or there are no rows.
    """
    needed = ["id", "question", "context", "answers"]
    learnt = "label_column" if task.kind != "generation" else "target_column"
    if task.kind != "spans":
        needed = list(dict.fromkeys([*task.text_columns, getattr(task, learnt)]))
    values: dict[str, list[Any]] = {column: [] for column in needed}
    sizes = []
    for name, part in _read_parts(split, needed):
        if not part.size:
            continue
        times = Counter(part.names)
        wrong = [column for column in needed if times[column] != 1]
        if wrong:
            what = "no column" if not times[wrong[0]] else "more than one column"
            setting = split.setting.split(".files")[0]
            raise ExperimentError(
                f"{name} has {what} {', '.join(wrong)}; it has {', '.join(times)[:300]}"
                + (
                    f": set {setting}.text_columns and .{learnt}"
                    if task.kind != "spans"
                    else ", but answers are cut from the columns id, question, context and"
                    " answers{text,answer_start}"
                )
            )
        for column in needed:
            values[column] += part.columns[column]
        sizes.append((name, part.size))
    if not sizes:
        raise ExperimentError(f"{split} is empty: {split.setting} needs examples in it")
    return Table(split, values, sizes)


@dataclass(frozen=True)
class _Part:
    """Names of all columns of a file, and the values of those that are needed."""

    names: list[str]
    columns: dict[str, list[Any]]
    size: int


def _read_parts(split: Split, needed: list[str]) -> Iterable[tuple[str, _Part]]:
    """Each file, or the split of a hub data set, and its name for messages."""
    for path in split.files:
        try:
            part = _read_file(path, needed)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise ExperimentError(
                f"{split.setting}: {path} cannot be read: {reason_of(error)}"
            ) from error
        yield str(path), part
    if not split.files:
        try:
            dataset = load_dataset(
                split.hub_id,
                split.hub_config,
                data_dir=split.hub_folder,
                split=split.split,
                revision=split.commit,
            )
        except Exception as error:  # the loader raises many kinds
            name = split.setting.removeprefix("tasks.")
            raise ExperimentError(not_to_be_had(name, split.hub_id, split.folder, error)) from error
        yield str(split), _from_arrow(dataset.with_format("arrow")[:], needed)


def _read_file(path: Path, needed: list[str]) -> _Part:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _from_arrow(parquet.ParquetFile(path).read(), needed)
    if kind not in (".csv", ".jsonl"):
        raise ValueError("it is neither .csv nor .jsonl nor .parquet")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8; save it as UTF-8") from error
    return _read_csv(text) if kind == ".csv" else _read_jsonl(text)


def _from_arrow(table: pyarrow.Table, needed: list[str]) -> _Part:
    names = table.column_names
    columns = {
        name: column.to_pylist() for name, column in zip(names, table.columns) if name in needed
    }
    return _Part(names, columns, len(table))


def _read_csv(text: str) -> _Part:
    """By Python's reader, which leaves numbers, dates and NA the text that they are."""
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    line = 1
    try:
        for row in lines:
            if row and rows and len(row) != len(rows[0]):
                raise ValueError(
                    f"line {line} has {len(row)} values where the header has {len(rows[0])};"
                    " put a text with commas or line breaks in double quotes"
                )
            if row:
                rows.append(row)
            line = lines.line_num + 1
    except csv.Error as error:
        raise ValueError(f"the row that begins in line {line}: {error}") from error
    names = rows.pop(0) if rows else []
    return _Part(names, dict(zip(names, map(list, zip(*rows)))), len(rows))


def _read_jsonl(text: str) -> _Part:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is too deep"
            raise ValueError(f"line {number} is not JSON: {reason}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object; each line must be one")
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _Part(names, {name: [row.get(name) for row in rows] for name in names}, len(rows))
