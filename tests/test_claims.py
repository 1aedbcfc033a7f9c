"""One process at a time for each run."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from minilm_exp.claims import claim
from minilm_exp.errors import ExperimentError

PROCESSES = multiprocessing.get_context("fork")


def hold(outputs, ready):
    with claim(outputs, "key", wait=False):
        ready.set()
        while not (outputs / "go on").exists():
            time.sleep(0.01)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the claim until the file "go on" is there."""
    ready = PROCESSES.Event()
    process = PROCESSES.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    yield process
    (tmp_path / "go on").touch()
    process.join(30)


def test_second_process_is_refused_or_waits(holder, tmp_path, caplog):
    """The same run computed twice at once, into one folder."""
    refused = pytest.raises(ExperimentError, match="another process is computing this run")
    with refused, claim(tmp_path, "key", wait=False):
        pass
    with claim(tmp_path, "other key", wait=False):
        pass
    with caplog.at_level("INFO"):
        threading.Timer(0.2, (tmp_path / "go on").touch).start()
        with claim(tmp_path, "key", wait=True):
            assert (tmp_path / "go on").exists()
    assert "waiting for it" in caplog.text


def test_claim_of_a_killed_process_is_free(holder, tmp_path):
    """A cell that nobody can compute any more."""
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(30)
    with claim(tmp_path, "key", wait=False):
        pass
