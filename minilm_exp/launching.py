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
from minilm_exp.redaction import redact


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
        try:
            return self._launcher.launch(job_overrides, initial_job_idx)
        except Exception as error:
            self._tell(error, f"its {len(job_overrides)} jobs are launched again")
        try:
            returns = list(self._launcher.launch(job_overrides, initial_job_idx))
        except Exception as error:
            self._tell(error, "now each job is launched by itself")
            returns = [
                self._launch_alone(overrides, number)
                for number, overrides in enumerate(job_overrides, start=initial_job_idx)
            ]
        session, tracking = self._session()
        if session is not None:
            for number in range(len(returns)):
                session.end_left(initial_job_idx + number, tracking)
        return returns

    def _launch_alone(self, overrides: Sequence[str], number: int) -> JobReturn:
        try:
            return self._launcher.launch([overrides], number)[0]
        except Exception as error:
            self._tell(error, "the job has failed")
            reason = f"its process was killed three times, as by a lack of memory: {_short(error)}"
            session, tracking = self._session()
            if session is not None:
                session.failed(number, reason, tracking)
            return JobReturn(status=JobStatus.FAILED, _return_value=ExperimentError(reason))

    def _session(self) -> Any:
        from minilm_exp.sweeping import Session, tracking_of  # seconds, which few calls need

        folder = Path(str(self._config.hydra.sweep.dir))
        return Session.read(folder), tracking_of(self._config)

    def _tell(self, error: Exception, then: str) -> None:
        """On the terminal; another error than the end of a process goes on upwards."""
        if not _is_death(error):
            raise error
        text = f"a process was killed, as by a lack of memory: {then}; what is finished stands"
        print(f"{text} ({_short(error)})", file=sys.stderr, flush=True)


def _short(error: Exception) -> str:
    return redact(reason_of(error))


def _is_death(error: Exception) -> bool:
    """Whether a launcher says that a job ended without a result; sbatch's own errors are others."""
    submitit = sys.modules.get("submitit.core.utils")
    if submitit is not None and isinstance(error, submitit.FailedJobError):
        return "failed during processing" in str(error)
    return isinstance(error, BrokenProcessPool) or (
        submitit is not None and isinstance(error, submitit.UncompletedJobError)
    )
