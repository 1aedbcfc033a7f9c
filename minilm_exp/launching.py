"""Jobs of a sweep in processes of their own, of which some are killed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
from omegaconf import DictConfig

from minilm_exp.errors import ExperimentError, reason_of


class Sweeper(OptunaSweeper):
    """Hydra's Optuna sweeper, which a killed job does not end."""

    def setup(self, *, config: DictConfig, **context: Any) -> None:
        """Sets up the launcher too."""
        super().setup(config=config, **context)
        self.sweeper.launcher = Relaunching(self.sweeper.launcher, config)


class Relaunching(Launcher):
    """Launches jobs again whose process was killed, as by a lack of memory.

    Launchers give up all jobs of a call where one process is gone. Launched again, a finished job
    returns its result, one that still runs is waited for, and a killed one goes on from its last
    checkpoint. At the second time each is launched by itself; the third ends that job as failed.
    """

    def __init__(self, launcher: Any, config: DictConfig) -> None:
        self._launcher = launcher
        self._config = config

    def setup(self, **context: Any) -> None:
        """Nothing: the launcher is."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """As the launcher does."""
        returns: list[JobReturn] = []
        for number_of_times in range(2):
            try:
                return self._launcher.launch(job_overrides, initial_job_idx)
            except Exception as error:
                if not _is_death(error):
                    raise
                reason = reason_of(error)
                then = "each by itself" if number_of_times else "again"
                print(
                    f"a process of {len(job_overrides)} jobs was killed ({reason}): they are"
                    f" launched {then}; what is finished is not computed again",
                    file=sys.stderr,
                    flush=True,
                )
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            try:
                returns += self._launcher.launch([overrides], number)
            except Exception as error:
                if not _is_death(error):
                    raise
                returns.append(self._failed(number, reason_of(error)))
        return returns

    def _failed(self, job: int, reason: str) -> JobReturn:
        from minilm_exp.sweeping import Session, tracking_of  # seconds, which not every run needs

        reason = f"its process was killed three times, as by a lack of memory ({reason})"
        session = Session.read(Path(str(self._config.hydra.sweep.dir)))
        if session is not None:
            session.failed(job, reason, tracking_of(self._config))
        return JobReturn(status=JobStatus.FAILED, _return_value=ExperimentError(reason))


def _is_death(error: Exception) -> bool:
    """Whether a launcher says that the process of a job ended without a result."""
    submitit = sys.modules.get("submitit.core.utils")
    return isinstance(error, BrokenProcessPool) or (
        submitit is not None and isinstance(error, submitit.UncompletedJobError)
    )
