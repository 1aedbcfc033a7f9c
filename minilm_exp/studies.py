"""Optuna's storage, where several processes take trials from one queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from filelock import FileLock
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import make_url

from minilm_exp.redaction import redact


class SharedStorage(RDBStorage):
    """A database of studies whose waiting trials are each taken once.

    Optuna reads a trial's state and then sets it, in one transaction, for which SQLite holds no
    lock; two processes would take the same trial. A file beside the database is the lock.
    """

    def __init__(self, url: str) -> None:
        database = make_url(url)
        is_file = database.get_backend_name() == "sqlite" and database.database
        self._lock = FileLock(f"{database.database}.lock") if is_file else None
        if self._lock is None:
            super().__init__(url)
            return
        # Two processes that create the same tables at once would break each other.
        with self._lock:
            # Seconds that a process waits while another one writes; 5 by default.
            super().__init__(url, engine_kwargs={"connect_args": {"timeout": 60}})

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As Optuna's, without passwords: the sweeper keeps the whole command line there."""
        super().set_trial_user_attr(
            trial_id, key, redact(value) if isinstance(value, str) else value
        )

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """As Optuna's, one process after the other."""
        if self._lock is None:
            return super().set_trial_state_values(trial_id, state, values)
        with self._lock:
            return super().set_trial_state_values(trial_id, state, values)
