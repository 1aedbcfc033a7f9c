"""Takes the stores of a run away in its middle, and gives them back.

    python tests/chaos/outages.py

A run whose MLflow server is killed, and a sweep whose Postgres, with MLflow and Optuna in it, is
stopped, each three times for some seconds, must go on by themselves and end like undisturbed ones.
Where the store stays away, the run must say so, and `resume=true` must go on when it is back.
"""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import Cluster, new_database
from mlflow import MlflowClient
from running import Started, environment, results

_RUN = ["experiment=smoke", "task=none", "training.max_steps=150", "training.checkpoint_steps=20",
        "training.logging_steps=2", "training.hidden_dropout=0.1", "resume=true"]  # fmt: skip
_SWEEP = ["-m", "sweeps=relation_set", *_RUN[:-1], "training.max_steps=60"]


class Server:
    """MLflow's own, on this machine."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._folder = folder
        folder.mkdir(parents=True)
        self.uri = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port",
                   str(self._port), "--workers", "1", "--backend-store-uri",
                   f"sqlite:///{self._folder}/mlflow.db", "--artifacts-destination",
                   str(self._folder / "artifacts")]  # fmt: skip
        self._process = subprocess.Popen(
            command, cwd=self._folder, env=environment(), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health"):
                return
            time.sleep(0.2)
        raise SystemExit("the server does not answer")

    def stop(self) -> None:
        """At once, with its workers."""
        subprocess.run(["pkill", "-9", "-s", str(self._process.pid)], check=False)
        self._process.wait()


def found_in(uri: str, outputs: Path) -> dict[str, object]:
    """Weights, losses and every point in MLflow, by the runs' keys."""
    found: dict[str, object] = {}
    for result in results(outputs).values():
        weights = outputs / "runs" / Path(result["folder"]).name / "student" / "model.safetensors"
        found[result["run_key"]] = [result["status"], result["validation_losses"],
                                    weights.read_bytes()]  # fmt: skip
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(outputs.name)
    for run in client.search_runs([experiment.experiment_id]):
        key = run.data.tags.get("run_key")
        if key is not None:
            points = {
                name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
                if name != "model/speedup"
            }
            found[f"MLflow {key}"] = [run.info.status, points]
        elif run.info.status == "RUNNING":
            found[f"MLflow {run.info.run_id}"] = "never ended"
    return found


def report(what: str, found: object, expected: object, start: float) -> bool:
    """Prints a row; gives whether both are equal."""
    is_equal = found == expected
    outcome = "equal" if is_equal else "NOT EQUAL"
    print(f"| {what} | {outcome} | {time.monotonic() - start:.0f} s |", flush=True)
    return is_equal


def main() -> None:
    """Its status is 1 where anything differs."""
    draw = random.Random(1)
    folder = Path(tempfile.mkdtemp(prefix="minilm_exp-outages-"))
    print("| what | outcome | took |\n| --- | --- | --- |", flush=True)
    server = Server(folder / "server")
    good = True

    def run(name: str, uri: str, *more: str) -> Started:
        return Started(folder / name, *more, f"tracking.uri={uri}", "tracking.experiment=" + name)

    # A run beside a server.
    whole = run("whole", server.uri, *_RUN).wait(600)
    assert whole.status == 0, whole.both
    expected = found_in(server.uri, folder / "whole")

    start = time.monotonic()
    process = run("restarted", server.uri, *_RUN)
    for _ in range(3):
        time.sleep(draw.uniform(2, 6))
        server.stop()
        time.sleep(draw.uniform(1, 5))
        server.start()
    done = process.wait(600)
    assert done.status == 0, done.both
    good &= report(
        "MLflow's server killed and started again, 3 times",
        found_in(server.uri, folder / "restarted"),
        expected,
        start,
    )

    start = time.monotonic()
    process = run("away", server.uri, *_RUN, "tracking.retry_seconds=4")
    while not list((folder / "away").glob("runs/*/checkpoints/checkpoint-20")):
        time.sleep(0.05)
    server.stop()
    done = process.wait(600)
    assert done.status == 1 and "tracking.retry_seconds" in done.stderr, done.both
    assert "Traceback" not in done.both
    [failed] = results(folder / "away").values()
    assert failed["status"] == "FAILED"
    server.start()
    done = run("away", server.uri, *_RUN).wait(600)
    assert done.status == 0, done.both
    good &= report(
        "the server stays away; resume=true when it is back",
        found_in(server.uri, folder / "away"),
        expected,
        start,
    )
    server.stop()

    # A sweep with all of it in Postgres.
    cluster = Cluster()
    try:
        founds = []
        for name, outages in (("sweep", 0), ("sweep_disturbed", 3)):
            uri, studies = (new_database(cluster.url) for _ in range(2))
            start = time.monotonic()
            process = run(name, uri, *_SWEEP, f"tracking.studies={studies}")
            for _ in range(outages):
                time.sleep(draw.uniform(5, 12))
                cluster.stop()
                time.sleep(draw.uniform(1, 6))
                cluster.start()
            done = process.wait(900)
            assert done.status == 0, done.both
            founds.append(found_in(uri, folder / name))
        what = "Postgres of a sweep stopped and started, 3 times"
        good &= report(what, founds[1], founds[0], start)
    finally:
        cluster.remove()
    shutil.rmtree(folder)
    sys.exit(not good)


if __name__ == "__main__":
    main()
