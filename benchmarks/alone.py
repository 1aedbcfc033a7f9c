"""One figure from a fresh process with one thread: python -m benchmarks.alone TASK ARGUMENT ..."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import steps
from benchmarks.measure import added_peak_mib


def loss_memory(variant: str, num_sequences: str, num_tokens: str) -> float:
    """MiB that value and gradient of the loss alone add to the states."""
    long = steps.LONG
    size = steps.Size(
        long.teacher, long.student, long.num_relation_heads, int(num_sequences), int(num_tokens)
    )
    # A small one first: the libraries' own buffers are no part of the loss.
    steps.make_loss(variant, steps.Size(long.teacher, long.student, 16, 1, 16))()
    run = steps.make_loss(variant, size)
    return added_peak_mib(run)


def step_memory(variant: str, size_name: str) -> float:
    """MiB that three training steps add to the built models."""
    size: steps.Size = getattr(steps, size_name)
    run = steps.make_step(variant, size)
    inputs = steps.batch(size)
    return added_peak_mib(lambda: [run(*inputs) for _ in range(3)])


def corpus_memory(num_megabytes: str, folder: str) -> float:
    """MiB that tokenising and packing a corpus of that size adds."""
    from benchmarks.scale import prepare, write_text

    text = Path(folder) / f"{num_megabytes}.txt"
    small = Path(folder) / "small.txt"
    write_text(text, int(num_megabytes) * 10**6)
    write_text(small, 10**6)
    prepare(small, Path(folder))
    return added_peak_mib(lambda: prepare(text, Path(folder)))


def corpus_speed(num_megabytes: str, folder: str) -> float:
    """MB of text that are tokenised and packed in a second."""
    from benchmarks.scale import prepare, write_text

    text = Path(folder) / "speed.txt"
    write_text(text, int(num_megabytes) * 10**6)
    return text.stat().st_size / 1e6 / prepare(text, Path(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    tasks: list[Callable[..., float]] = [loss_memory, step_memory, corpus_memory, corpus_speed]
    task = next(task for task in tasks if task.__name__ == sys.argv[1])
    print(json.dumps(task(*sys.argv[2:])))
