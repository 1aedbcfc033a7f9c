"""Where the data of downstream tasks lie: the hub, a local copy of it, or the user's files."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.hub import hub_commit
from minilm_exp.provenance import fingerprint_files, fingerprint_text
from minilm_exp.settings import matching_files
from minilm_exp.task_settings import HubData, Task

_SHARD = re.compile(r"-\d+-of-(\d+)\.parquet")
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
    """Where all that a run reads of a task lies; `train` is None where nothing is trained."""

    train: Split | None
    validation: dict[str, Split]
    test: dict[str, Split]

    def fingerprint(self) -> str:
        """Names the content of all of it."""
        parts = [*self.validation.items(), *self.test.items()]
        if self.train is not None:
            parts.insert(0, ("", self.train))
        return fingerprint_text(" ".join(f"{part} {split.fingerprint()}" for part, split in parts))


class _Absent(ExperimentError):
    """A local copy does not hold a split or language at all."""


def find_splits(name: str, task: Task, data_root: str | None, with_test: bool) -> Splits:
    """Where the data of a task are, without reading them.

    In data_root a split is `FOLDER/SPLIT.parquet`, or several files `FOLDER/SPLIT-*.parquet`. There
    the folder of a language, or one of several validation splits, may be absent if the task's score
    does not need it; a warning says so. Of the hub, a revision is resolved to its commit.

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
    unknown = [language for language in task.languages or [] if language not in task.all_languages]
    if unknown:
        raise ExperimentError(
            f"tasks.{name}.languages: {', '.join(unknown)} is not among"
            f" tasks.{name}.all_languages={task.all_languages}"
        )
    find = functools.partial(_find, name, data_root)
    train = None
    if task.is_trained:
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
            if part in found:
                raise ExperimentError(f"tasks.{name}: {splits} gives two parts the name {part!r}")
            try:
                found[part] = find(task.data, split, language)
            except _Absent:
                if not _may_be_absent(task, part):
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
            yield (split.partition("_")[2] or split) if len(splits) > 1 else "", "", split


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
        files = _local_files(name, Path(data_root), folder, split, data.hub_id, bool(language))
        return Split(f"tasks.{name}", split, files, folder=folder)
    config, hub_folder = (
        value and value.replace("{language}", language)
        for value in (data.hub_config, data.hub_folder)
    )
    try:
        commit = hub_commit(data.hub_id, data.revision, "dataset")
    except Exception as error:  # the hub client raises many kinds, all meaning the same here
        raise ExperimentError(not_to_be_had(name, data.hub_id, folder, error)) from error
    return Split(f"tasks.{name}", split, (), data.hub_id, config, hub_folder, commit, folder)


def _local_files(
    name: str, data_root: Path, folder: str, split: str, hub_id: str, is_language: bool
) -> tuple[Path, ...]:
    directory = data_root / folder
    if not directory.is_dir():
        raise _Absent(
            f"data_root={data_root} has no folder {folder}, which task={name} reads: copy the"
            f" data set {hub_id} there as parquet files, or set data_root=null for the hub"
        )
    whole = directory / f"{split}.parquet"
    files = (whole,) if whole.exists() else tuple(sorted(directory.glob(f"{split}-*.parquet")))
    if not files:
        there = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
        # Whoever copied the folder of a language wants it scored.
        kind = ExperimentError if is_language else _Absent
        raise kind(f"{directory} has no {split}.parquet, which task={name} reads; there is {there}")
    numbers = {int(shard[1]) for path in files if (shard := _SHARD.search(path.name))}
    if numbers - {len(files)}:
        raise ExperimentError(
            f"{directory} has {len(files)} files {split}-*.parquet where their names say"
            f" {max(numbers)}: copy all files of one version of {hub_id}"
        )
    return files


def not_to_be_had(name: str, hub_id: str, folder: str, error: Exception) -> str:
    """What to do when the hub does not answer or does not have a data set."""
    return (
        f"task={name}: the data set {hub_id} cannot be had from the hub (no network, or no such"
        f" data set, config or split): set data_root=DIR, where DIR/{folder}/ holds its splits as"
        f" parquet files ({reason_of(error)})"
    )


def _user_files(name: str, task: Task, with_test: bool) -> Splits:
    where = f"tasks.{name}.files"
    found: dict[str, Split] = {}
    for split in ("train", "validation", "test"):
        pattern = getattr(task.files, split)
        is_read = {"train": task.is_trained, "validation": True, "test": with_test}
        if pattern is None or not is_read[split]:
            continue
        files = tuple(matching_files(pattern))
        if not files:
            raise ExperimentError(f"{where}.{split}: no file matches {pattern}")
        for other, earlier in found.items():
            shared = {path.resolve() for path in files} & {path.resolve() for path in earlier.files}
            if shared:
                raise ExperimentError(
                    f"{where}.{split} and {where}.{other} both name {min(shared)}: what is trained"
                    " on or chosen by cannot score"
                )
        found[split] = Split(f"{where}.{split}", split, files)
    if with_test and "test" not in found:
        raise ExperimentError(f"task_training.test=true needs {where}.test=FILE")
    validation, test = (
        {"": found[split]} if split in found else {} for split in ("validation", "test")
    )
    return Splits(found.get("train"), validation, test)
