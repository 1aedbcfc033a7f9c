"""run.py in processes of its own, and what it leaves.

A process spends seconds on importing libraries, so most are forked from one that has imported them.
"""

import functools
import gc
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class Done:
    """A process that has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def both(self):
        return self.stdout + self.stderr


def environment(**more):
    names = ("HYDRA_FULL_ERROR", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    # Without bars and colours; an unreachable server is given up at once.
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    return inherited | fixed | more


def command(outputs, *overrides):
    # The report and the baseline's speed, which cost seconds, are for tests that look at them.
    fixed = [f"outputs_dir={outputs}", "report=false", "baseline.num_batches=1"]
    return [sys.executable, str(REPOSITORY / "run.py"), *fixed, *overrides]


def run_cold(outputs, *overrides):
    """As a shell does it."""
    done = subprocess.run(
        command(outputs, *overrides),
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def run(outputs, *overrides, cwd=REPOSITORY, **variables):
    """The same in a process that starts with the libraries imported."""
    return Started(outputs, *overrides, cwd=cwd, **variables).wait()


class Started:
    """A run that goes on beside the test; `pid` is its process."""

    def __init__(self, outputs, *overrides, cwd=REPOSITORY, **variables):
        processes = server()
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        given = (command(outputs, *overrides)[1:], cwd, environment(**variables), self._files)
        self._process = processes.Process(target=_enter, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def is_alive(self):
        return self._process.is_alive()

    def send(self, number):
        """Sends a signal, if it is not too late."""
        if self.is_alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, timeout=300):
        """What it printed and its status; that of a killed one is negative."""
        self._process.join(timeout=timeout)
        assert self._process.exitcode is not None, "the run does not end"
        said = [file.read_text("utf-8") if file.exists() else "" for file in self._files]
        self._folder.cleanup()
        return Done(self._process.exitcode, *said)


@functools.cache
def server():
    """Context of processes that are forked from one which has imported what a run needs."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["preloaded"])
    # It does not look where this process does.
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths))):
        forkserver.ensure_running()
    return processes


def _enter(arguments, cwd, variables, files):
    assert "preloaded" in sys.modules  # what the server cannot import it says nothing of
    tracking = sys.modules["minilm_exp.tracking"]
    tracking._create_whole = sys.modules["preloaded"].write_database
    gc.freeze()  # collections need not look at what was imported
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def assert_told_simply(done, *words):
    """A failure in a few lines, without a traceback, with the words that a user needs."""
    assert done.status not in (0, None), done.both
    assert "Traceback" not in done.both
    for word in words:
        assert word in done.stderr, done.stderr


def client_of(outputs):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{outputs}/mlflow.db")


def runs_of(outputs, below=None):
    """The runs below a run; without one, those that stand below none."""
    client = client_of(outputs)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, max_results=5000)
    return {r.info.run_id: r for r in runs if r.data.tags.get("mlflow.parentRunId") == below}


def histories(outputs, run_id):
    """Every metric as steps and values in the order they were logged; times are left out."""
    client = client_of(outputs)
    names = client.get_run(run_id).data.metrics
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]
        for name in names
        if name != "model/speedup"
    }


def results(outputs):
    """The content of each result.json, by the name of its run folder."""
    return {
        path.parent.name: json.loads(path.read_text())
        for path in outputs.glob("runs/*/result.json")
    }


def student_bytes(result, outputs):
    """The weights; folders are looked for below `outputs`, where a copy lies."""
    folder = outputs / "runs" / Path(result["folder"]).name
    return (folder / "student" / "model.safetensors").read_bytes()


def small_text(folder):
    """A file of 43 documents."""
    text = folder / "text.txt"
    documents = [
        " ".join(f"stone {number * step % 97} follows river {number}" for step in range(1, 9))
        for number in range(43)
    ]
    text.write_text("\n\n".join(documents), "utf-8")
    return text
