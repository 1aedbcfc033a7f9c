"""Sweeps over cores and Slurm: presets, and what is lost where a job's process is killed."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPOSITORY, new_database
from hydra import compose, initialize_config_dir
from mlflow import MlflowClient
from omegaconf import OmegaConf
from optuna.trial import TrialState
from test_run import environment, results
from test_sweeping import all_finished, record_of, start, trials_of

from minilm_exp.resolvers import register_resolvers

PRESETS = REPOSITORY / "conf" / "hydra" / "launcher"
LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.sweeper.n_jobs=2"],
}


def schema_of(name):
    """The plugin's own settings, which a preset of the same name hides."""
    if name == "joblib":
        from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf

        return JobLibLauncherConf
    from hydra_plugins.hydra_submitit_launcher import config

    return config.SlurmQueueConf if name == "submitit_slurm" else config.LocalQueueConf


@pytest.mark.parametrize("name", ["joblib", "submitit_local", "submitit_slurm"])
def test_presets_are_complete(name):
    """A setting of the plugin that cannot be changed, or one that it does not know."""
    preset = OmegaConf.load(PRESETS / f"{name}.yaml")
    schema = OmegaConf.structured(schema_of(name))
    assert set(preset) == set(schema)
    OmegaConf.merge(schema, preset)  # the kinds of values
    assert preset._target_ == schema._target_


def test_every_preset_is_tested():
    """A new preset that no test composes."""
    names = {path.stem for path in PRESETS.glob("*.yaml")}
    assert names == {"joblib", "submitit_local", "submitit_slurm"}


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        ([], 1),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"], 3),
        (["hydra/launcher=joblib"], 16),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=-2"], 15),
        (["hydra/launcher=joblib", "hydra.sweeper.n_jobs=5"], 5),
        (["hydra/launcher=submitit_local", "hydra.launcher.cpus_per_task=4"], 4),
        (["hydra/launcher=submitit_local", "hydra.launcher.cpus_per_task=40"], 1),
        (["hydra/launcher=submitit_slurm", "hydra.launcher.array_parallelism=7"], 7),
    ],
)
def test_sweeper_asks_for_as_many_as_the_launcher_computes(overrides, number, monkeypatch):
    """A launcher with places for many jobs that gets one at a time."""
    register_resolvers()
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    with initialize_config_dir(str(REPOSITORY / "conf")):
        config = compose("config", ["sweeps=relation_set", *overrides], return_hydra_config=True)
    assert config.hydra.sweeper.n_jobs == number


@pytest.fixture
def tiny_sweep(tmp_path):
    """Twelve cells, of a second each."""
    text = tmp_path / "text.txt"
    passages = [f"the model number {i} and the teacher" for i in range(400)]
    text.write_text("\n\n".join("\n".join(passages[i : i + 4]) for i in range(0, 400, 4)))
    return [
        "-m", "sweeps=relation_set", "experiment=smoke", "recipe.models=[student]", "task=none",
        "corpus=text_files", f"corpus.files=[{text}]", "relations=choice(kk,vv,qq)", "seed=1,2,3,4",
        "training.checkpoint_steps=2", "training.max_steps=8", "training.evaluation_steps=8",
        "baseline.num_batches=1",
    ]  # fmt: skip


def statuses_of(outputs):
    return Counter(result["status"] for result in results(outputs).values())


def processes_with(*words):
    """Ids of the processes whose command line has all these words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode()
            if all(word in command for word in words):
                found.append(int(folder.name))
        except OSError:
            pass
    return found


def kill_a_job(launcher, process, outputs):
    """One that computes a cell."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        statuses = statuses_of(outputs)
        if statuses["FINISHED"] >= 2 and statuses["RUNNING"]:
            break
        time.sleep(0.02)
    if launcher == "joblib":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        jobs = [int(c) for c in children if int(c) in processes_with("popen_loky")]
    else:
        jobs = processes_with("submitit.core._submit", str(outputs))
    os.kill(jobs[0], signal.SIGKILL)


@pytest.fixture
def warm_python():
    """For submitit's jobs."""
    pytest.importorskip("submitit")
    with tempfile.TemporaryDirectory() as folder:
        file, address = REPOSITORY / "tests" / "warm_python.py", f"{folder}/socket"
        server = subprocess.Popen(
            [sys.executable, file, "serve", address], env=environment(PYTHONPATH=str(REPOSITORY))
        )
        yield f"+hydra.launcher.python='{sys.executable} {file} {address}'"
        server.kill()
        server.wait()


@pytest.mark.integration
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_job_is_taken_up(launcher, tiny_sweep, postgres, tmp_path, request):
    """The other cells of a sweep lost, or computed twice, or a run left as running."""
    if launcher == "submitit_local":
        tiny_sweep.append(request.getfixturevalue("warm_python"))
    outputs, uri, studies = tmp_path / "outputs", new_database(postgres), new_database(postgres)
    process = start(
        outputs, *tiny_sweep, f"hydra/launcher={launcher}", *LAUNCHERS[launcher],
        f"tracking.uri={uri}", f"tracking.studies={studies}",
    )  # fmt: skip
    try:
        kill_a_job(launcher, process, outputs)
        text = process.communicate(timeout=300)[0]
    finally:
        process.kill()
    assert process.returncode == 0, text
    assert "was killed" in text and "launched again" in text
    assert "12 of 12 cells are finished" in text
    record = record_of(outputs)
    assert all_finished(outputs) and len({cell.run_key for cell in record.cells}) == 12
    assert statuses_of(outputs) == {"FINISHED": 12}
    assert Counter(trial.state for trial in trials_of(outputs, studies)) == {
        TrialState.COMPLETE: 12
    }
    client = MlflowClient(tracking_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    below = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == record.run_id]
    assert {r.info.run_id for r in runs} - {r.info.run_id for r in below} == {record.run_id}
    # One that was killed before its first step is begun anew.
    statuses = Counter(r.info.status for r in below)
    assert statuses["FINISHED"] == 12 and set(statuses) <= {"FINISHED", "KILLED"}
    for one in below:
        history = client.get_metric_history(one.info.run_id, "distill/loss/total")
        steps = [metric.step for metric in history]
        assert len(steps) == len(set(steps)) == (4 if one.info.status == "FINISHED" else 0)
