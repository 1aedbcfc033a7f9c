"""Locks between processes: a file on one machine, a Postgres database between machines."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import Any

from filelock import Timeout
from sqlalchemy import Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.redaction import redact

# For how long a database that does not answer is asked again.
RETRY_SECONDS = 300.0
# Between two questions to the database, by a process that waits or that holds a lock.
_INTERVAL = 1.0
# For so long after a start of the database locks are left to those who held them before it.
_REST = 10.0
# Without these either side may wait for hours for one whose machine or network is gone.
_CONNECT_SECONDS = 5
_KEEP_ALIVE: dict[str, Any] = {
    "connect_timeout": _CONNECT_SECONDS,
    "keepalives": 1,
    "keepalives_idle": 60,
    "tcp_user_timeout": 30_000,
    "options": "-c tcp_keepalives_idle=60 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=6",
}
_TAKE = text("SELECT pg_try_advisory_lock(:key)")
_GIVE = text("SELECT pg_advisory_unlock(:key)")
_AGE = text("SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())")
# Databases that did not answer for all of the time; they are not waited for again until they do.
_given_up: set[str] = set()
_log = logging.getLogger(__name__)


class AdvisoryLock:
    """A lock by name in a Postgres database, used as filelock's `FileLock` is.

    Postgres frees it when the connection of its holder ends: with its process, or where the
    database itself is restarted. Its holder takes it again as soon as the database answers, before
    any other process may.
    """

    def __init__(self, url: str, name: str, retry_seconds: float = RETRY_SECONDS) -> None:
        self._url = url
        self._name = name
        self._retry_seconds = retry_seconds
        # Postgres takes 64 bits.
        digest = hashlib.sha256(f"minilm_exp {name}".encode()).digest()
        self._key = {"key": int.from_bytes(digest[:8], "big", signed=True)}
        self._released = Event()
        self._keeper: Thread | None = None

    def acquire(self, timeout: float = -1) -> None:
        """Takes the lock.

        Args:
            timeout: Seconds to wait for it; a negative number waits for as long as it takes. A
                database that was just started takes some seconds more.

        Raises:
            Timeout: Another connection still holds it.
            ExperimentError: The database cannot be used.
        """
        start = time.monotonic()
        connection = None
        try:
            while True:
                try:
                    if connection is None:
                        connection = self._connect(self._retry_seconds)
                        time.sleep(max(0.0, _REST - float(connection.scalar(_AGE) or 0)))
                    if connection.scalar(_TAKE, self._key):
                        break
                except DBAPIError as error:
                    if not error.connection_invalidated:
                        raise
                    _close(connection)
                    connection = None
                    continue
                if 0 <= timeout <= time.monotonic() - start:
                    raise Timeout(self._name)
                time.sleep(_INTERVAL)
        except BaseException as error:
            _close(connection)
            if isinstance(error, (SQLAlchemyError, ImportError)):
                raise unusable(self._url, error) from error
            raise
        self._released = Event()
        self._keeper = Thread(target=self._keep, args=(connection, self._released), daemon=True)
        self._keeper.start()

    def release(self) -> None:
        """Gives it back; nothing happens where the database did so before."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            self._released.set()
            # One that is about to reach a lost database is not waited for: it holds nothing.
            keeper.join(_CONNECT_SECONDS)

    def __enter__(self) -> AdvisoryLock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _connect(self, retry_seconds: float) -> Connection:
        connect = connector(self._url, retry_seconds)
        connection = create_engine(self._url, poolclass=NullPool, creator=connect).connect()
        return connection.execution_options(isolation_level="AUTOCOMMIT")

    def _keep(self, connection: Connection | None, released: Event) -> None:
        """Sees that the connection stands, and takes the lock again where it was lost."""
        is_told = False
        while not released.wait(_INTERVAL):
            try:
                if connection is not None:
                    connection.scalar(text("SELECT 1"))
                    continue
                connection = self._connect(0)
                if connection.scalar(_TAKE, self._key):
                    _log.info("the database answers again, which has the lock of %s", self._name)
                    is_told = False
                    continue
                if not is_told:
                    _log.error(
                        "the database lost the lock of %s, and another process took it: both work"
                        " on it now, unless outputs_dir keeps them apart; end one of them",
                        self._name,
                    )
                    is_told = True
            except (SQLAlchemyError, ExperimentError):
                pass
            _close(connection)
            connection = None
        # The database sees the end of a connection a little later than this process.
        if connection is not None:
            with suppress(SQLAlchemyError):
                connection.execute(_GIVE, self._key)
            _close(connection)


def connector(url: str, retry_seconds: float) -> Callable[[], Any]:
    """What connects to a Postgres database, for SQLAlchemy's `creator`.

    While the database does not answer, it is asked again.

    Raises:
        ExperimentError: It is no address; or, of what is returned, nothing has answered for
            `retry_seconds`.
    """
    try:
        dialect = create_engine(url).dialect
        positional, named = dialect.create_connect_args(make_url(url))
    except (SQLAlchemyError, ImportError) as error:
        raise unusable(url, error) from error

    def connect() -> Any:
        start, is_told = time.monotonic(), False
        while True:
            try:
                connection = dialect.connect(*positional, **{**_KEEP_ALIVE, **named})
                _given_up.discard(url)
                return connection
            except dialect.loaded_dbapi.OperationalError as error:
                left = retry_seconds - (time.monotonic() - start)
                if left <= 0 or url in _given_up:
                    if retry_seconds > 0:
                        _given_up.add(url)
                    raise unusable(url, error) from error
                if not is_told:
                    address, reason = redact(url), redact(reason_of(error))
                    message = "%s does not answer (%s); asked again for %.0f seconds"
                    _log.warning(message, address, reason, retry_seconds)
                    is_told = True
                time.sleep(min(_INTERVAL, left))

    return connect


def _close(connection: Connection | None) -> None:
    if connection is not None:
        with suppress(SQLAlchemyError):
            connection.close()


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
            " needs `pip install 'minilm_exp[postgres]'`), or leave it out. What is finished"
            " stands; the same command goes on"
        )
    )
