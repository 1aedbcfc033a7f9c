"""The cache of the teacher's states: what it gives back, and every fault it must live through.

Faults are caused, not imagined: bytes are flipped in the files, processes are killed, several write
at once, and the disk says no. A `Teacher` stands for the forward pass and counts what it is asked.
"""

import copy
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy
import pytest
import torch
from filelock import FileLock
from hydra.types import RunMode
from omegaconf import OmegaConf
from safetensors import safe_open
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, Qwen3Config, Qwen3Model

from minilm_exp import pipeline, stages, teacher_cache
from minilm_exp.corpus import Blocks, PreparedCorpus
from minilm_exp.distil import Distiller, distil
from minilm_exp.errors import ExperimentError
from minilm_exp.objectives import Objective, build_objective
from minilm_exp.pipeline import run_experiment
from minilm_exp.precision import teacher_dtype
from minilm_exp.provenance import run_key
from minilm_exp.states import State, StateTap
from minilm_exp.teacher_cache import Plan, TeacherCache, TeacherCaches, plan_teacher_cache
from minilm_exp.terms import Relations

REPOSITORY = Path(__file__).resolve().parents[1]
STATES = ["query", "key", "value"]
HIDDEN = 8
RAGGED = numpy.array([3, 7, 2, 5, 7, 4])
FULL = numpy.full(6, 5)
GIGABYTE = 10**9
MARGIN = 2**30


def state_of(number, name, length, writer=0, hidden=HIDDEN):
    """What a teacher computes for an example; another writer's differs by a rounding."""
    draw = torch.Generator().manual_seed(10 * number + STATES.index(name))
    state = torch.randn(length, hidden, generator=draw)
    return state * (1 + 2**-6 * writer)


def rounded(number, name, length, writer=0, hidden=HIDDEN):
    return state_of(number, name, length, writer, hidden).to(torch.bfloat16)


class Teacher:
    """Computes rows of a batch like a teacher does, padding included, and counts the examples."""

    def __init__(self, lengths, writer=0, hidden=HIDDEN):
        self.lengths, self.writer, self.hidden = lengths, writer, hidden
        self.asked = []

    def on(self, numbers, mask):
        def compute(rows):
            computed = {}
            wanted = [numbers[row] for row in rows.tolist()]
            self.asked += wanted
            for name in STATES:
                states = [
                    state_of(number, name, int(self.lengths[number]), self.writer, self.hidden)
                    for number in wanted
                ]
                if mask is None:
                    computed[name] = torch.stack(states)
                    continue
                # What a teacher leaves on padding is anything.
                computed[name] = torch.full((*mask[rows].shape, self.hidden), torch.nan)
                computed[name][mask[rows].bool()] = torch.cat(states)
            return computed

        return compute


def mask_of(lengths, numbers, side):
    width = max(int(lengths[number]) for number in numbers) + 1
    mask = torch.zeros(len(numbers), width, dtype=torch.long)
    for row, number in enumerate(numbers):
        length = int(lengths[number])
        mask[row, :length] = 1
        if side == "left":
            mask[row] = mask[row].flip(0)
    return mask


def read(cache, teacher, numbers, names=STATES, side=None):
    """A batch through the cache; checks that each state is the teacher's, and zero on padding."""
    mask = None if side is None else mask_of(teacher.lengths, numbers, side)
    states = cache.states(torch.tensor(numbers), list(names), mask, teacher.on(numbers, mask))
    assert sorted(states) == sorted(names)
    for name, state in states.items():
        assert state.dtype == torch.bfloat16
        for row, number in enumerate(numbers):
            length = int(teacher.lengths[number])
            keep = slice(None) if mask is None else mask[row].bool()
            expected = rounded(number, name, length, teacher.writer, teacher.hidden)
            assert torch.equal(state[row][keep], expected), (number, name)
            if mask is not None:
                assert torch.equal(state[row][~keep], torch.zeros_like(state[row][~keep]))
    return states


def filled(file, lengths):
    """A cache with every example in it, closed."""
    numbers = list(range(len(lengths)))
    read(TeacherCache(file, lengths, HIDDEN), Teacher(lengths), numbers, side="right")


def in_process(target, *arguments):
    """Another process, forked so that it starts at once."""
    process = multiprocessing.get_context("fork").Process(
        target=target, args=arguments, daemon=True
    )
    process.start()
    return process


def ended(process, seconds=60):
    """The exit status; a process that hangs fails the test instead of the session."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        pytest.fail("a process hangs")
    return process.exitcode


def received(connection):
    assert connection.poll(30), "the other process says nothing"
    return connection.recv()


# Reading what was written


@pytest.mark.parametrize(
    "lengths, side", [(FULL, None), (RAGGED, "right"), (RAGGED, "left")], ids=str
)
def test_what_is_read_is_what_was_written(tmp_path, lengths, side):
    """Examples are shifted, padding is stored with them, or a state stands for another."""
    teacher = Teacher(lengths)
    cache = TeacherCache(tmp_path / "c", lengths, HIDDEN)
    read(cache, teacher, [4, 1, 3], side=side)
    read(cache, teacher, [0, 2, 5], side=side)
    assert sorted(teacher.asked) == [0, 1, 2, 3, 4, 5]
    teacher.asked.clear()
    for opened in (cache, TeacherCache(tmp_path / "c", lengths, HIDDEN)):
        for numbers in ([0, 1, 2, 3, 4, 5], [5, 0], [2], [3, 3]):
            read(opened, teacher, numbers, side=side)
        assert opened.num_cached() == 6
    assert teacher.asked == []


def test_padding_side_of_the_reader_does_not_matter(tmp_path):
    """States lie where the padding of the writer was, not where the reader's tokens are."""
    teacher = Teacher(RAGGED)
    cache = TeacherCache(tmp_path / "c", RAGGED, HIDDEN)
    read(cache, teacher, [0, 1, 2], side="left")
    read(cache, teacher, [2, 0, 1], side="right")
    read(cache, teacher, [1], side=None)
    assert teacher.asked == [0, 1, 2]


def test_only_missing_rows_are_computed(tmp_path):
    """One new example sends its whole batch through the teacher, or lands in another's place."""
    teacher = Teacher(RAGGED)
    cache = TeacherCache(tmp_path / "c", RAGGED, HIDDEN)
    read(cache, teacher, [1, 4], side="right")
    teacher.asked.clear()
    read(cache, teacher, [0, 1, 2, 4, 5], side="right")
    assert teacher.asked == [0, 2, 5]
    assert cache.num_cached() == 5


def test_all_states_are_kept_where_fewer_are_wanted(tmp_path):
    """A sweep over relation sets runs the teacher once for each."""
    teacher = Teacher(RAGGED)
    cache = TeacherCache(tmp_path / "c", RAGGED, HIDDEN)
    read(cache, teacher, [0, 1], names=["key"], side="right")
    assert teacher.asked == [0, 1]
    for names in (["query"], ["value", "query"], STATES):
        read(cache, teacher, [1, 0], names=names, side="right")
    assert teacher.asked == [0, 1]


def test_rows_that_are_computed_are_those_the_teacher_would_have_run(tmp_path):
    """The rows are numbered among the missing instead of in the batch."""
    cache = TeacherCache(tmp_path / "c", FULL, HIDDEN)
    read(cache, Teacher(FULL), [1])
    rows = []

    def compute(asked):
        rows.append(asked.tolist())
        return Teacher(FULL).on([0, 1, 2], None)(asked)

    cache.states(torch.tensor([0, 1, 2]), STATES, None, compute)
    assert rows == [[0, 2]]


def test_file_is_safetensors(tmp_path):
    """Nothing but this package can read the file, or it reads other numbers."""
    file = tmp_path / "c.safetensors"
    filled(file, RAGGED)
    with safe_open(file, "pt") as opened:
        assert sorted(opened.keys()) == ["digests", *sorted(STATES)]
        for name in STATES:
            expected = [rounded(n, name, int(length)) for n, length in enumerate(RAGGED)]
            assert torch.equal(opened.get_tensor(name), torch.cat(expected))
        digests = opened.get_tensor("digests")
    assert digests.dtype == torch.uint64 and digests.shape == (len(RAGGED), 3)
    assert (digests.view(torch.int64) != 0).all()


def test_size_is_taken_when_the_file_is_made(tmp_path):
    """The file has holes, and a disk that fills up later kills the run with a bus error."""
    TeacherCache(tmp_path / "c", numpy.full(500, 64), 64)
    status = (tmp_path / "c").stat()
    assert status.st_size > 500 * 64 * 64 * 3 * 2
    assert status.st_blocks * 512 >= status.st_size


# Damage


def layout_of(file):
    """Where each tensor begins in the file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


def flip(file, offset):
    with file.open("r+b") as opened:
        opened.seek(offset)
        [byte] = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))


def damage_state(name):
    def damage(file):
        start_of_3 = int(RAGGED[:3].sum()) * HIDDEN * 2
        flip(file, layout_of(file)[name] + start_of_3 + 11)

    return damage


def damage_digest(place):
    return lambda file: flip(file, layout_of(file)["digests"] + (3 * 3 + place) * 8 + 5)


def cut_off(file):
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


@pytest.mark.parametrize(
    "damage, computed",
    [
        *((pytest.param(damage_state(name), [3], id=f"{name} data")) for name in STATES),
        *((pytest.param(damage_digest(place), [3], id=f"digest {place}")) for place in range(3)),
        pytest.param(lambda file: flip(file, 3), range(6), id="length of the header"),
        pytest.param(lambda file: flip(file, 20), range(6), id="header"),
        pytest.param(cut_off, range(6), id="cut off"),
        pytest.param(lambda file: file.write_bytes(b""), range(6), id="empty"),
        pytest.param(lambda file: file.write_bytes(b"x" * 5000), range(6), id="something else"),
    ],
)
def test_damage_is_found_and_repaired(tmp_path, caplog, damage, computed):
    """A flipped bit trains the student on noise, or costs more than the example it hit."""
    file = tmp_path / "c.safetensors"
    filled(file, RAGGED)
    damage(file)
    teacher = Teacher(RAGGED)
    for _ in range(2):
        read(TeacherCache(file, RAGGED, HIDDEN), teacher, list(range(6)), side="right")
    assert teacher.asked == list(computed)
    assert "damaged" in caplog.text


def test_damage_under_an_open_cache_is_found(tmp_path):
    """Only what is on disk when the run begins is checked."""
    file = tmp_path / "c.safetensors"
    teacher = Teacher(RAGGED)
    cache = TeacherCache(file, RAGGED, HIDDEN)
    read(cache, teacher, list(range(6)), side="right")
    teacher.asked.clear()
    damage_state("key")(file)
    read(cache, teacher, list(range(6)), names=["key"], side="right")
    assert teacher.asked == [3]


def test_made_again_in_the_room_of_the_damaged_one(tmp_path, monkeypatch):
    """A damaged cache lies beside its successor, and a disk with room for one has none for two."""
    file = tmp_path / "c.safetensors"
    filled(file, RAGGED)
    flip(file, 20)
    seen = []
    fallocate = os.posix_fallocate

    def watched(*arguments):
        seen.append([path.name for path in tmp_path.iterdir()])
        fallocate(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", watched)
    TeacherCache(file, RAGGED, HIDDEN)
    assert seen == [["c.partial"]]


# Killed in the middle

MANY, LONG, WIDE = 1500, 32, 64


def fill_slowly(file, began):
    lengths = numpy.full(MANY, LONG)
    teacher = Teacher(lengths, hidden=WIDE)
    cache = TeacherCache(file, lengths, WIDE)
    began.set()
    for number in range(MANY):
        cache.states(torch.tensor([number]), ["key"], None, teacher.on([number], None))
    time.sleep(60)


@pytest.mark.parametrize("attempt", range(3))
def test_killed_at_any_time(tmp_path, attempt):
    """A half-written example is taken for a whole one."""
    began = multiprocessing.get_context("fork").Event()
    process = in_process(fill_slowly, tmp_path / "c", began)
    assert began.wait(30)
    time.sleep(random.uniform(0.0, 0.15))
    process.kill()
    assert ended(process) == -signal.SIGKILL
    lengths = numpy.full(MANY, LONG)
    cache = TeacherCache(tmp_path / "c", lengths, WIDE)
    num_written = cache.num_cached()
    teacher = Teacher(lengths, hidden=WIDE)
    read(cache, teacher, list(range(MANY)))
    assert len(teacher.asked) == MANY - num_written


class Killing:
    """A state's array in whose middle, or right behind which, the process dies."""

    def __init__(self, array, number_of_tokens):
        self.array, self.number_of_tokens = array, number_of_tokens

    def __getitem__(self, span):
        return self.array[span]

    def __setitem__(self, span, new):
        self.array[span.start : span.start + self.number_of_tokens] = new[: self.number_of_tokens]
        os.kill(os.getpid(), signal.SIGKILL)


def write_and_die(file, name, number_of_tokens):
    cache = TeacherCache(file, RAGGED, HIDDEN)
    cache._states[name] = Killing(cache._states[name], number_of_tokens)
    # Another writer's values, so that old and new bytes differ.
    read(cache, Teacher(RAGGED, writer=1), [3], side="right")


@pytest.mark.parametrize("number_of_tokens", [2, 5], ids=["in the state", "before the digest"])
@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("was_written", [False, True], ids=["first", "again"])
def test_killed_between_state_and_digest(tmp_path, name, number_of_tokens, was_written):
    """The old digest stands beside new bytes, or a state of one write beside one of another."""
    file = tmp_path / "c.safetensors"
    if was_written:
        filled(file, RAGGED)
        damage_state("query")(file)
    status = ended(in_process(write_and_die, file, name, number_of_tokens))
    assert status == -signal.SIGKILL
    for names in (["query"], ["key"], ["value"], STATES):
        teacher = Teacher(RAGGED)
        copied = shutil.copy(file, tmp_path / "copied")
        read(TeacherCache(Path(copied), RAGGED, HIDDEN), teacher, [3], names, side="right")
        assert teacher.asked == [3]


def make_and_die(file):
    os.posix_fallocate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    TeacherCache(file, RAGGED, HIDDEN)


def test_killed_while_the_file_is_made(tmp_path):
    """The left-over of one run keeps every later one from making the cache."""
    file = tmp_path / "c.safetensors"
    assert ended(in_process(make_and_die, file)) == -signal.SIGKILL
    assert not file.exists() and list(tmp_path.iterdir())
    filled(file, RAGGED)
    assert list(tmp_path.iterdir()) == [file]


# Two at once

SHARED = numpy.full(12, 48)


def write_for_a_while(file, writer, seconds, barrier):
    cache = TeacherCache(file, SHARED, WIDE)
    teacher = Teacher(SHARED, writer, WIDE)
    order = random.Random(writer)
    numbers = order.sample(range(len(SHARED)), len(SHARED))
    states = {
        number: {name: rounded(number, name, 48, writer, WIDE) for name in STATES}
        for number in numbers
    }
    barrier.wait(30)
    for number in numbers:
        cache.states(torch.tensor([number]), ["query"], None, teacher.on([number], None))
    # What follows only happens to damaged examples, but then it must be right as well.
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number = order.choice(numbers)
        cache._write(number, states[number])


def writer_of(states, row, number):
    """Whose values these are; fails where they are nobody's, or not all of the same writer."""
    [writer] = [
        writer
        for writer in range(3)
        if all(
            torch.equal(states[name][row], rounded(number, name, 48, writer, WIDE))
            for name in STATES
        )
    ]
    return writer


def test_two_writers_never_mix(tmp_path):
    """Half of an example, or its queries and not its keys, come from another run's rounding."""
    file = tmp_path / "c.safetensors"
    TeacherCache(file, SHARED, WIDE)
    barrier = multiprocessing.get_context("fork").Barrier(3)
    writers = [in_process(write_for_a_while, file, writer, 0.7, barrier) for writer in (0, 1)]
    cache = TeacherCache(file, SHARED, WIDE)
    own = Teacher(SHARED, writer=2, hidden=WIDE)
    numbers = list(range(len(SHARED)))
    barrier.wait(30)
    seen = set()
    while any(process.is_alive() for process in writers):
        states = cache.states(torch.tensor(numbers), STATES, None, own.on(numbers, None))
        seen |= {writer_of(states, row, number) for row, number in enumerate(numbers)}
    assert [ended(process) for process in writers] == [0, 0]
    assert seen & {0, 1}
    own.asked.clear()
    reopened = TeacherCache(file, SHARED, WIDE)
    for _ in range(2):
        states = reopened.states(torch.tensor(numbers), STATES, None, own.on(numbers, None))
        [writer_of(states, row, number) for row, number in enumerate(numbers)]
    # What the last two writes left torn is found, and computed once.
    assert len(own.asked) == len(set(own.asked)) < len(SHARED)


LENGTHS = {"train": RAGGED, "validation": RAGGED[:2]}
NEEDED = int(RAGGED.sum() + RAGGED[:2].sum()) * HIDDEN * 2 * 3
USE = Plan(True, "", NEEDED)


def opened_caches(root, key="key", limit_bytes=GIGABYTE, **more):
    arguments = {"lengths": LENGTHS, "hidden_size": HIDDEN, "plan": USE} | more
    return TeacherCaches(root, key, limit_bytes=limit_bytes, **arguments)


def create_and_fill(root, numbers, barrier):
    barrier.wait(30)
    caches = opened_caches(root)
    read(caches.train, Teacher(RAGGED), numbers, side="right")
    barrier.wait(30)  # both are open
    caches.close()


def test_two_processes_create_the_same_cache(tmp_path):
    """The second takes the file from under the first, and what that one writes is lost."""
    barrier = multiprocessing.get_context("fork").Barrier(2)
    processes = [
        in_process(create_and_fill, tmp_path / "root", numbers, barrier)
        for numbers in ([0, 1, 2], [3, 4, 5])
    ]
    assert [ended(process) for process in processes] == [0, 0]
    caches = opened_caches(tmp_path / "root")
    teacher = Teacher(RAGGED)
    read(caches.train, teacher, [0, 1, 2, 3, 4, 5], side="right")
    assert teacher.asked == []
    caches.close()


# A full disk

Usage = namedtuple("Usage", "total used free")


def with_free(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**15, 10**15 - free, free))


def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*.*") if path.name[0] != ".")


@pytest.mark.parametrize("number_of_files", [0, 1])
def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, number_of_files):
    """Gigabytes of a cache that cannot be used stay on a disk that is full."""
    fallocate, calls = os.posix_fallocate, []

    def fail_later(*arguments):
        calls.append(arguments)
        (no_room if len(calls) > number_of_files else fallocate)(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", fail_later)
    with pytest.raises(
        ExperimentError, match=r"0\.00 GB cannot be made in .*key: No space"
    ) as told:
        opened_caches(tmp_path)
    assert "runtime.teacher_cache=false" in str(told.value)
    assert "outputs_dir" in str(told.value)
    assert files_below(tmp_path) == []
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    opened_caches(tmp_path).close()


def test_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    """A validation part that does not fit costs the states of the training part."""
    caches = opened_caches(tmp_path)
    read(caches.train, Teacher(RAGGED), list(range(6)), side="right")
    caches.close()
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    more = {"train": RAGGED, "validation": RAGGED[:3]}
    with pytest.raises(ExperimentError, match="No space"):
        opened_caches(tmp_path, lengths=more)
    assert files_below(tmp_path) == ["train-6.safetensors", "validation-2.safetensors"]
    caches = opened_caches(tmp_path)
    assert caches.train.num_cached() == 6
    caches.close()


def open_with_small_files(root, said):
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
    try:
        opened_caches(root)
    except ExperimentError as error:
        said.put(str(error))


def test_limit_of_the_system_is_told(tmp_path):
    """The kernel's own refusal is a traceback, or a signal."""
    said = multiprocessing.get_context("fork").SimpleQueue()
    assert ended(in_process(open_with_small_files, tmp_path, said)) == 0
    message = said.get()
    assert "File too large" in message and "runtime.teacher_cache=false" in message
    assert files_below(tmp_path) == []


def test_margin_stays_free_where_others_are_in_use(tmp_path, monkeypatch):
    """The plan counts on caches that turn out to be in use, and checkpoints find no room."""
    other = opened_caches(tmp_path, "other")
    with_free(monkeypatch, MARGIN)
    with pytest.raises(ExperimentError, match=r"1\.07 GB free.*0\.00 GB and 1\.07 GB stay free"):
        opened_caches(tmp_path)
    assert not (tmp_path / "key").exists()
    other.close()
    opened_caches(tmp_path).close()
    assert not (tmp_path / "other").exists()


def test_refused_by_the_file_system(tmp_path):
    """A lock that cannot be had is a traceback instead of the way to go on without."""
    (tmp_path / ".key.db").write_bytes(b"not a database, but long enough to be read as one" * 30)
    with pytest.raises(ExperimentError, match=r"runtime\.teacher_cache=false"):
        opened_caches(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match=r"runtime\.teacher_cache=false"):
        opened_caches(tmp_path / "file" / "root")


# The plan


def planned(
    asked="auto", precision="bf16", times_read=2.0, limit=20 * GIGABYTE, folder="nowhere", **more
):
    arguments = {"num_tokens": 1_000_000, "hidden_size": 384} | more
    return plan_teacher_cache(
        asked,
        precision,
        times_read=times_read,
        folder=Path(folder),
        key="k",
        limit_bytes=limit,
        **arguments,
    )


SIZE = "1000000 tokens x 3 states x 384 x 2 bytes = 2.30 GB"


@pytest.mark.parametrize(
    "changes, use, reason",
    [
        ({"asked": "false"}, False, "runtime.teacher_cache=false"),
        ({"asked": "true"}, True, f"runtime.teacher_cache=true: {SIZE} in nowhere"),
        ({"asked": "true", "precision": "fp32", "times_read": 1.0}, True, SIZE),
        ({"precision": "fp32"}, False, "auto: training.precision is fp32"),
        ({"times_read": 1.9}, False, "auto: an example is read 1.9 times, fewer than 2"),
        ({}, True, f"auto: an example is read 2.0 times; {SIZE} in nowhere"),
        ({"limit": 2.3e9}, False, f"auto: {SIZE}, above runtime.teacher_cache_gb=2.3: raise"),
    ],
    ids=["false", "true", "true anyway", "fp32", "once", "auto", "limit"],
)
def test_plan(changes, use, reason, monkeypatch):
    """The cache is on where it changes results or costs more than it saves, or says nothing."""
    with_free(monkeypatch, 100 * GIGABYTE)
    plan = planned(**changes)
    assert plan.use is use
    assert reason in plan.reason
    assert plan.num_bytes == 1_000_000 * 3 * 384 * 2


def test_plan_by_the_disk(tmp_path, monkeypatch):
    """The disk is filled to the brim, or the message says that more is free than there is."""
    root = tmp_path / "not" / "there"
    with_free(monkeypatch, 2_304_000_000 + MARGIN)
    assert planned(folder=root).use
    with_free(monkeypatch, 2_304_000_000 + MARGIN - 1)
    plan = planned(folder=root)
    assert not plan.use
    assert f"{SIZE}, but the disk of {root} has 3.38 GB free" in plan.reason
    assert "1.07 GB stay free" in plan.reason and "outputs_dir" in plan.reason
    with pytest.raises(ExperimentError, match=r"does not fit: .* 2\.30 GB, but the disk"):
        planned("true", folder=root)
    # What may be evicted counts, but is not called free.
    (root / "old").mkdir(parents=True)
    with (root / "old" / "states").open("wb") as file:
        file.truncate(GIGABYTE)
    assert planned(folder=root).use
    with_free(monkeypatch, GIGABYTE)
    assert "has 1.00 GB free, older caches could give 1.00 GB and" in planned(folder=root).reason
    assert not root.parent.joinpath("key").exists()


def test_plan_refuses_what_is_above_the_limit(monkeypatch):
    """Asked for and impossible is told after hours, or goes on silently without."""
    with_free(monkeypatch, 100 * GIGABYTE)
    with pytest.raises(ExperimentError, match=r"runtime\.teacher_cache_gb=2\.3") as told:
        planned("true", limit=2.3e9)
    assert SIZE in str(told.value)


def test_plan_beside_a_run_that_evicts(tmp_path, monkeypatch):
    """A cache that is removed while its size is taken ends another run."""
    opened_caches(tmp_path).close()
    folders = teacher_cache._folders

    def then_evicted(root):
        found = folders(root)
        for folder in found:
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(teacher_cache, "_folders", then_evicted)
    assert planned(folder=tmp_path).use


class Tracker:
    """Keeps the tags."""

    def __init__(self):
        self.tags = {}

    def set_tags(self, tags):
        self.tags |= tags


def small_corpus(lengths=RAGGED, vocabulary=60):
    draw = numpy.random.default_rng(0)

    def blocks(lengths):
        ends = numpy.cumsum(lengths)
        return Blocks(draw.integers(5, vocabulary, ends[-1]), ends - lengths, ends)

    return PreparedCorpus(Path("."), "f", blocks(lengths), blocks(lengths[:4]), 10, 0)


@pytest.fixture
def opened_by_pipeline(settings_for, tmp_path):
    """Opens the caches of a run on a small corpus, as the pipeline does."""

    def open_(
        asked,
        num_cells=2,
        num_seeds=1,
        precision="bf16",
        max_steps=3,
        teacher="t",
        corpus="f",
        layer=2,
    ):
        settings = settings_for("experiment=smoke", values={"runtime.teacher_cache": asked})
        settings.training.max_steps, settings.training.batch_size = max_steps, 2
        settings.training.evaluation_sequences = 2
        settings.layer_selection.teacher_layer = layer
        tracker = Tracker()
        prepared = replace(small_corpus(), fingerprint=corpus)
        caches = stages.open_caches(
            settings, prepared, precision, teacher, layer, 96, (num_cells, num_seeds), tracker
        )
        opened.append(caches)
        return caches, tracker.tags["teacher_cache"]

    opened = []
    yield open_
    for caches in filter(None, opened):
        caches.close()


def test_pipeline_says_what_it_decided(opened_by_pipeline, tmp_path):
    """Nobody can see why a cache was used; or a part has the states of other examples."""
    caches, tag = opened_by_pipeline("auto")
    assert tag.startswith("on: runtime.teacher_cache=auto: an example is read 2.0 times; ")
    # 28 tokens to train on, and the first and third of four held out.
    assert "33 tokens x 3 states x 96 x 2 bytes = 0.00 GB in " in tag
    assert caches.train._lengths.tolist() == RAGGED.tolist()
    assert caches.validation._lengths.tolist() == [3, 2]
    assert "; 0 of 6 examples are there" in tag
    refused = {"teacher": "another", "num_cells": 1}
    for asked, more in (("false", {}), ("auto", refused), ("auto", {"precision": "fp32"})):
        caches, tag = opened_by_pipeline(asked, **more)
        assert caches is None and tag.startswith("off: runtime.teacher_cache=")
    caches, tag = opened_by_pipeline("auto", teacher="another", num_cells=1, max_steps=6)
    assert caches is not None and "is read 2.0 times" in tag


def test_auto_uses_what_an_earlier_run_made(opened_by_pipeline):
    """One run after the other, none of them a grid, that all run the teacher."""
    assert opened_by_pipeline("auto", num_cells=1)[0] is None
    opened_by_pipeline("true")
    caches, tag = opened_by_pipeline("auto", num_cells=1)
    assert caches is not None and "an earlier run made it" in tag


def test_seeds_share_less_of_a_large_corpus(opened_by_pipeline):
    """Two runs of a hundredth of the corpus each, and room taken for all of it."""
    # 6 examples, 2 steps of 2: each seed reads two thirds, so one example is read 1.5 times.
    _, tag = opened_by_pipeline("auto", num_cells=1, num_seeds=2, max_steps=2)
    assert "an example is read 1.5 times, fewer than 2" in tag
    _, tag = opened_by_pipeline("auto", num_cells=2, num_seeds=1, max_steps=1)
    assert "an example is read 2.0 times; " in tag


def test_failed_cache_does_not_count_as_made(opened_by_pipeline, monkeypatch):
    """A folder that a full disk left empty makes every later run try again."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_room)
        assert opened_by_pipeline("auto")[0] is None
    assert "an example is read 1.0 times" in opened_by_pipeline("auto", num_cells=1)[1]


def test_each_content_has_its_own_cache(opened_by_pipeline):
    """One teacher's, layer's, corpus's or precision's states are taken for another's."""
    changes = [{"teacher": "u"}, {"layer": 3}, {"corpus": "g"}, {"precision": "fp32"}]
    opened = [opened_by_pipeline("true", **change)[0] for change in [*changes, {}, {}]]
    assert len({caches._folder for caches in opened}) == len(changes) + 1


def test_auto_goes_on_without_where_the_disk_is_full(opened_by_pipeline, monkeypatch):
    """A convenience that nobody asked for ends the run."""
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    caches, tag = opened_by_pipeline("auto")
    assert caches is None and "No space left" in tag
    with pytest.raises(ExperimentError, match="No space left"):
        opened_by_pipeline("true")


def test_tag_is_right_where_the_disk_is_full(opened_by_pipeline, monkeypatch):
    """The record says on for a run that went on without."""
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    assert opened_by_pipeline("auto")[1].startswith("off: ")


# The size limit


def use(root, key, second, limit_bytes=GIGABYTE):
    """Opens and closes a cache; the clock of the file system is too coarse for a test."""
    opened_caches(root, key, limit_bytes).close()
    os.utime(root / key, (second, second))


def kept(root):
    return sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


def file_bytes(root, key):
    return sum(path.stat().st_size for path in (root / key).iterdir())


def test_least_recently_used_goes_first(tmp_path):
    """The cache of the sweep that is going on makes room for another."""
    for second, key in enumerate(("a", "b", "c")):
        use(tmp_path, key, second)
    use(tmp_path, "a", 10)
    each = file_bytes(tmp_path, "a")
    use(tmp_path, "d", 11, limit_bytes=2 * each + NEEDED)
    assert kept(tmp_path) == ["a", "c", "d"]
    use(tmp_path, "a", 12, limit_bytes=NEEDED)
    assert kept(tmp_path) == ["a"]


def test_nothing_goes_where_there_is_room(tmp_path):
    """A cache is thrown away for nothing, or the one that is opened counts twice."""
    for second, key in enumerate(("a", "b", "c")):
        use(tmp_path, key, second)
    each = file_bytes(tmp_path, "a")
    for key in ("c", "b", "a"):
        use(tmp_path, key, 5, limit_bytes=2 * each + NEEDED)
        assert kept(tmp_path) == ["a", "b", "c"]


def test_use_ends_when_it_is_closed(tmp_path):
    """A run of days ends, and its cache counts as the oldest."""
    long = opened_caches(tmp_path, "long")
    os.utime(tmp_path / "long", (1, 1))
    use(tmp_path, "short", 2)
    long.close()
    use(tmp_path, "new", 3, limit_bytes=file_bytes(tmp_path, "long") + NEEDED)
    assert kept(tmp_path) == ["long", "new"]


def hold(root, key, connection):
    caches = opened_caches(root, key)
    connection.send("open")
    connection.recv()
    read(caches.train, Teacher(RAGGED), [0, 1], side="right")
    caches.close()


@pytest.fixture
def held_elsewhere():
    """Holds a cache open in another process; what it gives back closes it."""
    processes = []

    def hold_(root, key):
        ours, theirs = multiprocessing.Pipe()
        process = in_process(hold, root, key, theirs)
        processes.append(process)
        assert received(ours) == "open"

        def close(kill=False):
            if kill:
                process.kill()
            ours.send("close")
            return ended(process)

        return close

    yield hold_
    for process in processes:
        process.kill()


@pytest.mark.parametrize("umask", [0o022, 0o002], ids=oct)
def test_one_in_use_is_never_evicted(tmp_path, held_elsewhere, umask):
    """A run's cache goes under it; with a group-writable folder the lock's own files go."""
    old = os.umask(umask)
    try:
        use(tmp_path / "root", "idle", 5)
        close = held_elsewhere(tmp_path / "root", "used")
        os.utime(tmp_path / "root" / "used", (1, 1))
        each = file_bytes(tmp_path / "root", "used")
        with pytest.raises(ExperimentError, match=r"runtime\.teacher_cache_gb=.* allows no more"):
            opened_caches(tmp_path / "root", "new", NEEDED)
        # What is not enough to make room is not thrown away either.
        assert kept(tmp_path / "root") == ["idle", "used"]
        use(tmp_path / "root", "new", 6, limit_bytes=each + NEEDED)
        assert kept(tmp_path / "root") == ["new", "used"]
        assert not list((tmp_path / "root").glob("..*"))  # locks of what is no cache
        assert close() == 0
        use(tmp_path / "root", "last", 7, limit_bytes=each + NEEDED)
        assert kept(tmp_path / "root") == ["last", "used"]
    finally:
        os.umask(old)


def test_killed_run_holds_nothing(tmp_path, held_elsewhere):
    """A cache stays for ever because the run that used it was killed; or opening it hangs."""
    close = held_elsewhere(tmp_path, "killed")
    assert close(kill=True) == -signal.SIGKILL
    use(tmp_path, "killed", 1)
    use(tmp_path, "new", 2, limit_bytes=NEEDED)
    assert kept(tmp_path) == ["new"]


def say_whether_in_use(folder, connection):
    while connection.recv():
        connection.send(teacher_cache._is_in_use(folder))


def test_workers_of_the_data_loader_do_not_end_the_use(tmp_path):
    """A forked worker closes what it inherited, and the run's cache counts as idle."""
    ours, theirs = multiprocessing.Pipe()
    process = in_process(say_whether_in_use, tmp_path / "key", theirs)
    answers = []
    caches = opened_caches(tmp_path)
    for action in (lambda: None, lambda: list(DataLoader(range(4), num_workers=1)), caches.close):
        action()
        ours.send("?")
        answers.append(received(ours))
    assert answers == [True, True, False]
    ours.send(None)
    assert ended(process) == 0


def test_own_left_overs_count(tmp_path):
    """Validation parts of other sizes gather beside a training part, and the limit is none."""
    wide = {"lengths": {"train": RAGGED, "validation": numpy.full(2000, 4)}}
    wide["plan"] = Plan(True, "", (int(RAGGED.sum()) + 8000) * HIDDEN * 6)
    caches = opened_caches(tmp_path, **wide)
    read(caches.train, Teacher(RAGGED), [0, 1], side="right")
    caches.close()
    opened_caches(tmp_path, limit_bytes=NEEDED).close()
    assert files_below(tmp_path) == ["train-6.safetensors", "validation-2.safetensors"]
    caches = opened_caches(tmp_path)
    assert caches.train.num_cached() == 2
    caches.close()


def test_cache_that_somebody_removed(tmp_path):
    """A run whose cache is deleted by hand ends with an error when all is done."""
    caches = opened_caches(tmp_path)
    shutil.rmtree(tmp_path / "key")
    read(caches.train, Teacher(RAGGED), [0, 1], side="right")
    caches.close()


def test_interrupted_opening_is_not_in_use(tmp_path, monkeypatch):
    """The next run of a grid takes the cache of one that failed for one in use."""

    def interrupt(*_):
        raise KeyboardInterrupt

    fallocate = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", interrupt)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        opened_caches(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    assert not teacher_cache._is_in_use(tmp_path / "key")
    FileLock(tmp_path / ".lock", timeout=0).acquire().lock.release()
    assert interrupted.type is KeyboardInterrupt  # alive, and with it the frames that hold a lock


# Training on cached states


class Encoders:
    """A teacher and a student of the size of the tests, the same each time."""

    def __init__(self, tiny_bert):
        self.teacher = copy.deepcopy(tiny_bert).requires_grad_(False)
        torch.manual_seed(3)
        config = BertConfig(
            vocab_size=tiny_bert.config.vocab_size,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=64,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
        )
        self.student = BertModel(config)


@pytest.fixture
def forwards(monkeypatch):
    """The batch size of each forward pass of a 32-wide encoder, the teacher, in order."""
    sizes = []
    forward = StateTap.forward

    def counted(self, **inputs):
        if self.encoder.config.hidden_size == 32:
            sizes.append(len(inputs["input_ids"]))
        return forward(self, **inputs)

    monkeypatch.setattr(StateTap, "forward", counted)
    return sizes


@pytest.fixture
def distilled(settings_for, tiny_bert, tiny_tokenizer, tmp_path):
    """Trains with or without caches; gives what was logged and the final losses."""

    def train(caches, packing=True, precision="bf16", **changes):
        settings = settings_for("experiment=smoke")
        values = {"max_steps": 4, "batch_size": 4, "logging_steps": 1, "evaluation_steps": 2}
        for name, value in (values | changes).items():
            setattr(settings.training, name, value)
        settings.training.evaluation_sequences = 5
        settings.training.learning_rate = 1e-2
        settings.corpus.packing = packing
        settings.layer_selection.teacher_layer = 3
        settings.objective.terms["relations"].num_relation_heads = 4
        settings.runtime.teacher_cache = "true"
        encoders = Encoders(tiny_bert)
        logged = []
        losses = distil(
            settings,
            encoders.teacher,
            encoders.student,
            build_objective(settings, encoders.teacher, encoders.student),
            tiny_tokenizer,
            corpus_of(packing),
            precision,
            tmp_path / "checkpoints",
            lambda metrics, step: logged.append((step, metrics)),
            caches,
        )
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        return losses, logged

    return train


def corpus_of(packing):
    lengths = numpy.full(16, 12) if packing else numpy.arange(16) % 7 + 3
    corpus = small_corpus(lengths, vocabulary=90)
    return replace(corpus, validation=small_corpus(lengths[:9], vocabulary=80).train)


def caches_of(root, packing):
    corpus = corpus_of(packing)
    lengths = {"train": corpus.train.lengths, "validation": corpus.validation.spread(5).lengths}
    return TeacherCaches(root, "key", lengths, 32, Plan(True, "", 10**6), GIGABYTE)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_cached_training_equals_uncached(distilled, forwards, tmp_path, packing, precision):
    """States of another example, of the other part or of another rounding are trained on.

    In one epoch each batch is computed as it is without a cache, so all losses are equal bitwise.
    """
    expected = distilled(None, packing, precision)
    # 4 steps of 4, and 2 evaluations of 5 in batches of 4, the second of which is the last.
    assert forwards == [4, 4, 4, 1, 4, 4, 4, 1]
    forwards.clear()
    caches = caches_of(tmp_path / "caches", packing)
    assert distilled(caches, packing, precision) == expected
    assert forwards == [4, 4, 4, 1, 4, 4]
    forwards.clear()
    assert distilled(caches, packing, precision) == expected
    caches.close()
    reopened = caches_of(tmp_path / "caches", packing)
    assert distilled(reopened, packing, precision) == expected
    reopened.close()
    assert forwards == []


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_later_epochs_skip_the_teacher(distilled, forwards, tmp_path, packing):
    """Only the next run profits; or rounding of other batches moves the losses by more than it may.

    Without a cache later epochs compute an example in other company, which may round differently:
    bfloat16 has 8 bits, so losses may differ by some 2**-8 of their size.
    """
    expected, expected_log = distilled(None, packing, max_steps=12, evaluation_steps=12)
    forwards.clear()
    caches = caches_of(tmp_path / "caches", packing)
    losses, log = distilled(caches, packing, max_steps=12, evaluation_steps=12)
    caches.close()
    assert forwards == [4, 4, 4, 4, 4, 1]
    assert losses == pytest.approx(expected, rel=2**-8)
    for (step, metrics), (expected_step, expected_metrics) in zip(log, expected_log, strict=True):
        assert step == expected_step
        assert metrics == pytest.approx(expected_metrics, rel=2**-6)


def test_training_and_validation_have_their_own_states(tiny_bert, forwards, tmp_path):
    """Example 0 of the validation part gets the states of example 0 that is trained on."""
    encoders = Encoders(tiny_bert)
    caches = caches_of(tmp_path, packing=True)
    objective = Objective({"relations": Relations([(3, 2)], [("key", "key")], 4)}, {"relations": 1})
    distiller = Distiller(
        encoders.teacher,
        encoders.student,
        objective,
        teacher_dtype=torch.bfloat16,
        caches=caches,
    )
    corpus = corpus_of(packing=True)
    parts = {True: corpus.train, False: corpus.validation.spread(5)}
    for is_cached in (False, True):
        for is_training, blocks in parts.items():
            distiller.train(is_training)
            ids, index = blocks[0]["input_ids"][None], blocks[0]["index"][None]
            forwards.clear()
            cached = distiller._teacher_states({"input_ids": ids}, None, index)
            assert len(forwards) == (not is_cached)
            assert list(cached) == [State("key", 3)]
            computed = distiller._teacher_states({"input_ids": ids}, None, None)
            assert torch.equal(cached[State("key", 3)], computed[State("key", 3)])
    distiller.close()
    caches.close()


@pytest.fixture
def whole_run(settings_for, tiny_teacher_folder, tmp_path, monkeypatch):
    """A run from text to student, without a task, a record and a measurement of speed."""
    tracker = MagicMock(run_id="0" * 32, history=lambda _: [])
    monkeypatch.setattr(pipeline, "_start", lambda *_: tracker)
    monkeypatch.setattr(pipeline, "measure_speedup", lambda *_: 1.0)
    draw = random.Random(1)
    documents = [" ".join(draw.choices(["the", "model", "student", "of"], k=60)) for _ in range(30)]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(documents))

    def run_it(teacher=tiny_teacher_folder, **values):
        settings = settings_for(
            "experiment=smoke",
            "teacher=custom",
            f"teacher.path={teacher}",
            "layer_selection=explicit",
            "layer_selection.teacher_layer=3",
            "corpus=text_files",
            f"corpus.files=[{text}]",
            "corpus.held_out_fraction=0.2",
            "task=none",
            "relation_set.num_relation_heads=4",
            "training.precision=bf16",
            "student.init=random",
            values={"runtime.teacher_cache": True} | values,
        )
        return run_experiment(settings)

    return run_it


def test_second_relation_set_never_runs_the_teacher(whole_run, forwards, tmp_path):
    """The key of the cache hangs on the relations, the seed or the student: no sweep profits."""
    first = whole_run(**{"relation_set.pairs": ["qq"], "training.max_steps": 60})
    num_first = sum(forwards)
    assert num_first > 0
    forwards.clear()
    second = whole_run(
        **{
            "relation_set.pairs": ["kv", "vv"],
            "training.max_steps": 8,
            "seed": 2,
            "student.num_layers": 1,
            "training.evaluation_steps": 4,
        }
    )
    assert forwards == [1]  # two tokens, to see how wide the states are
    assert first.run_key != second.run_key
    assert set(second.validation_losses) == {"key-value", "value-value", "total"}
    roots = [p for p in (tmp_path / "outputs" / "cache" / "teacher").iterdir() if p.is_dir()]
    assert len(roots) == 1
    whole_run(**{"layer_selection.teacher_layer": 2, "training.max_steps": 2})
    assert forwards


def test_heads_may_be_wider_than_the_hidden_size(whole_run, tiny_tokenizer, tmp_path):
    """A teacher with a head size of its own is distilled without a cache, and crashes with one."""
    config = Qwen3Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    Qwen3Model(config).save_pretrained(tmp_path / "wide")
    tiny_tokenizer.save_pretrained(tmp_path / "wide")
    losses = whole_run(tmp_path / "wide").validation_losses
    assert losses["total"] > 0


# Keys and settings


def test_key_of_a_run_hangs_on_what_the_cache_changes(settings_for):
    """A cached bf16 run is not found again; or an fp32 result with bf16 states passes for exact."""
    keys = {}
    for precision in ("bf16", "fp32"):
        for asked in ("auto", "true", "false"):
            settings = settings_for("experiment=smoke")
            settings.runtime.teacher_cache = asked
            keys[precision, asked] = run_key(settings, precision, {})
            is_rounded = teacher_dtype(precision, asked) == torch.bfloat16
            assert is_rounded == (precision == "bf16" or asked == "true")
    assert keys["bf16", "auto"] == keys["bf16", "true"] == keys["bf16", "false"]
    assert keys["fp32", "auto"] == keys["fp32", "false"]
    assert len(set(keys.values())) == 3


@pytest.mark.parametrize(
    "given, asked",
    [("auto", "auto"), ("true", "true"), ("false", "false"), ("True", "true"), ("FALSE", "false")],
)
def test_setting_may_be_written_as_yaml_does(settings_for, given, asked):
    """The obvious spelling, which YAML makes a boolean of, is refused."""
    typed = settings_for("experiment=smoke", f"runtime.teacher_cache={given}")
    assert typed.runtime.teacher_cache == asked
    set_ = settings_for("experiment=smoke", values={"runtime.teacher_cache": asked == "true"})
    assert set_.runtime.teacher_cache == str(asked == "true").lower()


@pytest.mark.parametrize("given", ["yes", "on", "1", "null", "[true]"])
def test_other_value_of_the_setting_is_refused(settings_for, given):
    """A misspelt wish is taken for no, or for a traceback."""
    with pytest.raises(ExperimentError, match=r"runtime\.teacher_cache"):
        settings_for("experiment=smoke", f"runtime.teacher_cache={given}")


@pytest.mark.parametrize("given", [0, -1, float("nan"), float("inf")])
def test_limit_must_be_a_size(settings_for, given):
    """A limit of nothing evicts every cache."""
    with pytest.raises(ExperimentError, match=r"runtime\.teacher_cache_gb"):
        settings_for("experiment=smoke", values={"runtime.teacher_cache_gb": given})


# How many runs of a grid share a cache

COUNT = """
import runpy, sys
from types import ModuleType
from unittest.mock import MagicMock
from minilm_exp.errors import ExperimentError

def run_experiment(settings, num_cells, num_seeds, trial, asked):
    print("cells", num_cells * num_seeds)
    raise ExperimentError("enough")

sys.modules["transformers"] = MagicMock()  # takes seconds to import, for nothing
sys.modules["minilm_exp.pipeline"] = ModuleType("pipeline")
sys.modules["minilm_exp.pipeline"].run_experiment = run_experiment
sys.argv[0] = "run.py"
runpy.run_path("run.py", run_name="__main__")
"""


def cells(outputs, *overrides):
    """What run.py hands on in each job of a real command line."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT, f"outputs_dir={outputs}", "experiment=smoke", *overrides],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "enough" in done.stderr, done.stderr
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("cells ")]


@pytest.mark.integration
def test_cells_of_a_real_grid(tmp_path):
    """The cache stays off in a sweep, or is on where no two runs share a teacher."""
    grid = ["seed=1,2,3", "layer_selection.teacher_layer=2,3", "corpus.block_length=16,32"]
    assert cells(tmp_path, "-m", *grid) == [3] * 12


@pytest.mark.integration
def test_cells_of_an_optuna_sweep(tmp_path):
    """Every trial of a sweep by Optuna fails, or its trials count as one run."""
    sweeper = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    sweeper.append("hydra.sweeper.max_failure_rate=1.0")
    interval = "training.learning_rate=interval(1e-4,1e-3)"
    assert cells(tmp_path, "-m", *sweeper, interval) == [2, 2]


@pytest.mark.parametrize(
    "params, expected",
    [(None, (7, 1)), ({"relations": "qq,vv"}, (7, 1)), ({"teacher": "a,b"}, (1, 1))],
)
def test_cells_of_a_search(run_module, params, expected):
    """Trials that each have a teacher layer of their own count as sharing one cache."""
    hydra_config = SimpleNamespace(mode=RunMode.MULTIRUN, sweeper={"n_trials": 7, "params": params})
    hydra_config.sweeper = OmegaConf.create(hydra_config.sweeper)
    assert run_module._grid(hydra_config, None) == expected


@pytest.fixture
def run_module(monkeypatch):
    """run.py as a module."""
    monkeypatch.syspath_prepend(REPOSITORY)
    # Another test may have registered it, and nothing is composed here.
    monkeypatch.setattr(OmegaConf, "register_resolver", lambda *_, **__: None)
    import run

    return run


def test_user_reads_which_setting_helps(run_module, tmp_path, monkeypatch):
    """The terminal says that the disk is full, and nothing of the cache that made it so."""
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(ExperimentError) as told:
        opened_caches(tmp_path)
    assert "runtime.teacher_cache" in run_module._explain(told.value)


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["seed=1,2", "relations=qq,vv"], (2, 2)),
        (["seed=range(1,5)", "+teacher.revision=a,b", "training.max_steps=9"], (1, 4)),
        (["teacher=bert_base,bert_large", "corpus.files=[a],[b]"], (1, 1)),
        (["training.precision=fp32,bf16", "experiment=smoke,demo"], (1, 1)),
        (["relations=glob(q*)"], (2, 1)),
        (["seed=shuffle(range(0,3))", "student.hidden_size=choice(12,24)"], (2, 3)),
        ([], (2, 1)),
    ],
    ids=str,
)
def test_cells_of_a_command_line(run_module, tmp_path, overrides, expected):
    """A kind of sweep that Hydra has is counted wrongly, or ends every run of it."""
    params = {"training.batch_size": "8,16"} if not overrides else None
    record = {"hydra": {"overrides": {"task": overrides}, "sweeper": {"params": params}}}
    (tmp_path / "multirun.yaml").write_text(json.dumps(record))
    sweep = SimpleNamespace(dir=str(tmp_path))
    for mode, number in ((RunMode.MULTIRUN, expected), (RunMode.RUN, (1, 1))):
        hydra_config = SimpleNamespace(mode=mode, sweep=sweep, sweeper={})
        assert run_module._grid(hydra_config, None) == number
