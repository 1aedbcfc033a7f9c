"""Sweeps over cores and Slurm: presets, and what is lost where a job's process is killed."""

import os
import signal
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from conftest import REPOSITORY, new_database
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn
from mlflow import MlflowClient
from omegaconf import OmegaConf
from optuna.trial import TrialState
from running import Started, results, runs_of
from test_sweeping import all_finished, record_of, start_cold, trials_of

from minilm_exp.errors import ExperimentError
from minilm_exp.launching import Relaunching
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
    """Six cells, of a second each."""
    text = tmp_path / "text.txt"
    passages = [f"the model number {i} and the teacher" for i in range(400)]
    text.write_text("\n\n".join("\n".join(passages[i : i + 4]) for i in range(0, 400, 4)))
    return [
        "-m", "sweeps=relation_set", "experiment=smoke", "recipe.models=[student]", "task=none",
        "corpus=text_files", f"corpus.files=[{text}]", "relations=choice(kk,vv,qq)", "seed=1,2",
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
    deadline = time.monotonic() + 300
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


@pytest.mark.integration
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_job_is_taken_up(launcher, tiny_sweep, postgres, tmp_path):
    """The other cells of a sweep lost, or computed twice, or a run left as running."""
    if launcher == "submitit_local":
        pytest.importorskip("submitit")
    outputs, uri, studies = tmp_path / "outputs", new_database(postgres), new_database(postgres)
    process = start_cold(
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
    assert "6 of 6 cells are finished" in text
    record = record_of(outputs)
    assert all_finished(outputs) and len({cell.run_key for cell in record.cells}) == 6
    assert statuses_of(outputs) == {"FINISHED": 6}
    assert Counter(trial.state for trial in trials_of(outputs, studies)) == {TrialState.COMPLETE: 6}
    client = MlflowClient(tracking_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    below = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == record.run_id]
    assert {r.info.run_id for r in runs} - {r.info.run_id for r in below} == {record.run_id}
    # One that was killed before its first step is begun anew.
    statuses = Counter(r.info.status for r in below)
    assert statuses["FINISHED"] == 6 and set(statuses) <= {"FINISHED", "KILLED"}
    for one in below:
        history = client.get_metric_history(one.info.run_id, "distill/loss/total")
        steps = [metric.step for metric in history]
        assert len(steps) == len(set(steps)) == (4 if one.info.status == "FINISHED" else 0)


@pytest.mark.integration
def test_sweep_outlives_a_restart_of_its_database(tiny_sweep, cluster, tmp_path):
    """A sweep that ends, or computes a cell twice, as the database of studies was restarted."""
    outputs = tmp_path / "outputs"
    process = Started(outputs, *tiny_sweep, "seed=1", f"tracking.studies={cluster.url}")
    try:
        while not statuses_of(outputs)["FINISHED"] and process.is_alive:
            time.sleep(0.02)
        cluster.stop()
        time.sleep(3)
        cluster.start()
        done = process.wait()
    finally:
        process.send(signal.SIGKILL)
    text = done.both
    assert done.status == 0, text
    assert "does not answer" in text and "3 of 3 cells are finished" in text
    states = Counter(trial.state for trial in trials_of(outputs, cluster.url))
    assert states == {TrialState.COMPLETE: 3}
    statuses = Counter(
        run.info.status for run in runs_of(outputs, record_of(outputs).run_id).values()
    )
    assert statuses == {"FINISHED": 3}


class Deadly:
    """A launcher one of whose jobs takes all of a call with it."""

    def __init__(self, deadly):
        self.deadly, self.calls = deadly, []

    def launch(self, job_overrides, initial_job_idx):
        self.calls.append((initial_job_idx, len(job_overrides)))
        if [self.deadly] in job_overrides:
            raise BrokenProcessPool("it is gone")
        return [JobReturn(overrides=overrides) for overrides in job_overrides]


def test_job_that_is_killed_each_time_fails_alone(tmp_path, capsys):
    """A sweep that one job too large for the memory ends, or that tries it for ever."""
    launcher = Deadly("seed=2")
    config = OmegaConf.create(
        {
            "hydra": {"sweep": {"dir": str(tmp_path)}},
            "tracking": {
                "uri": "sqlite://",
                "experiment": "x",
                "studies": "sqlite://",
                "retry_seconds": 0,
            },
        }
    )
    jobs = [["seed=1"], ["seed=2"], ["seed=3"]]
    returns = Relaunching(launcher, config).launch(jobs, 7)
    assert launcher.calls == [(7, 3), (7, 3), (7, 1), (8, 1), (9, 1)]
    assert [r.overrides for r in (returns[0], returns[2])] == [jobs[0], jobs[2]]
    with pytest.raises(ExperimentError, match="killed three times"):
        _ = returns[1].return_value
    told = capsys.readouterr().err
    assert "3 jobs are launched again" in told and "launched by itself" in told


SBATCH = """#!/bin/sh
for script; do :; done
cp "$script" {copy}
echo "sbatch: error: no such partition" >&2
exit 1
"""


def test_script_for_slurm(tmp_path, monkeypatch):
    """Jobs without the GPU, the time or the requeueing that were asked for; a slip tried thrice."""
    pytest.importorskip("submitit")
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

    for name, text in {"sbatch": SBATCH.format(copy=tmp_path / "script"), "srun": ""}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    register_resolvers()
    overrides = [
        "sweeps=relation_set", "hydra/launcher=submitit_slurm", f"hydra.sweep.dir={tmp_path}",
        "hydra.launcher.partition=gpu", "hydra.launcher.array_parallelism=3",
        "hydra.launcher.timeout_min=90", "hydra.job.name=run",
    ]  # fmt: skip
    with initialize_config_dir(str(REPOSITORY / "conf")):
        config = compose("config", overrides, return_hydra_config=True)
    options = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    options.pop("_target_")
    launcher = Relaunching(SlurmLauncher(**options), config)
    launcher._launcher.setup(hydra_context=None, task_function=None, config=config)
    with pytest.raises(Exception, match="no such partition"):
        launcher.launch([["seed=1"], ["seed=2"], ["seed=3"], ["seed=4"]], 0)
    lines = (tmp_path / "script").read_text().splitlines()
    for line in (
        "array=0-3%3", "partition=gpu", "gpus-per-node=1", "cpus-per-task=8", "mem=32GB",
        "time=90", "requeue", "open-mode=append", "job-name=run", "signal=USR2@120",
    ):  # fmt: skip
        assert f"#SBATCH --{line}" in lines, lines
