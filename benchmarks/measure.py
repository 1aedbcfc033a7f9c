"""Times in turn, figures of processes of their own, and where it all was measured."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from minilm_exp.provenance import git_state, versions

REPOSITORY = Path(__file__).resolve().parents[1]


def seconds_in_turn(
    variants: Mapping[str, Callable[[], None]],
    num_rounds: int,
    num_warmup: int = 1,
    by_wall: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; all take their turn in every round.

    With one thread it is processor time, which a busy neighbour does not stretch; with several, or
    `by_wall`, what the clock on the wall shows.
    """
    is_alone = torch.get_num_threads() == 1 and not by_wall
    clock = time.process_time if is_alone else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(num_warmup + num_rounds):
        for name, run in variants.items():
            start = clock()
            run()
            if number >= num_warmup:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators))


def alone(task: str, *arguments: object) -> float:
    """The figure of a task of benchmarks/alone.py, in a process of its own with one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.alone", task, *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def added_peak_mib(run: Callable[[], object]) -> float:
    """MiB that the peak of this process lies above what it holds before the call; Linux only."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak starts again from now
    before = _peak_kib()
    run()
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def seconds_of(command: list[str]) -> float:
    """Wall-clock seconds of a command, whatever its exit status."""
    start = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False)
    return time.perf_counter() - start


def circumstances() -> dict[str, str | int]:
    """Machine, versions, threads and commit."""
    git = git_state()
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cores": os.cpu_count() or 0,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "commit": git["commit"],
        "dirty": git["dirty"],
        **versions(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        return next(v.strip() for k, v in fields.items() if k.strip() == "model name")
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
