"""Training on transformers' Trainer that is stopped and gone on with at a step, losing nothing."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from minilm_exp import processes
from minilm_exp.errors import ExperimentError, Interrupted
from minilm_exp.provenance import fingerprint_files

_log = logging.getLogger(__name__)
_WHOLE = "whole.json"
_PARTIAL = ".partial"
# In so many seconds a signal is the same one: a terminal, torchrun and Slurm each pass it on.
_SAME_SIGNAL_SECONDS = 3
# Of a batch that is not finite, so many examples are named.
_NUM_NAMED = 64


class Stop:
    """Notes SIGTERM and SIGINT while training, which then ends after its step and a checkpoint.

    A signal more than three seconds later ends the process at once. Threads get no signals: there
    nothing is noted. SIGUSR2 is noted where somebody waits for it, as submitit does for Slurm's end
    of time, and gets it when the checkpoint is there.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._first = 0.0
        self._process = os.getpid()
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            waited_for = callable(signal.getsignal(signal.SIGUSR2))
            usual = (signal.SIGTERM, signal.SIGINT)
            for number in (*usual, *((signal.SIGUSR2,) if waited_for else ())):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that loads data ends with its parent
            return
        name = signal.Signals(number).name
        if self.signal is None:
            self.signal, self._first = name, time.monotonic()
            _log.warning("%s: ending after this step, with a checkpoint; once more ends now", name)
        elif time.monotonic() - self._first > _SAME_SIGNAL_SECONDS:
            raise Interrupted(name, "ended within a step; the last checkpoint stands")


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Lets nothing but SIGKILL end what is done within; for moments."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class CheckpointedTrainer(Trainer):
    """The library's training loop, whose checkpoints are whole or not there.

    A checkpoint is written under another name and renamed, with the hashes of its files. What is
    averaged for the next log goes with it, so that a resumed run logs the same. Loss and gradient
    must be finite before a step changes the weights. In several processes, all end after the same
    step, and the checkpoint is renamed when each has written its part.
    """

    def __init__(self, keep_checkpoints: int, subject: str, remedy: str, **arguments: Any) -> None:
        """Args are the library's, and these.

        Args:
            keep_checkpoints: How many stay, the latest.
            subject: What is trained, for messages.
            remedy: Which settings to change where the loss is not finite.
            arguments: Of the library.
        """
        super().__init__(**arguments)
        self._keep_checkpoints = keep_checkpoints
        self._subject, self._remedy = subject, remedy
        self._sums: Tensor | None = None
        self._num_summed = 0
        self._losses: list[tuple[Tensor, list[int]]] = []
        self.stop = Stop()
        self.start: Path | None = None
        self._is_saving = False
        self.add_callback(_Steps(self))

    def train_whole(self, start: Path | None) -> None:
        """Trains to the last step.

        Args:
            start: The checkpoint to go on from.

        Raises:
            Interrupted: A signal ended it before; a checkpoint of its last step is there.
            ExperimentError: A loss or a gradient is not finite.
        """
        self.start = start
        with self.stop, tensors_only(start):
            self.train(resume_from_checkpoint=str(start) if start else None)
        if self.stop.signal == "SIGUSR2":
            signal.raise_signal(signal.SIGUSR2)
        if self.stop.signal is not None:
            step, saves = self.state.global_step, self.args.save_strategy != "no"
            raise Interrupted(
                self.stop.signal,
                f"{self._subject} ended after step {step} of {self.state.max_steps}, "
                + ("with a checkpoint" if saves else "without a checkpoint"),
            )

    def save_more(self, folder: Path) -> None:
        """For what else belongs into a checkpoint; called by the first process."""

    def may_save(self) -> bool:
        """Whether a run that goes on after this step can begin from a checkpoint of now."""
        return True

    def note_loss(self, loss: Tensor, examples: list[int]) -> None:
        """The loss of a micro-batch, and the numbers of its examples, for when it is not finite."""
        self._losses.append((loss.detach(), examples))

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _PARTIAL) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root = Path(str(self.args.output_dir))
        partial = root / _PARTIAL
        if processes.is_leader():
            shutil.rmtree(partial, ignore_errors=True)
        processes.wait_for_all()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        name = f"checkpoint-{self.state.global_step}"
        running = {
            "loss": float(self._tr_loss),
            "last_logged": self._globalstep_last_logged,
            "sums": None if self._sums is None else self._sums.tolist(),
            "num_summed": self._num_summed,
        }
        (partial / name / _running(processes.rank())).write_text(json.dumps(running), "utf-8")
        processes.wait_for_all()
        if processes.is_leader():
            self.save_more(partial / name)
            files = sorted((partial / name).iterdir())
            digests = {file.name: fingerprint_files([file]) for file in files}
            (partial / name / _WHOLE).write_text(json.dumps(digests), "utf-8")
            shutil.rmtree(root / name, ignore_errors=True)
            (partial / name).rename(root / name)
            shutil.rmtree(partial)
            # Not by their times, as the library does: a clock may go backwards.
            for old in _by_step(root)[self._keep_checkpoints :]:
                shutil.rmtree(old)
        processes.wait_for_all()

    def take_up_running(self, start: Path) -> None:
        """What was averaged at a checkpoint and not yet logged."""
        file = start / _running(processes.rank())
        if not file.is_file():  # of another number of processes
            return
        running = json.loads(file.read_text("utf-8"))
        self._tr_loss.fill_(running["loss"])
        self._globalstep_last_logged = running["last_logged"]
        if running["sums"] is not None:
            self._sums = torch.tensor(running["sums"], device=self.args.device)
            self._num_summed = running["num_summed"]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses, self._losses = self._losses, []
        is_finite = math.isfinite(float(norm)) and all(
            bool(torch.isfinite(loss)) for loss, _ in losses
        )
        if processes.any_of_all(not is_finite):
            self._refuse(float(norm), losses)
        return norm

    def _refuse(self, norm: float, losses: list[tuple[Tensor, list[int]]]) -> None:
        own = [(float(loss), examples) for loss, examples in losses]
        found = [batch for batches in processes.gather(own) for batch in batches]
        wrong = [batch for batch in found if not math.isfinite(batch[0])]
        step = self.state.global_step + 1
        if wrong:
            what = f"the loss is {wrong[0][0]} at step {step}"
        else:
            what = f"the loss is finite but its gradient has the norm {norm} at step {step}"
        examples = sorted(number for _, numbers in wrong or found for number in numbers)
        named = ", ".join(map(str, examples[:_NUM_NAMED]))
        named += f" and {len(examples) - _NUM_NAMED} more" if len(examples) > _NUM_NAMED else ""
        last = last_whole_checkpoint(Path(str(self.args.output_dir)))
        raise ExperimentError(
            f"{self._subject}: {what}, training examples {named} (counted from 0);"
            f" the last good checkpoint is {last.name if last else 'none'}: {self._remedy}"
        )


class _Steps(TrainerCallback):
    """Begins where a checkpoint left off, and ends all processes after the same step."""

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._trainer.start is not None:
            self._trainer.take_up_running(self._trainer.start)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # What was averaged until a planned checkpoint is written out with it.
        control.should_log = control.should_log or control.should_save
        stop = self._trainer.stop
        if processes.any_of_all(stop.signal is not None):
            stop.signal = stop.signal or "SIGTERM"
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no" and self._trainer.may_save()


@contextmanager
def tensors_only(checkpoint: Path | None) -> Iterator[None]:
    """Says what to do about a checkpoint that was not written by a run."""
    try:
        yield
    except UnpicklingError as error:
        raise ExperimentError(
            f"{checkpoint} has a file that is not made of tensors and numbers alone and would run"
            " code: no run wrote it; remove that folder, and find out who put it there"
        ) from error


def take_up(checkpoints: Path) -> Path | None:
    """The latest whole checkpoint, or None; what was written after it is removed."""
    start = last_whole_checkpoint(checkpoints)
    for folder in _by_step(checkpoints):
        if folder == start:
            break
        shutil.rmtree(folder)
    return start


def last_whole_checkpoint(checkpoints: Path) -> Path | None:
    """The latest checkpoint whose files are all there, as they were written; or None."""
    for folder in _by_step(checkpoints):
        try:
            digests = json.loads((folder / _WHOLE).read_text(encoding="utf-8"))
            present = {name: fingerprint_files([folder / name]) for name in digests}
            damaged = [name for name, digest in digests.items() if present[name] != digest]
        except (OSError, ValueError, AttributeError, ExperimentError) as error:
            damaged = [str(error)]
        if not damaged:
            return folder
        _log.warning("checkpoint %s is damaged (%s): the one before counts", folder, damaged[0])
    return None


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def _by_step(checkpoints: Path) -> list[Path]:
    """The latest first."""
    return sorted(checkpoints.glob("checkpoint-*"), key=step_of, reverse=True)


def _running(rank: int) -> str:
    return f"running-{rank}.json"
