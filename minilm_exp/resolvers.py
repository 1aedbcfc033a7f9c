"""What the config can compute: ${NAME:...} in conf/ and sweeps/."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from minilm_exp.errors import ExperimentError

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class SweepState:
    """What is known of a sweep once it has begun, and what failed of it once it has ended.

    Hydra refuses jobs whose hydra.sweeper is not what the sweep began with, word by word, so that
    only an interpolation can have a value that is found out then.
    """

    study: str | None = None
    trials_left: int | None = None
    calls: int = 1
    failed: tuple[str, ...] = ()


sweep_state = SweepState()


def register_resolvers() -> None:
    """Makes them known to OmegaConf; again does nothing."""
    for name, resolver in (
        ("repository", lambda: str(REPOSITORY)),
        ("storage", _storage),
        ("study", lambda: sweep_state.study),
        ("jobs_at_once", _jobs_at_once),
        ("trials_left", lambda total: _either(sweep_state.trials_left, total)),
        ("sampler_seed", lambda seed: seed + sweep_state.calls - 1),
        ("half", lambda number: _known(number) // 2),
        ("after", lambda number: _known(number) + 1),
        ("upper_layers", _upper_layers),
        ("layer_shares", _layer_shares),
    ):
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_resolver(name, resolver)
    if not OmegaConf.has_resolver("process"):
        # Hydra hands the cached value on to the jobs.
        OmegaConf.register_resolver("process", os.getpid, use_cache=True)


def _jobs_at_once(launcher: Any) -> int:
    """How many jobs a launcher computes at once, by its own settings; Hydra's own one."""
    cores = os.cpu_count() or 1
    if "array_parallelism" in launcher:  # Slurm
        return int(launcher.array_parallelism)
    if "n_jobs" in launcher:  # joblib, which counts down from all cores
        number = int(launcher.n_jobs)
        return number if number > 0 else max(1, cores + 1 + number)
    if "cpus_per_task" in launcher:  # processes of this machine
        return max(1, cores // int(launcher.cpus_per_task or 1))
    return 1


def _upper_layers(num_layers: int | None) -> str:
    """All layers of up to 6, else those of the upper half; the last first, as in Figure 2."""
    last = _known(num_layers)
    first = 1 if last <= 6 else last // 2 + 1
    return ",".join(map(str, range(last, first - 1, -1)))


def _layer_shares(num_layers: int | None) -> str:
    """A half, a third and a quarter of the layers: 6, 4 and 3 of 12, as in MiniLM's tables."""
    layers = _known(num_layers)
    return ",".join(dict.fromkeys(str(max(1, layers // part)) for part in (2, 3, 4)))


def _storage(url: str, retry_seconds: float) -> Any:
    from minilm_exp.studies import SharedStorage  # a second, which only sweeps need

    return SharedStorage(url, retry_seconds)


def _either(first: int | None, second: int) -> int:
    return second if first is None else first


def _known(number: int | None) -> int:
    if number is None:
        raise ExperimentError(
            "this sweep needs the teacher's shape, which teacher.path leaves to its config.json:"
            " give teacher.num_layers and teacher.hidden_size too"
        )
    return number
