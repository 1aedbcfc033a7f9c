"""Query, key and value states of a teacher layer on disk, so that the teacher need not run again.

One safetensors file for each part of a corpus, memory-mapped: "query", "key" and "value", each
(tokens, hidden size) in bfloat16 with the examples one behind the other as in the corpus, and
"digests" (examples, 3), a hash of each state of each example, 0 where nothing is there yet. The
file is made at its full size, so a disk that fills up later does no harm, and is filled as training
goes: an example that is absent, or whose bytes do not fit their hash (a kill in the middle, two
writers at once, damage), is computed by the teacher and written again. So nothing needs to be
waited for, and nothing is lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import xxhash
from filelock import FileLock, ReadWriteLock
from torch import Tensor

from minilm_exp.errors import ExperimentError

# Raised when the files below change their meaning, so that old caches are left alone.
CACHE_VERSION = 1

# Left free on the disk for what else a run writes.
_MARGIN_BYTES = 2**30

_STATES = ("query", "key", "value")
_PARTS = ("train", "validation")
_log = logging.getLogger(__name__)

States = dict[str, Tensor]


@dataclass
class Plan:
    """Whether the states are cached, why, and how large the cache will be."""

    use: bool
    reason: str
    num_bytes: int


def plan_teacher_cache(
    asked: str,
    precision: str,
    num_tokens: int,
    hidden_size: int,
    times_read: float,
    folder: Path,
    key: str,
    limit_bytes: float,
) -> Plan:
    """Decides by sizes and by how often each example is read, never by timing.

    Args:
        asked: true, false or auto.
        precision: fp32 or bf16, resolved. In fp32 `auto` does not cache: the cache is bf16, which
            would change the result beyond float32 rounding.
        num_tokens: Tokens of all examples, training and validation.
        hidden_size: Of the teacher's states.
        times_read: How often a training example is read, over all epochs and cells of a grid.
        folder: Where the caches of all teachers lie.
        key: Names the cache among them. Where it is there already, `auto` uses it.
        limit_bytes: What all of them together may hold.

    Raises:
        ExperimentError: It is asked for and does not fit.
    """
    num_bytes = num_tokens * len(_STATES) * hidden_size * 2
    size = f"{num_tokens} tokens x 3 states x {hidden_size} x 2 bytes = {_gigabytes(num_bytes)}"
    if asked == "false":
        return Plan(False, "runtime.teacher_cache=false", num_bytes)
    problem = None
    if num_bytes > limit_bytes:
        problem = (
            f"{size}, above runtime.teacher_cache_gb={limit_bytes / 1e9:g}: raise that, take less"
            " text, or set runtime.teacher_cache=false"
        )
    else:
        free, cached = _free_bytes(folder), sum(map(_size, _folders(folder)))
        if num_bytes + _MARGIN_BYTES > free + cached:
            problem = f"{size}, but {_no_room(folder, free, cached)}"
    if asked == "true":
        if problem:
            raise ExperimentError(f"the teacher cache does not fit: {problem}")
        return Plan(True, f"runtime.teacher_cache=true: {size} in {folder}", num_bytes)
    if precision == "fp32":
        reason = "training.precision is fp32, and a bf16 cache would change the result"
    elif times_read < 2 and not _is_there(folder / key):
        reason = f"an example is read {times_read:.1f} times, fewer than 2"
    else:
        why = f"an example is read {times_read:.1f} times"
        if _is_there(folder / key):
            why = "an earlier run made it"
        reason = problem or f"{why}; {size} in {folder}"
        return Plan(problem is None, f"runtime.teacher_cache=auto: {reason}", num_bytes)
    return Plan(False, f"runtime.teacher_cache=auto: {reason}", num_bytes)


class TeacherCache:
    """The states of the examples of one part of a corpus.

    Args:
        file: Made where it is absent, cut off or of another shape.
        lengths: Tokens of each example.
        hidden_size: Of the teacher.

    Raises:
        OSError: The disk has not the room.
    """

    def __init__(self, file: Path, lengths: numpy.ndarray, hidden_size: int) -> None:
        self._ends = numpy.cumsum(lengths, dtype=numpy.int64)
        self._lengths = lengths
        self._file = file
        header, layout, size = _layout(len(lengths), int(self._ends[-1]), hidden_size)
        if not _is_whole(file, header, size):
            _create(file, header, size)
        self._states: dict[str, numpy.ndarray] = {
            name: numpy.memmap(file, numpy.uint16, "r+", *layout[name]) for name in _STATES
        }
        self._digests = numpy.memmap(file, numpy.uint64, "r+", *layout["digests"])

    def states(
        self,
        index: Tensor,
        names: list[str],
        attention_mask: Tensor | None,
        compute: Callable[[Tensor], States],
    ) -> States:
        """States (examples, tokens, hidden size) in bfloat16, zero where the mask is.

        Args:
            index: Numbers of the examples of a batch.
            names: Which states are wanted.
            attention_mask: (examples, tokens); None where all examples fill the batch.
            compute: Runs the teacher on the given rows of the batch; called only where something
                is not in the cache, and then for all three states.
        """
        found = [self._read(number, names) for number in index.tolist()]
        missing = [row for row, states in enumerate(found) if states is None]
        if missing:
            computed = {
                name: state.to(torch.bfloat16).cpu()
                for name, state in compute(torch.tensor(missing, device=index.device)).items()
            }
            for place, row in enumerate(missing):
                keep = slice(None) if attention_mask is None else attention_mask[row].bool().cpu()
                states = {name: state[place][keep] for name, state in computed.items()}
                self._write(int(index[row]), states)
                found[row] = states
        return {
            name: _stack([states[name] for states in found if states], attention_mask).to(
                index.device
            )
            for name in names
        }

    def num_cached(self) -> int:
        """Examples that have been written."""
        return int(self._digests.all(axis=1).sum())

    def _read(self, number: int, names: list[str]) -> States | None:
        """The states of an example, or None where they are absent or damaged."""
        span = slice(self._ends[number] - self._lengths[number], self._ends[number])
        digests = self._digests[number].tolist()
        if 0 in digests:
            return None
        states = {}
        for name in names:
            place = _STATES.index(name)
            stored = self._states[name][span].copy()
            if _digest(stored) != digests[place]:
                _log.warning(
                    "%s: example %d is damaged, or another run is writing it; computed again",
                    self._file,
                    number,
                )
                return None
            states[name] = torch.from_numpy(stored).view(torch.bfloat16)
        return states

    def _write(self, number: int, states: States) -> None:
        span = slice(self._ends[number] - self._lengths[number], self._ends[number])
        self._digests[number] = 0
        digests = []
        for name in _STATES:
            new = states[name].contiguous().view(torch.uint16).numpy()
            self._states[name][span] = new
            digests.append(_digest(new))
        # All at the end, so that no state of one writer stands beside one of another.
        self._digests[number] = digests


class TeacherCaches:
    """The caches of the two parts of a corpus, opened for use and safe from eviction until closed.

    Args:
        root: Where the caches of all teachers lie.
        key: Names what the states depend on: teacher, layer, corpus and precision.
        lengths: Tokens of each example of the parts "train" and "validation".
        hidden_size: Of the teacher.
        plan: From `plan_teacher_cache`.
        limit_bytes: What all caches together may hold; the least recently used go first.

    Raises:
        ExperimentError: Those in use leave no room under the limit, or the cache cannot be made.
    """

    def __init__(
        self,
        root: Path,
        key: str,
        lengths: dict[str, numpy.ndarray],
        hidden_size: int,
        plan: Plan,
        limit_bytes: float,
    ) -> None:
        self._folder = root / key
        files = {part: self._folder / f"{part}-{len(lengths[part])}.safetensors" for part in _PARTS}
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._in_use = _use_lock(self._folder)
            with FileLock(root / ".lock"):
                _make_room(root, list(files.values()), plan.num_bytes, limit_bytes)
                self._folder.mkdir(exist_ok=True)
                self._in_use.acquire_read()
                self._open(files, lengths, hidden_size)
        except (OSError, sqlite3.Error) as error:
            raise ExperimentError(
                f"the teacher cache of {_gigabytes(plan.num_bytes)} cannot be made in"
                f" {self._folder}: {getattr(error, 'strerror', None) or error}; free space, set"
                " outputs_dir to another disk, or set runtime.teacher_cache=false"
            ) from error

    def _open(
        self, files: dict[str, Path], lengths: dict[str, numpy.ndarray], hidden_size: int
    ) -> None:
        new = [file for file in files.values() if not file.exists()]
        try:
            os.utime(self._folder)
            self.train, self.validation = (
                TeacherCache(files[part], lengths[part], hidden_size) for part in _PARTS
            )
        except BaseException:
            # The run goes on without them, and needs the room.
            for file in new:
                file.unlink(missing_ok=True)
            self.close()
            raise

    def close(self) -> None:
        """Lets the cache be evicted when room is needed."""
        for part in _PARTS:
            vars(self).pop(part, None)  # its memory map would keep the room of an evicted file
        with contextlib.suppress(OSError):  # somebody has removed it
            os.utime(self._folder)
        self._in_use.release()


def _layout(
    num_examples: int, num_tokens: int, hidden_size: int
) -> tuple[bytes, dict[str, tuple[int, tuple[int, int]]], int]:
    """Header of the safetensors file, offset and shape of each tensor, and size of the file."""
    shapes = dict.fromkeys(_STATES, (num_tokens, hidden_size))
    entries: dict[str, object] = {}
    start = 0
    for name, shape in {"digests": (num_examples, len(_STATES)), **shapes}.items():
        num_bytes = shape[0] * shape[1] * (8 if name == "digests" else 2)
        entries[name] = {
            "dtype": "U64" if name == "digests" else "BF16",
            "shape": list(shape),
            "data_offsets": [start, start + num_bytes],
        }
        shapes[name] = shape
        start += num_bytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    layout = {
        name: (len(header) + entry["data_offsets"][0], shapes[name])  # type: ignore[index]
        for name, entry in entries.items()
    }
    return header, layout, len(header) + start


def _is_whole(file: Path, header: bytes, size: int) -> bool:
    try:
        with file.open("rb") as opened:
            is_whole = opened.read(len(header)) == header and file.stat().st_size == size
    except FileNotFoundError:
        return False
    if not is_whole:
        _log.warning("%s is damaged; it is made again", file)
    return is_whole


def _create(file: Path, header: bytes, size: int) -> None:
    """Takes the whole size from the disk at once, so that no later write can fail."""
    # What is there is of no use, and would take the room twice.
    file.unlink(missing_ok=True)
    partial = file.with_suffix(".partial")
    try:
        with partial.open("wb") as opened:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, size)
            else:  # macOS
                opened.truncate(size)
            opened.write(header)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def _digest(states: numpy.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(states.data)


def _stack(states: list[Tensor], attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.stack(states)
    stacked = states[0].new_zeros(*attention_mask.shape, states[0].shape[-1])
    stacked[attention_mask.bool().cpu()] = torch.cat(states)
    return stacked


def _use_lock(folder: Path) -> ReadWriteLock:
    return ReadWriteLock(folder.with_name(f".{folder.name}.db"), is_singleton=False)


def _make_room(root: Path, files: list[Path], num_bytes: int, limit_bytes: float) -> None:
    """Evicts the least recently used caches until `files` fit; none where that is not enough."""
    there = sum(map(_file_size, files))
    others = {folder: _size(folder) for folder in _folders(root)}
    if files[0].parent in others:
        others[files[0].parent] -= there
    held, free = sum(others.values()), _free_bytes(root)
    over_limit = held + num_bytes - limit_bytes
    over_disk = num_bytes + _MARGIN_BYTES - there - free
    if max(over_limit, over_disk) <= 0:
        return
    idle = [folder for folder in others if others[folder] and not _is_in_use(folder)]
    evictable = sum(others[folder] for folder in idle)
    if over_limit > evictable:
        raise ExperimentError(
            f"the teacher cache needs {_gigabytes(num_bytes)}, other caches that are in use hold"
            f" {_gigabytes(held - evictable)} and runtime.teacher_cache_gb={limit_bytes / 1e9:g}"
            " allows no more: raise it, wait for the other runs, or set"
            " runtime.teacher_cache=false"
        )
    if over_disk > evictable:
        raise ExperimentError(
            f"the teacher cache needs {_gigabytes(num_bytes - there)}, but"
            f" {_no_room(root, free, evictable)}"
        )
    to_free = max(over_limit, over_disk)
    for folder in sorted(idle, key=lambda folder: folder.stat().st_mtime):
        if to_free > 0:
            _evict(folder, files)
            to_free -= others[folder]


def _is_in_use(folder: Path) -> bool:
    try:
        with _use_lock(folder).write_lock(timeout=0):
            return False
    except (OSError, sqlite3.Error):  # a Timeout is an OSError
        return True


def _evict(folder: Path, keep: list[Path]) -> None:
    """Removes an idle cache, but for the files that are wanted."""
    for file in folder.iterdir():
        if file not in keep:
            file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
    _log.info("teacher cache %s was the least recently used one and made room", folder)


def _folders(root: Path) -> list[Path]:
    """One for each cache; what is hidden belongs to the locks."""
    return [path for path in root.glob("*") if path.is_dir() and path.name[0] != "."]


def _size(folder: Path) -> int:
    return sum(_file_size(Path(folder, name)) for _, _, names in os.walk(folder) for name in names)


def _file_size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # or another run has just evicted it
        return 0


def _no_room(folder: Path, free: int, evictable: int) -> str:
    return (
        f"the disk of {folder} has {_gigabytes(free)} free, older caches could give"
        f" {_gigabytes(evictable)} and {_gigabytes(_MARGIN_BYTES)} stay free: free space, set"
        " outputs_dir to another disk, or set runtime.teacher_cache=false"
    )


def _is_there(folder: Path) -> bool:
    return any(folder.glob("train-*.safetensors"))


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
