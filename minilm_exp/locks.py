"""Locks between processes: a file on one machine, a Postgres database between machines."""

from __future__ import annotations

import hashlib
import time
from contextlib import ExitStack, suppress

from filelock import Timeout
from sqlalchemy import Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.redaction import redact

# Seconds between two questions to the database, by a process that waits.
_INTERVAL = 1
# Without these a firewall may forget a connection on which nothing is said for hours.
_KEEP_ALIVE = {"keepalives": 1, "keepalives_idle": 60, "connect_timeout": 10}


class AdvisoryLock:
    """A lock by name in a Postgres database, used as filelock's `FileLock` is.

    Postgres frees it when the connection of its holder ends: with its process, or where the
    database itself is restarted.
    """

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = name
        # Postgres takes 64 bits.
        digest = hashlib.sha256(f"minilm_exp {name}".encode()).digest()
        self._key = int.from_bytes(digest[:8], "big", signed=True)
        self._connection: Connection | None = None

    def acquire(self, timeout: float = -1) -> None:
        """Takes the lock.

        Args:
            timeout: Seconds to wait for it; a negative number waits for as long as it takes.

        Raises:
            Timeout: Another connection still holds it.
            ExperimentError: The database cannot be used.
        """
        start = time.monotonic()
        question = text("SELECT pg_try_advisory_lock(:key)")
        with ExitStack() as opened:
            try:
                engine = create_engine(self._url, poolclass=NullPool, connect_args=_KEEP_ALIVE)
                connection = opened.enter_context(engine.connect())
                connection.execution_options(isolation_level="AUTOCOMMIT")
                while not connection.scalar(question, {"key": self._key}):
                    if 0 <= timeout <= time.monotonic() - start:
                        raise Timeout(self._name)
                    time.sleep(_INTERVAL)
            except (SQLAlchemyError, ImportError) as error:
                raise unusable(self._url, error) from error
            self._connection = connection
            opened.pop_all()

    def release(self) -> None:
        """Gives it back; nothing happens where the database did so before."""
        connection, self._connection = self._connection, None
        if connection is not None:
            # The database sees the end of a connection a little later than this process.
            with suppress(SQLAlchemyError):
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": self._key})
            with suppress(SQLAlchemyError):
                connection.close()

    def __enter__(self) -> AdvisoryLock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def is_postgres(url: str) -> bool:
    """Whether this is the address of a Postgres database.

    Raises:
        ExperimentError: It is no address of a database.
    """
    try:
        return make_url(url).get_backend_name() == "postgresql"
    except ArgumentError as error:
        raise unusable(url, error) from error


def unusable(url: str, error: Exception) -> ExperimentError:
    """What is said of a database of studies that cannot be used."""
    return ExperimentError(
        redact(
            f"tracking.studies={url} cannot be used: {reason_of(error)}; check it (postgresql://"
            " needs `pip install 'minilm_exp[postgres]'`), or leave it out"
        )
    )
