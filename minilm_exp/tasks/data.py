"""The data of downstream tasks, from the hub, from a local copy of it, or from the user's files."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import xxhash
from datasets import Dataset, load_dataset
from pyarrow import compute, csv, json, parquet

from minilm_exp.errors import ExperimentError
from minilm_exp.provenance import fingerprint_files, fingerprint_text
from minilm_exp.settings import matching_files
from minilm_exp.task_settings import HubData, Task
from minilm_exp.tasks.examples import Examples, TaskData

# Longer than any record.
_BLOCK_BYTES = 2**26
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Where one split of a task's data lies: files here, or a split of a hub data set."""

    setting: str
    split: str
    files: tuple[Path, ...] = ()
    hub_id: str = ""
    hub_config: str | None = None
    hub_folder: str | None = None
    commit: str = ""
    folder: str = ""

    def fingerprint(self) -> str:
        """Names the content without reading it as a table."""
        if self.files:
            return fingerprint_files(list(self.files))
        return f"{self.hub_id}@{self.commit} {self.hub_config} {self.hub_folder} {self.split}"

    def __str__(self) -> str:
        return str(self.files[0]) if self.files else f"{self.hub_id}, {self.split}"


@dataclass(frozen=True)
class Splits:
    """Where all that a run reads of a task lies."""

    train: Split
    validation: dict[str, Split]
    test: dict[str, Split]

    def fingerprint(self) -> str:
        """Names the content of all of it."""
        parts = [self.train, *self.validation.values(), *self.test.values()]
        return fingerprint_text(" ".join(split.fingerprint() for split in parts))


def find_splits(name: str, task: Task, data_root: str | None, with_test: bool) -> Splits:
    """Where the data of a task are, without reading them.

    In data_root a split is `FOLDER/SPLIT.parquet`, or several files `FOLDER/SPLIT-*.parquet`. There
    a validation split or language may be absent if the task's score does not need it; a warning
    says so. Of the hub, a revision is resolved to its commit.

    Args:
        name: The task's name, for messages.
        task: The task.
        data_root: Folder of local copies, or None for the hub.
        with_test: Whether the test splits are wanted.

    Raises:
        ExperimentError: A folder, file or data set is not to be had.
    """
    if task.files is not None:
        return _user_files(name, task, with_test)
    assert task.data is not None
    if data_root is not None and not Path(data_root).is_dir():
        raise ExperimentError(f"data_root={data_root} is no folder")
    find = functools.partial(_find, name, data_root)
    train = find(task.train_data or task.data, task.train, task.train_language)
    validation: dict[str, Split] = {}
    test: dict[str, Split] = {}
    absent: dict[str, None] = {}
    for found, splits, wanted in (
        (validation, task.validation, True),
        (test, task.test, with_test),
    ):
        if not wanted:
            continue
        for part, language, split in _parts(task, splits):
            try:
                found[part] = find(task.data, split, language)
            except ExperimentError:
                if data_root is None or not _may_be_absent(task, part):
                    raise
                absent[part] = None
    if absent:
        _log.warning("task=%s: %s has no %s: not scored", name, data_root, ", ".join(absent))
    if task.validation and not validation:
        raise ExperimentError(
            f"tasks.{name}: {data_root}/{task.data.folder} has none of the splits or languages that"
            " are to be scored"
        )
    if with_test and not test:
        raise ExperimentError(
            f"task_training.test=true: tasks.{name} has no test split"
            + (f" in {data_root}" if task.test else "")
        )
    return Splits(train, validation, test)


def _parts(task: Task, splits: list[str]) -> Iterable[tuple[str, str, str]]:
    """Name, language and split of each part that is scored."""
    for split in splits:
        if task.all_languages:
            for language in task.languages or task.all_languages:
                yield language, language, split
        else:
            suffix = split.split("_", 1)[1] if len(splits) > 1 else ""
            yield suffix, "", split


def _may_be_absent(task: Task, part: str) -> bool:
    """A language that was asked for by name, and what score and selection need, may not."""
    if task.languages is not None:
        return False
    return bool(part) and not any(
        value.endswith(f"_{part}") for value in (task.score, task.selected_by)
    )


def _find(name: str, data_root: str | None, data: HubData, split: str, language: str) -> Split:
    folder = data.folder.replace("{language}", language)
    if data_root is not None:
        directory = Path(data_root) / folder
        if not directory.is_dir():
            raise ExperimentError(
                f"data_root={data_root} has no folder {folder}, which task={name} reads: copy the"
                f" data set {data.hub_id} there as parquet files, or set data_root=null for the hub"
            )
        files = tuple(sorted([*directory.glob(f"{split}.parquet")])) or tuple(
            sorted(directory.glob(f"{split}-*.parquet"))
        )
        if not files:
            there = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
            raise ExperimentError(
                f"{directory} has no {split}.parquet, which task={name} reads; there is {there}"
            )
        return Split(f"tasks.{name}", split, files, folder=folder)
    config, hub_folder = (
        value and value.replace("{language}", language)
        for value in (data.hub_config, data.hub_folder)
    )
    commit = _hub_commit(name, data.hub_id, data.revision, data.folder.split("/{")[0])
    return Split(f"tasks.{name}", split, (), data.hub_id, config, hub_folder, commit, folder)


@functools.cache
def _hub_commit(name: str, hub_id: str, revision: str | None, folder: str) -> str:
    """The commit behind a data set's revision; offline, that of an earlier download."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return str(HfApi().dataset_info(hub_id, revision=revision, timeout=10).sha)
    except Exception as error:  # the hub client raises many kinds, all meaning the same here
        cached = try_to_load_from_cache(hub_id, "README.md", revision=revision, repo_type="dataset")
        if not isinstance(cached, str):
            raise ExperimentError(_not_to_be_had(name, hub_id, folder)) from error
        return Path(cached).parent.name


def _not_to_be_had(name: str, hub_id: str, folder: str) -> str:
    return (
        f"task={name}: the data set {hub_id} cannot be had from the hub (no network, or no such"
        f" data set): set data_root=DIR, where DIR/{folder}/ holds its splits as parquet files"
    )


def _user_files(name: str, task: Task, with_test: bool) -> Splits:
    def find(split: str) -> Split | None:
        pattern = getattr(task.files, split)
        if pattern is None:
            return None
        files = tuple(matching_files(pattern))
        if not files:
            raise ExperimentError(f"tasks.{name}.files.{split}: no file matches {pattern}")
        return Split(f"tasks.{name}.files.{split}", split, files)

    train, validation = find("train"), find("validation")
    assert train is not None
    test = find("test") if with_test else None
    if with_test and test is None:
        raise ExperimentError(f"task_training.test=true needs tasks.{name}.files.test=FILE")
    return Splits(
        train,
        {} if validation is None else {"": validation},
        {} if test is None else {"": test},
    )


def load_task(name: str, task: Task, splits: Splits) -> TaskData:
    """Reads and checks the data of a task.

    Without a validation split, the examples whose text has a low hash are held out from the
    training split, so that equal texts stay on one side.

    Raises:
        ExperimentError: A column is missing, a label is out of range, a split is empty.
    """
    label_names = None
    num_labels = task.num_labels or 1
    tables = {"train": _read(task, splits.train)}
    for kind, parts in (("validation", splits.validation), ("test", splits.test)):
        tables |= {f"{kind}/{part}": _read(task, split) for part, split in parts.items()}
    if task.kind == "spans":
        convert: Callable[..., Dataset] = _spans
    elif task.kind == "regression":
        convert, num_labels = functools.partial(_labelled, convert_label=_number), 1
    else:
        label_names = _label_names(name, task, tables["train"], splits.train)
        if label_names is not None:
            num_labels = len(label_names)
        convert = functools.partial(
            _labelled,
            convert_label=functools.partial(_class, num_labels=num_labels, names=label_names),
        )
    sources = {"train": splits.train}
    sources |= {f"validation/{part}": split for part, split in splits.validation.items()}
    sources |= {f"test/{part}": split for part, split in splits.test.items()}
    examples = {
        key: Examples(convert(task, table, sources[key]), sources[key].fingerprint())
        for key, table in tables.items()
    }
    train = examples["train"]
    validation = {part: examples[f"validation/{part}"] for part in splits.validation}
    if not validation:
        train, held_out = _hold_out(name, train, task.held_out_fraction)
        validation = {"": held_out}
    test = {part: examples[f"test/{part}"] for part in splits.test}
    return TaskData(train, validation, test, num_labels, label_names)


def _read(task: Task, split: Split) -> pyarrow.Table:
    """The columns that the task needs."""
    if task.kind == "spans":
        columns = ["id", "question", "context", "answers"]
    else:
        columns = [*task.text_columns, task.label_column]
    if split.files:
        table = pyarrow.concat_tables(
            [_read_file(path, split.setting) for path in split.files], promote_options="permissive"
        )
    else:
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
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ExperimentError(
                f"{_not_to_be_had(name, split.hub_id, split.folder)} ({reason[:200]})"
            ) from error
        table = dataset.with_format("arrow")[:]
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise ExperimentError(
            f"{split} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}:"
            f" set {split.setting.split('.files')[0]}.text_columns and .label_column"
            if task.kind != "spans"
            else f"{split} has no column {', '.join(missing)}; it has"
            f" {', '.join(table.column_names)}, but answers are cut from the columns id, question,"
            " context and answers{text,answer_start}"
        )
    if not len(table):
        raise ExperimentError(f"{split} is empty: {split.setting} needs examples in it")
    return table.select(columns)


def _read_file(path: Path, setting: str) -> pyarrow.Table:
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return parquet.read_table(path)
        if kind == ".csv":
            return csv.read_csv(
                path,
                csv.ReadOptions(block_size=_BLOCK_BYTES),
                csv.ParseOptions(newlines_in_values=True),
            )
        if kind == ".jsonl":
            return json.read_json(path, json.ReadOptions(block_size=_BLOCK_BYTES))
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ExperimentError(f"{setting}: {path} cannot be read: {reason[:300]}") from error
    raise ExperimentError(f"{setting}: {path} is neither .csv nor .jsonl nor .parquet")


def _texts(table: pyarrow.Table, column: str, split: Split) -> list[str]:
    texts = table.column(column).to_pylist()
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            # A column of numbers is text to a classifier; what is missing is not.
            if text is None:
                raise ExperimentError(f"{split}, row {row + 1}: {column} is empty")
            texts[row] = str(text)
    return texts


def _labelled(
    task: Task, table: pyarrow.Table, split: Split, convert_label: Callable[[Any], Any]
) -> Dataset:
    columns = {
        name: _texts(table, column, split)
        for name, column in zip(("first", "second"), task.text_columns)
    }
    labels = []
    for row, value in enumerate(table.column(task.label_column).to_pylist()):
        try:
            labels.append(convert_label(value))
        except ValueError as error:
            hidden = " (the hub hides the labels of this split)" if value == -1 else ""
            raise ExperimentError(
                f"{split}, row {row + 1}: {task.label_column}={value} {error}{hidden}; see"
                f" {split.setting.split('.files')[0]}"
            ) from None
    return Dataset.from_dict({**columns, "label": labels})


def _number(value: Any) -> float:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    raise ValueError("is not a finite number")


def _class(value: Any, num_labels: int, names: list[str] | None) -> int:
    if names is not None:
        if str(value) in names:
            return names.index(str(value))
        raise ValueError(f"is none of the training file's labels {', '.join(names[:20])}")
    if isinstance(value, int) and 0 <= value < num_labels:
        return value
    raise ValueError(f"is not one of 0..{num_labels - 1}")


def _label_names(name: str, task: Task, train: pyarrow.Table, split: Split) -> list[str] | None:
    """Of the user's files: the labels as text, in order; None where they are 0..n-1 already."""
    if task.files is None:
        return None
    column = train.column(task.label_column)
    if column.null_count:
        row = compute.index(compute.is_null(column), True).as_py() + 1
        raise ExperimentError(f"{split}, row {row}: {task.label_column} is empty")
    values = column.unique().to_pylist()
    if "" in values:
        row = compute.index(column, "").as_py() + 1
        raise ExperimentError(f"{split}, row {row}: {task.label_column} is empty")
    if all(type(value) is int for value in values):
        number = task.num_labels or max(values) + 1
        if set(values) <= set(range(number)):
            return [str(value) for value in range(number)]
        if task.num_labels is not None:
            wrong = next(value for value in values if value not in range(number))
            raise ExperimentError(
                f"{split}: {task.label_column}={wrong} is not one of 0..{number - 1}; see"
                f" tasks.{name}.num_labels"
            )
    names = [str(value) for value in sorted(values)]
    if len(names) < 2 or (task.num_labels is not None and len(names) != task.num_labels):
        raise ExperimentError(
            f"{split}: {task.label_column} has {len(names)} labels ({', '.join(names[:20])});"
            f" tasks.{name} needs {task.num_labels or 'at least 2'}"
        )
    return names


def _spans(task: Task, table: pyarrow.Table, split: Split) -> Dataset:
    columns: dict[str, list[Any]] = {
        column: _texts(table, column, split) for column in ("id", "question", "context")
    }
    if len(set(columns["id"])) < len(columns["id"]):
        raise ExperimentError(f"{split}: an id stands there twice; predictions are kept by id")
    answers = table.column("answers").to_pylist()
    for row, answer in enumerate(answers):
        if not isinstance(answer, dict) or not {"text", "answer_start"} <= set(answer):
            raise ExperimentError(f"{split}, row {row + 1}: answers must be {{text, answer_start}}")
        if len(answer["text"] or []) != len(answer["answer_start"] or []):
            raise ExperimentError(f"{split}, row {row + 1}: as many texts as answer_starts are due")
        if "squad_v2" not in task.metrics and not answer["text"]:
            raise ExperimentError(
                f"{split}, row {row + 1}: the question has no answer; use task=squad_v2 for data"
                " with unanswerable questions"
            )
    columns["answers"] = [
        {"text": answer["text"] or [], "answer_start": answer["answer_start"] or []}
        for answer in answers
    ]
    return Dataset.from_dict(columns)


def _hold_out(name: str, train: Examples, fraction: float) -> tuple[Examples, Examples]:
    texts = [column for column in ("context", "first", "second") if column in train.rows.features]
    limit = fraction * 2**64
    rows = zip(*(train.rows[column] for column in texts))
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
