"""Optuna's storage, where several processes take trials from one queue."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import NullPool, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from minilm_exp.locks import RETRY_SECONDS, AdvisoryLock, connector, is_postgres, unusable
from minilm_exp.redaction import redact

_T = TypeVar("_T")


class SharedStorage(RDBStorage):
    """A database of studies whose waiting trials are each taken once.

    Optuna reads a trial's state and then sets it, in one transaction, for which SQLite holds no
    lock; two processes would take the same trial. A file beside the database is the lock.

    A Postgres database that does not answer is asked again for `retry_seconds`.

    Raises:
        ExperimentError: The database cannot be used. Every method may raise it later.
    """

    def __init__(self, url: str, retry_seconds: float = RETRY_SECONDS) -> None:
        self._file_lock: FileLock | None = None
        creation: FileLock | AdvisoryLock | nullcontext[None] = nullcontext()
        arguments: dict[str, Any] = {}
        if is_postgres(url):
            creation = AdvisoryLock(url, "tables of studies", retry_seconds)
            # A storage is made for each note of a trial; none keeps a connection.
            arguments = {"poolclass": NullPool, "creator": connector(url, retry_seconds)}
        elif (database := make_url(url)).get_backend_name() == "sqlite" and database.database:
            creation = self._file_lock = FileLock(f"{database.database}.lock")
            # Seconds that a process waits while another one writes; 5 by default.
            arguments = {"connect_args": {"timeout": 60}}
        try:
            # Two processes that create the same tables at once would break each other.
            with creation:
                super().__init__(url, engine_kwargs=arguments)
        except (SQLAlchemyError, ImportError) as error:
            raise unusable(url, error) from error

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As Optuna's, without passwords: the sweeper keeps the whole command line there."""
        kept = redact(value) if isinstance(value, str) else value
        _repeated(lambda: super(SharedStorage, self).set_trial_user_attr(trial_id, key, kept))

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """As Optuna's, one process after the other."""
        with self._file_lock or nullcontext():
            return _repeated(
                lambda: super(SharedStorage, self).set_trial_state_values(trial_id, state, values)
            )

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """As Optuna's."""
        return _repeated(
            lambda: super(SharedStorage, self).get_all_trials(study_id, deepcopy, states)
        )


def _repeated(operation: Callable[[], _T]) -> _T:
    """Once more where the database ended the connection in the middle."""
    try:
        return operation()
    except StorageInternalError as error:
        cause = error.__cause__
        if not isinstance(cause, DBAPIError) or not cause.connection_invalidated:
            raise
        return operation()
