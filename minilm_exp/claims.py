"""Claims: each run is computed by one process at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from minilm_exp.errors import ExperimentError

_log = logging.getLogger(__name__)


@contextmanager
def claim(outputs: Path, key: str, wait: bool) -> Iterator[None]:
    """Holds a run against all other processes of this machine.

    The operating system frees the claim of a process that dies.

    Args:
        outputs: The folder of all runs.
        key: The run's key.
        wait: Until the other process is done, instead of giving up.

    Raises:
        ExperimentError: Another process holds it, and this one is not to wait.
    """
    folder = outputs / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if not wait:
            raise ExperimentError(
                f"another process is computing this run (key {key[:10]}): wait for it, or change a"
                " setting"
            ) from error
        _log.info("another process is computing this run (key %s): waiting for it", key[:10])
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
