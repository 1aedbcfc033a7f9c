"""Examples of downstream tasks, checked."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import xxhash
from datasets import Dataset

from minilm_exp.errors import ExperimentError
from minilm_exp.provenance import fingerprint_text
from minilm_exp.task_settings import Task
from minilm_exp.tasks.examples import Examples, TaskData
from minilm_exp.tasks.splits import Splits
from minilm_exp.tasks.tables import Table, read_table

_WHOLE_NUMBER = re.compile(r"0|-?[1-9]\d{0,17}")


def load_task(name: str, task: Task, splits: Splits) -> TaskData:
    """Reads and checks the data of a task.

    Without a validation split, the examples whose text has a low hash are held out from the
    training split, so that equal texts stay on one side.

    csv and jsonl are read as UTF-8. All values of a csv file are text, whatever they look like;
    labels that are whole numbers throughout, and those of a regression, are taken as numbers. A
    text that is missing is refused; one of a pair may be empty (as in QQP), but not both, nor a
    text that stands alone.

    Raises:
        ExperimentError: A column is missing, a label is out of range, a split is empty.
    """
    sources = {} if splits.train is None else {"train": splits.train}
    sources |= {f"validation/{part}": split for part, split in splits.validation.items()}
    sources |= {f"test/{part}": split for part, split in splits.test.items()}
    tables = {key: read_table(task, split) for key, split in sources.items()}
    label_names = None
    num_labels = 1
    if task.kind == "spans":
        convert: Callable[[Task, Table], dict[str, list[Any]]] = _spans
    elif task.kind == "generation":
        convert = _sources_and_targets
    elif task.kind in ("regression", "similarity"):
        convert = functools.partial(_labelled, convert_label=_number)
    else:
        label_names = _label_names(name, task, tables["train"])
        num_labels = len(label_names) if label_names is not None else task.num_labels or 1
        if "f1" in task.metrics and num_labels != 2:
            raise ExperimentError(
                f"tasks.{name}.metrics={task.metrics}: f1 is that of the second of two classes, but"
                f" there are {num_labels}; use macro_f1"
            )
        numbers = None if label_names is None else {n: i for i, n in enumerate(label_names)}
        convert = functools.partial(
            _labelled,
            convert_label=functools.partial(_class, num_labels=num_labels, numbers=numbers),
        )
    examples = {}
    for key, table in tables.items():
        columns = convert(task, table)
        # Of what is read, not of the file: the settings say which columns of it.
        examples[key] = Examples(Dataset.from_dict(columns), fingerprint_text(repr(columns)))
    train = examples.get("train", Examples(Dataset.from_dict({}), ""))
    validation = {part: examples[f"validation/{part}"] for part in splits.validation}
    if not validation:
        train, held_out = _hold_out(name, train, task.held_out_fraction)
        validation = {"": held_out}
    test = {part: examples[f"test/{part}"] for part in splits.test}
    return TaskData(train, validation, test, num_labels, label_names)


def _texts(table: Table, column: str) -> list[str]:
    texts = []
    for row, value in enumerate(table.columns[column]):
        if value is None:
            raise ExperimentError(f"{table.place(row)}: {column} is missing")
        text = str(value) if type(value) is int else value
        if not isinstance(text, str):
            raise ExperimentError(
                f"{table.place(row)}: {column}={value!r:.100} is no text; see {table.split.setting}"
            )
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can hold half a character
            raise ExperimentError(
                f"{table.place(row)}: {column}={value!r:.100} is no Unicode text"
            ) from None
        texts.append(text)
    return texts


def _labelled(
    task: Task, table: Table, convert_label: Callable[[Any], Any]
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        name: _texts(table, column) for name, column in zip(("first", "second"), task.text_columns)
    }
    for row, texts in enumerate(zip(*columns.values())):
        if not any(text.strip() for text in texts):
            raise ExperimentError(
                f"{table.place(row)}: {' and '.join(task.text_columns)}: the text is empty; leave"
                " this row out"
            )
    labels = []
    for row, value in enumerate(table.columns[task.label_column]):
        _check_is_there(task, table, row, value)
        try:
            labels.append(convert_label(value))
        except ValueError as error:
            is_hidden = task.files is None and value == -1
            hidden = " (the hub hides the labels of this split)" if is_hidden else ""
            raise ExperimentError(
                f"{table.place(row)}: {task.label_column}={value!r:.100} {error}{hidden}; see"
                f" {table.split.setting.split('.files')[0]}"
            ) from None
    return columns | {"label": labels}


def _check_is_there(task: Task, table: Table, row: int, label: Any) -> None:
    if label is None or (isinstance(label, str) and not label.strip()):
        raise ExperimentError(f"{table.place(row)}: {task.label_column} is missing")


def _number(value: Any) -> float:
    """Also of text, as which csv files have it."""
    try:
        number = float(value) if type(value) in (int, float, str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("is not a finite number")
    return number


def _is_number(value: Any) -> bool:
    try:
        _number(value)
    except ValueError:
        return False
    return True


def _class(value: Any, num_labels: int, numbers: dict[str, int] | None) -> int:
    if numbers is not None:
        if str(value) in numbers:
            return numbers[str(value)]
        raise ValueError(f"is none of the training file's labels {', '.join([*numbers][:20])}")
    if isinstance(value, int) and 0 <= value < num_labels:
        return int(value)
    raise ValueError(f"is not one of 0..{num_labels - 1}")


def _label_names(name: str, task: Task, train: Table) -> list[str] | None:
    """Of the user's files: the labels as text, in order; None for a data set of the hub."""
    distinct: dict[Any, int] = {}
    kinds: dict[tuple[type, bool], Any] = {}
    for row, value in enumerate(train.columns[task.label_column]):
        _check_is_there(task, train, row, value)
        if not isinstance(value, (str, int, float)) or value != value:
            raise ExperimentError(
                f"{train.place(row)}: {task.label_column}={value!r:.100} is no name or number; see"
                f" tasks.{name}.label_column"
            )
        distinct.setdefault(value, row)
        kinds.setdefault((type(value), _is_number(value)), value)
    if len(kinds) > 1:
        raise ExperimentError(
            f"{train.split}: {task.label_column} has values of several kinds"
            f" ({', '.join(repr(value) for value in kinds.values())}); write all of them alike"
        )
    where = f"{train.split}: {task.label_column} has"
    if len(distinct) < 2:
        raise ExperimentError(
            f"{where} one label only ({next(iter(distinct))}); tasks.{name} needs at least 2"
        )
    if task.files is None:
        return None
    labels = list(distinct)
    if all(isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value) for value in labels):
        labels = [int(value) for value in labels]
    names = [str(value) for value in sorted(labels)]
    if task.num_labels is None:
        return names
    if all(type(value) is int for value in labels):
        names = [str(value) for value in range(task.num_labels)]
        for value, row in distinct.items():
            if str(value) not in names:
                raise ExperimentError(
                    f"{train.place(row)}: {task.label_column}={value} is not one of"
                    f" 0..{task.num_labels - 1}; see tasks.{name}.num_labels (null: as many labels"
                    " as there are)"
                )
    if len(names) != task.num_labels:
        raise ExperimentError(
            f"{where} {len(names)} labels ({', '.join(names[:20])});"
            f" tasks.{name}.num_labels={task.num_labels} (null: as many as there are)"
        )
    return names


def _sources_and_targets(task: Task, table: Table) -> dict[str, list[Any]]:
    assert task.target_column is not None
    columns = {"source": task.text_columns[0], "target": task.target_column}
    texts: dict[str, list[Any]] = {name: _texts(table, columns[name]) for name in columns}
    for name, column in columns.items():
        for row, text in enumerate(texts[name]):
            if not text.strip():
                raise ExperimentError(
                    f"{table.place(row)}: {column} is empty, so there is nothing to"
                    f" {'read' if name == 'source' else 'write'}; leave this row out"
                )
    return texts


def _spans(task: Task, table: Table) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        column: _texts(table, column) for column in ("id", "question", "context")
    }
    seen: set[str] = set()
    answers = []
    for row, (key, context, answer) in enumerate(
        zip(columns["id"], columns["context"], table.columns["answers"])
    ):
        if key in seen:
            raise ExperimentError(
                f"{table.place(row)}: the id {key} stood there before; predictions are kept by id"
            )
        seen.add(key)
        if not context.strip():
            raise ExperimentError(f"{table.place(row)}: context is empty; leave this row out")
        texts, starts = _answers(answer)
        if texts is None or starts is None or len(texts) != len(starts):
            raise ExperimentError(
                f"{table.place(row)}: answers={answer!r:.100} must be {{text, answer_start}}, lists"
                " of as many texts as whole numbers"
            )
        if "squad_v2" not in task.metrics and not any(text.strip() for text in texts):
            raise ExperimentError(
                f"{table.place(row)}: the question has no answer; use task=squad_v2 for data with"
                " unanswerable questions"
            )
        answers.append({"text": texts, "answer_start": starts})
    return columns | {"answers": answers}


def _answers(answer: Any) -> tuple[list[str] | None, list[int] | None]:
    """The texts and their starts; None for what is no list of them."""

    def list_of(kind: type, name: str) -> list[Any] | None:
        if not isinstance(answer, dict) or name not in answer:
            return None
        values = answer[name] or []
        is_right = isinstance(values, list) and all(isinstance(value, kind) for value in values)
        return values if is_right else None

    return list_of(str, "text"), list_of(int, "answer_start")


def _hold_out(name: str, train: Examples, fraction: float) -> tuple[Examples, Examples]:
    names = ("context", "first", "second", "source")
    texts = [column for column in names if column in train.rows.features]
    limit = fraction * 2**64
    rows = zip(*(train.rows[column][:] for column in texts))
    is_held_out = [xxhash.xxh3_64_intdigest("\n".join(row).encode()) < limit for row in rows]
    parts = [
        [index for index, held_out in enumerate(is_held_out) if held_out == wanted]
        for wanted in (False, True)
    ]
    if not all(parts):
        raise ExperimentError(
            f"tasks.{name}: {len(train)} training examples are too few to hold out {fraction:g} of"
            f" them; give a validation file, or raise tasks.{name}.held_out_fraction"
        )
    kept, held_out = (
        Examples(train.rows.select(chosen), f"{train.fingerprint} {part} {fraction}")
        for chosen, part in zip(parts, ("kept", "held out"))
    )
    return kept, held_out
