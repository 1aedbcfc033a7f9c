"""Where the time of a training step goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_WAIT, _WARMUP, _ACTIVE = 2, 1, 3

# Ranges that `Distiller` and the training loop mark, and torch itself.
TEACHER = "minilm_exp: teacher forward"
STUDENT = "minilm_exp: student forward"
LOSS = "minilm_exp: loss"
FORWARD_AND_BACKWARD = "minilm_exp: forward and backward"
_DATA = "enumerate(DataLoader)"
_OPTIMISER = "Optimizer.step"
_STEP = "ProfilerStep"


class StepProfiler(TrainerCallback):
    """Writes `trace.json.gz` (chrome://tracing, Perfetto) and `table.txt` of a few early steps.

    Args:
        folder: Where they go; made where it is absent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._profiler: profile | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        num_left = state.max_steps - state.global_step
        if num_left < 1:
            return
        warmup = min(_WARMUP, num_left - 1)
        active = min(_ACTIVE, num_left - warmup)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(
                wait=min(_WAIT, num_left - warmup - active), warmup=warmup, active=active, repeat=1
            ),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """Stops the profiler, however training ended."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        averages = profiler.key_averages()
        table = _parts(averages)
        operations = averages.table(sort_by="self_cpu_time_total", row_limit=20)
        (self.folder / "table.txt").write_text(f"{table}\n\n{operations}", "utf-8")
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        print(f"{table}\ntrace and table of operations: {self.folder}")


def _parts(averages: Any) -> str:
    """Milliseconds of a step, by part."""
    on_gpu = torch.cuda.is_available()
    milliseconds = dict.fromkeys(
        (TEACHER, STUDENT, LOSS, FORWARD_AND_BACKWARD, _DATA, _OPTIMISER), 0.0
    )
    whole, num_steps = 0.0, 0
    for event in averages:
        time = max(event.cpu_time_total, event.device_time_total if on_gpu else 0) / 1000
        if event.key.startswith(_STEP):
            whole, num_steps = whole + time, num_steps + event.count
        for name in milliseconds:
            if event.key.startswith(name):
                milliseconds[name] += time
    forward = sum(milliseconds[name] for name in (TEACHER, STUDENT, LOSS))
    parts = {
        "next batch": milliseconds[_DATA],
        "teacher, forward or cache": milliseconds[TEACHER],
        "student, forward": milliseconds[STUDENT],
        "loss": milliseconds[LOSS],
        "student, backward": milliseconds[FORWARD_AND_BACKWARD] - forward,
        "optimiser": milliseconds[_OPTIMISER],
    }
    parts["rest"] = whole - sum(parts.values())
    lines = [f"{'part of a step':36} {'ms':>9} {'share':>6}"]
    for name, time in {**parts, "whole step": whole}.items():
        lines.append(f"{name:36} {time / num_steps:9.1f} {time / whole:6.0%}")
    return "\n".join(lines)
