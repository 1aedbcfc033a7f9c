"""One process at a time for each run, on one machine and, by Postgres, on several."""

import functools
import multiprocessing
import os
import signal
import threading
import time

import optuna
import pytest
from filelock import Timeout
from sqlalchemy import NullPool, create_engine, text

from minilm_exp import locks
from minilm_exp.claims import claim
from minilm_exp.errors import ExperimentError
from minilm_exp.locks import AdvisoryLock
from minilm_exp.studies import SharedStorage

PROCESSES = multiprocessing.get_context("fork")


def hold(outputs, studies, go_on, ready):
    with claim(outputs, "key", studies, wait=False):
        ready.set()
        while not go_on.exists():
            time.sleep(0.01)


@pytest.fixture
def claimed(studies, tmp_path):
    """Claims for other processes; with Postgres their outputs are those of another machine."""
    outputs = tmp_path if studies.startswith("sqlite") else tmp_path / "another machine"
    return functools.partial(claim, outputs, studies=studies)


@pytest.fixture
def holder(studies, tmp_path):
    """A process that holds the claim until the file "go on" is there."""
    ready = PROCESSES.Event()
    go_on = tmp_path / "go on"
    process = PROCESSES.Process(target=hold, args=(tmp_path, studies, go_on, ready))
    process.start()
    assert ready.wait(30)
    yield process
    (tmp_path / "go on").touch()
    process.join(30)


def test_second_process_is_refused_or_waits(holder, claimed, tmp_path, caplog):
    """The same run computed twice at once, into one folder."""
    refused = pytest.raises(ExperimentError, match="another process is computing this run")
    with refused, claimed("key", wait=False):
        pass
    with claimed("other key", wait=False):
        pass
    with caplog.at_level("INFO"):
        threading.Timer(0.2, (tmp_path / "go on").touch).start()
        with claimed("key", wait=True):
            assert (tmp_path / "go on").exists()
    assert "waiting for it" in caplog.text


def test_claim_of_a_killed_process_is_free(holder, claimed):
    """A cell that nobody can compute any more."""
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(30)
    # A database takes a moment to see that its client is gone.
    with claimed("key", wait=True):
        pass


def test_claims_are_given_back(claimed):
    """A run that nobody can repeat while the process that computed it lives."""
    for _ in range(20):
        with claimed("key", wait=False):
            pass


def test_lost_database_frees_a_claim_without_an_error(postgres, tmp_path):
    """A finished run that fails, as the database of claims was restarted meanwhile."""
    engine = create_engine(postgres, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    others = text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
    with claim(tmp_path, "key", postgres, wait=False), engine.connect() as connection:
        assert len(connection.execute(others).all()) == 1
    with claim(tmp_path / "another machine", "key", postgres, wait=False):
        pass


def test_ended_connection_is_taken_again(postgres, caplog):
    """A live sweep that is taken for dead for ever, or one that is robbed and does not say so."""
    engine = create_engine(postgres, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    others = text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
    first, second = AdvisoryLock(postgres, "x"), AdvisoryLock(postgres, "x")
    with first, engine.connect() as connection:
        for _ in range(2):
            connection.execute(others)
            time.sleep(2.5)
            with pytest.raises(Timeout):
                second.acquire(timeout=0)
        connection.execute(others)
        with second:
            time.sleep(2.5)
        assert "another process took it" in caplog.text
        time.sleep(2.5)
        with pytest.raises(Timeout):
            second.acquire(timeout=0)
    with second:
        pass


def test_restart_of_the_database_gives_no_claim_to_another(cluster, tmp_path, monkeypatch):
    """A cell that two processes compute, as the database forgot who had it."""
    monkeypatch.setattr(locks, "_REST", 4)
    with claim(tmp_path, "key", cluster.url, wait=False):
        for _ in range(2):
            cluster.stop()
            cluster.start()
            refused = pytest.raises(ExperimentError, match="another process is computing this run")
            with refused, claim(tmp_path / "another machine", "key", cluster.url, wait=False):
                pass
    with claim(tmp_path / "another machine", "key", cluster.url, wait=False):
        pass


def test_who_waits_for_a_claim_outlives_a_restart(cluster, tmp_path, monkeypatch):
    """A sweep that ends since the database was restarted while it waited."""
    monkeypatch.setattr(locks, "_REST", 3)
    lock = AdvisoryLock(cluster.url, "x")
    lock.acquire()
    waiter = threading.Thread(target=AdvisoryLock(cluster.url, "x").acquire)
    waiter.start()
    time.sleep(1)
    cluster.stop()
    threading.Timer(2, cluster.start).start()
    waiter.join(6)
    assert waiter.is_alive()
    lock.release()
    waiter.join(30)
    assert not waiter.is_alive()


def test_lost_database_is_asked_again(cluster, monkeypatch):
    """A sweep that a restart of the database ends, or that hangs where it stays away."""
    monkeypatch.setattr(locks, "_REST", 0)
    study = optuna.create_study(study_name="x", storage=SharedStorage(cluster.url))
    cluster.stop()
    threading.Timer(2, cluster.start).start()
    trial = study.ask()
    study.tell(trial, 1.0)
    cluster.stop()
    start = time.monotonic()
    with pytest.raises(ExperimentError, match=r"tracking\.studies"):
        SharedStorage(cluster.url, retry_seconds=3)
    assert 3 <= time.monotonic() - start < 10
    # All that a sweep does at its end would wait again.
    start = time.monotonic()
    with pytest.raises(ExperimentError, match="the same command goes on"):
        study.ask()
    assert time.monotonic() - start < 2
    cluster.start()
    assert [trial.value for trial in study.trials] == [1.0]


@pytest.mark.parametrize("studies", ["postgresql://user:hunter2@127.0.0.1:9/x", "no address"])
def test_database_that_cannot_be_used(studies, tmp_path):
    """A traceback, or the password in the message."""
    unusable = pytest.raises(ExperimentError, match=r"tracking\.studies")
    with unusable as raised, claim(tmp_path, "key", studies, wait=False):
        pass
    assert "hunter2" not in str(raised.value)
