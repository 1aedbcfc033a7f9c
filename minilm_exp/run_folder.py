"""Where a run lies on disk, and whether it has been done before."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from minilm_exp.errors import ExperimentError
from minilm_exp.result import Result, read_result
from minilm_exp.settings import Settings


def run_name(settings: Settings) -> str:
    """Teacher, student, relations and seed, fit for a folder."""
    name = (
        f"{settings.teacher.name}-{settings.student_name}-{settings.relation_set.name}"
        f"-seed{settings.seed}"
    )
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)


def finished_run(settings: Settings, key: str) -> Result | None:
    """The finished run of this key whose student is still there, or None."""
    for folder in _folders(settings, key):
        result = read_result(folder)
        if result is not None and result.status == "FINISHED" and result.run_key == key:
            if (folder / "student" / "config.json").is_file():
                return result
    return None


def choose_folder(settings: Settings, key: str) -> Path:
    """The folder to run in: never one that holds a finished run."""
    number = 1
    while True:
        suffix = "" if number == 1 else f"-{number}"
        folder = settings.outputs / "runs" / f"{run_name(settings)}-{key[:10]}{suffix}"
        result = read_result(folder)
        if result is None or result.status != "FINISHED":
            return folder
        number += 1


@contextmanager
def occupied(folder: Path, resume: bool) -> Iterator[Result | None]:
    """Holds the folder against other processes; gives the unfinished result that lies in it.

    Without resume, what an unfinished run left is removed.

    Raises:
        ExperimentError: Another process is running in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ExperimentError(
            f"another process is computing this run in {folder}: wait for it, or change a setting"
        ) from error
    try:
        left = read_result(folder)
        if not resume:
            shutil.rmtree(folder)
            folder.mkdir()
        yield left
    finally:
        lock.release()


def _folders(settings: Settings, key: str) -> list[Path]:
    return sorted((settings.outputs / "runs").glob(f"*-{key[:10]}*/"))
