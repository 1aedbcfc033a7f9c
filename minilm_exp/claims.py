"""Claims: each run is computed by one process at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from minilm_exp.errors import ExperimentError
from minilm_exp.locks import RETRY_SECONDS, AdvisoryLock, is_postgres

_log = logging.getLogger(__name__)


@contextmanager
def claim(
    outputs: Path, key: str, studies: str, wait: bool, retry_seconds: float = RETRY_SECONDS
) -> Iterator[None]:
    """Holds a run against all other processes of this machine, and of others by Postgres.

    The claim of a process that dies is free again.

    Args:
        outputs: The folder of all runs.
        key: The run's key.
        studies: Address of the database of studies; a Postgres one holds claims too, against all
            machines that use it.
        wait: Until the other process is done, instead of giving up.
        retry_seconds: For how long a Postgres database that does not answer is asked again, by a
            process that waits. Another one has just been started, maybe with a slip in the address.

    Raises:
        ExperimentError: Another process holds it, and this one is not to wait; or the database
            cannot be used.
    """
    folder = outputs / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    locks: list[FileLock | AdvisoryLock] = [FileLock(folder / f"{key}.lock")]
    if is_postgres(studies):
        locks.append(AdvisoryLock(studies, f"run {key}", retry_seconds if wait else 0))
    with ExitStack() as held:
        for lock in locks:
            _acquire(lock, key, wait)
            held.callback(lock.release)
        yield


def _acquire(lock: FileLock | AdvisoryLock, key: str, wait: bool) -> None:
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
