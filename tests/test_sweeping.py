"""Sweeps: their cells, and what is lost or done twice when they are repeated, killed or doubled."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from omegaconf import read_write
from optuna.trial import TrialState
from running import Started, client_of, command, environment, run, server

from minilm_exp.parsing import parse
from minilm_exp.provenance import run_key
from minilm_exp.resolvers import register_resolvers
from minilm_exp.settings import init_layers
from minilm_exp.studies import SharedStorage
from minilm_exp.sweep_record import Runs, open_record, read_record
from minilm_exp.sweeping import _cells, _grid, _space

# Cells of each sweep with the embedded teacher; a search has none.
CELLS = {
    "relation_set": 5,
    "teacher_layer": 6,
    "relation_heads": 4,
    "more_relations": 2,
    "student_size": 9,
    "value_relation": 9,
    "layer_to_layer": 6,
    "upper_middle_v1": 4,
    "search": None,
}


def composed(*overrides, hydra=False):
    register_resolvers()
    with initialize_config_dir(str(REPOSITORY / "conf")):
        return compose("config", list(overrides), return_hydra_config=hydra)


def cells_of(*overrides):
    """As on a command line with -m."""
    fixed = [o for o in overrides if not any(sign in o for sign in ",(")]
    config = composed(*fixed, hydra=True)
    with read_write(config.hydra.overrides):
        config.hydra.overrides.task = list(overrides)
    return _cells(_grid(_space(config.hydra)))


def test_every_sweep_is_counted_here():
    """A new sweep that no test composes."""
    assert {path.stem for path in (REPOSITORY / "sweeps").glob("*.yaml")} == set(CELLS)


@pytest.mark.parametrize("name", [name for name, number in CELLS.items() if number])
def test_cells_differ(name):
    """A sweep that runs the same cell again and again, as one over the wrong key does."""
    cells = cells_of(f"sweeps={name}")
    keys = set()
    for cell in cells:
        overrides = [f"{key}={value}" for key, value in cell.items()]
        settings = parse(composed(f"sweeps={name}", *overrides), True)
        assert settings.recipe.models == ["student"] and settings.resume
        keys.add(run_key(settings, "fp32", {}))
    assert len(keys) == len(cells) == CELLS[name]


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        (["sweeps=teacher_layer", "teacher=bert_base"], [12, 11, 10, 9, 8, 7]),
        (["sweeps=teacher_layer", "layer_selection.teacher_layer=choice(3,5)"], [3, 5]),
        (["sweeps=teacher_layer", "layer_selection.teacher_layer=3,5"], [3, 5]),
        (["sweeps=teacher_layer", "layer_selection.teacher_layer=range(2,5)"], [2, 3, 4]),
        (["sweeps=layer_to_layer", "teacher=bert_base", "objective=minilmv1"], [6, 4, 3]),
    ],
)
def test_cells_follow_teacher_and_command_line(overrides, values):
    """Layers of another teacher's, or a list on the command line that is added to the sweep's."""
    cells = cells_of(*overrides)
    (name,) = cells[0]
    assert [int(cell[name]) for cell in cells] == values


def test_rows_of_teacher_layer_start_alike():
    """Random weights below the layers that the student has, teacher layers above: another study."""
    for cell in cells_of("sweeps=teacher_layer"):
        (override,) = (f"{name}={value}" for name, value in cell.items())
        settings = parse(composed("sweeps=teacher_layer", override), True)
        student, layer = settings.student, settings.layer_selection.teacher_layer
        assert student.init == "teacher_layers"
        assert init_layers(student, layer, settings.teacher.num_layers) == [2, 4, 6]


def test_student_of_an_assistant_is_half_of_the_teacher():
    """Half of the assistant, which is half of the teacher already."""
    settings = parse(composed("sweeps=student_size", "method=minilm_assistant"), True)
    assistant, student = (stage.settings.student for stage in settings.stages)
    assert (assistant.num_layers, assistant.hidden_size) == (6, 192)
    assert (student.num_layers, student.hidden_size) == (3, 192)


def test_seeds_come_one_after_the_other():
    """A table that is complete only when the last run of all has ended."""
    cells = cells_of("sweeps=more_relations", "seed=1,2")
    assert [str(cell["seed"]) for cell in cells] == ["1", "1", "2", "2"]


# Sweeps that run

SWEEP = ["-m", "sweeps=relation_set", "experiment=smoke", "recipe.models=[student]"]
TWO = [*SWEEP, "relations=choice(kk,vv)"]


def record_of(outputs):
    (file,) = (outputs / "sweeps").glob("*.json")
    return read_record(file)


def all_finished(outputs):
    runs = Runs(outputs)
    return all(len(runs.standing(cell)) == 1 for cell in record_of(outputs).cells)


def trials_of(outputs, storage=None):
    storage = SharedStorage(storage or f"sqlite:///{outputs}/optuna.db")
    names = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
    return [t for name in names for t in optuna.load_study(study_name=name, storage=storage).trials]


def runs_below(outputs, run_id):
    client = client_of(outputs)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{run_id}'")


def start_cold(outputs, *overrides):
    """As a shell does it: at its exit it ends the processes that its launcher began."""
    return subprocess.Popen(
        command(outputs, *overrides),
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("sweep") / "outputs"
    done = run(outputs, *TWO)
    assert done.status == 0, done.both
    return outputs, done


@pytest.mark.integration
def test_sweep_is_recorded(swept):
    """Runs without their sweep, or trials and runs that do not name each other."""
    outputs, done = swept
    record = record_of(outputs)
    assert [cell.values for cell in record.cells] == [
        {"seed": "1", "relations": "kk"},
        {"seed": "1", "relations": "vv"},
    ]
    assert all_finished(outputs)
    client = client_of(outputs)
    parent = client.get_run(record.run_id)
    assert parent.info.status == "FINISHED" and parent.data.tags["sweep"] == "relation_set"
    children = {run.info.run_id: run for run in runs_below(outputs, record.run_id)}
    assert len(children) == 2
    trials = trials_of(outputs)
    assert {trial.user_attrs["mlflow_run_id"] for trial in trials} == set(children)
    for trial in trials:
        child = children[trial.user_attrs["mlflow_run_id"]]
        assert child.data.params["relations"] == trial.params["relations"]
        assert child.data.params["seed"] == "1"
        assert child.data.metrics["score"] == trial.value
        assert child.data.tags[f"sweep.{record.name}"].endswith(f" {trial.number}")
    assert "2 cells" in done.stdout and "to go" in done.stdout
    assert "2 of 2 cells are finished" in done.stdout


@pytest.mark.integration
def test_repeating_and_adding_computes_what_is_new(swept, copied):
    """A finished cell computed again, for the same call or for one with another seed."""
    outputs = copied(swept[0])
    before = {path: path.stat().st_mtime_ns for path in outputs.glob("runs/*/result.json")}
    done = run(outputs, *TWO)
    assert done.status == 0 and "nothing to do" in done.stdout, done.both
    assert len(trials_of(outputs)) == 2
    done = run(outputs, *TWO, "seed=1,2")
    assert done.status == 0, done.both
    assert Counter(cell.values["seed"] for cell in record_of(outputs).cells) == {"1": 2, "2": 2}
    after = {path: path.stat().st_mtime_ns for path in outputs.glob("runs/*/result.json")}
    assert len(after) == 4 and before.items() <= after.items()


@pytest.fixture
def copied(tmp_path):
    """A copy at another place."""

    def made(outputs):
        return Path(shutil.copytree(outputs, tmp_path / "outputs"))

    return made


@pytest.mark.integration
def test_rerun_computes_all_again(swept, copied):
    """rerun=true that does nothing because all is finished, or leaves two results of a cell."""
    outputs = copied(swept[0])
    before = {Runs(outputs).result(cell).run_id for cell in record_of(outputs).cells}
    done = run(outputs, *TWO, "rerun=true")
    assert done.status == 0, done.both
    assert "from what the finished ones took" in done.stdout
    assert len(list(outputs.glob("runs/*/result.json"))) == 4 and all_finished(outputs)
    after = {Runs(outputs).result(cell).run_id for cell in record_of(outputs).cells}
    assert len(after | before) == 4
    # What comes later takes the new ones.
    done = run(outputs, *TWO)
    assert "nothing to do" in done.stdout and all_finished(outputs)


@pytest.mark.integration
def test_passwords_are_not_kept(tmp_path):
    """A password of a database in the record, the session or the study."""
    outputs = tmp_path / "outputs"
    secret = "tracking.experiment=x://user:hunter2@host"
    run(outputs, *SWEEP, "relations=kk", "relation_set.num_relation_heads=5", secret)
    files = [path for path in outputs.rglob("*") if path.is_file()]
    assert any(path.name == "sweep.json" for path in files)
    # The name of the experiment itself stands in MLflow's own database.
    found = [p.name for p in files if b"hunter2" in p.read_bytes() and "mlflow.db" not in p.name]
    assert found == []


@pytest.mark.integration
def test_removed_run_is_computed_again(swept, copied):
    """A cell whose trial is complete and whose run is gone, taken for finished."""
    outputs = copied(swept[0])
    gone = Runs(outputs).result(record_of(outputs).cells[0])
    shutil.rmtree(gone.folder)
    done = run(outputs, *TWO)
    assert done.status == 0, done.both
    assert all_finished(outputs)


@pytest.mark.integration
def test_sweep_goes_on_after_a_failure(tmp_path):
    """One bad combination that ends the sweep, or that its end and exit status are silent about."""
    outputs = tmp_path / "outputs"
    done = run(outputs, *SWEEP, "relations=kk", "relation_set.num_relation_heads=choice(5,4)")
    assert done.status != 0
    states = {
        t.params["relation_set.num_relation_heads"]: (t.state, t.user_attrs)
        for t in trials_of(outputs)
    }
    state, attributes = states[5]
    assert state == TrialState.FAIL and "num_relation_heads=5" in attributes["error"]
    assert states[4][0] == TrialState.COMPLETE
    record = record_of(outputs)
    assert "num_relation_heads=5" in record.cells[0].error
    assert Runs(outputs).standing(record.cells[1])
    assert "will fail" in done.stdout and "1 of 2 cells are finished" in done.stdout
    assert "failed: seed=1 relation_set.num_relation_heads=5" in done.stdout
    assert client_of(outputs).get_run(record.run_id).info.status == "FAILED"
    below = {run.info.run_id: run for run in runs_below(outputs, record.run_id)}
    failed = below[attributes["mlflow_run_id"]]
    assert len(below) == 2 and failed.info.status == "FAILED"
    assert "num_relation_heads=5" in failed.data.tags["error"]
    assert failed.data.params["relation_set.num_relation_heads"] == "5"
    # What failed and is no longer asked for is forgotten.
    heads = "relation_set.num_relation_heads=choice(2,4)"
    assert run(outputs, *SWEEP, "relations=kk", heads).status == 0
    asked = [cell.values["relation_set.num_relation_heads"] for cell in record_of(outputs).cells]
    assert asked == ["4", "2"] and all_finished(outputs)


@pytest.mark.integration
def test_killed_sweep_is_finished_by_the_same_call(tmp_path, studies):
    """Finished cells computed again, or the one in work never again."""
    outputs = tmp_path / "outputs"
    given = [*SWEEP, "relations=choice(kk,vv,qq)", f"tracking.studies={studies}"]
    process = Started(outputs, *given)
    deadline = time.monotonic() + 120
    while not list(outputs.glob("runs/*/student/config.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    while len(list(outputs.glob("runs/*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send(signal.SIGKILL)
    assert process.wait().status == -signal.SIGKILL
    assert not all_finished(outputs)
    runs, cells = Runs(outputs), record_of(outputs).cells
    finished = {cell.run_key: r.run_id for cell in cells if (r := runs.result(cell)) is not None}
    done = run(outputs, *given)
    assert done.status == 0, done.both
    record = record_of(outputs)
    assert all_finished(outputs) and len(record.cells) == 3
    runs = Runs(outputs)
    assert finished.items() <= {c.run_key: runs.result(c).run_id for c in record.cells}.items()
    assert Counter(t.state for t in trials_of(outputs, studies))[TrialState.RUNNING] == 0
    statuses = Counter(run.info.status for run in runs_below(outputs, record.run_id))
    assert statuses["RUNNING"] == 0 and statuses["FINISHED"] == 3


@pytest.mark.integration
def test_two_processes_share_the_cells(tmp_path, studies):
    """A cell computed by both, or a cell that neither computes."""
    outputs = tmp_path / "outputs"
    given = [*SWEEP, "relations=choice(kk,vv,qq)", f"tracking.studies={studies}"]
    processes = [Started(outputs, *given) for _ in range(2)]
    ends = [process.wait() for process in processes]
    texts = [done.both for done in ends]
    assert [done.status for done in ends] == [0, 0], texts
    record = record_of(outputs)
    assert all_finished(outputs) and len(record.cells) == 3
    assert len(runs_below(outputs, record.run_id)) == 3
    first_time = [t for t in trials_of(outputs, studies) if "repeats" not in t.user_attrs]
    assert len(first_time) == 3
    # Both tell of all cells, each once, whoever computed it.
    for text in texts:
        assert all(re.search(rf"relations={name} +1 ", text) for name in ("kk", "vv", "qq"))
    assert len({trial.user_attrs["session"] for trial in trials_of(outputs, studies)}) == 2


@pytest.mark.integration
def test_process_that_comes_when_all_cells_are_in_work(tmp_path):
    """A traceback, as there is no best trial yet."""
    outputs = tmp_path / "outputs"
    steps = [f"training.{name}=300" for name in ("max_steps", "evaluation_steps")]
    given = [*SWEEP, "relations=choice(kk)", *steps, "training.checkpoint_steps=300"]
    first = Started(outputs, *given)
    while not list(outputs.glob("runs/*/result.json")) and first.is_alive:
        time.sleep(0.05)
    second = Started(outputs, *given)
    ends = [process.wait() for process in (first, second)]
    assert [done.status for done in ends] == [0, 0], ends
    assert "waiting for the cells" in ends[1].both and "1 of 1 cells are finished" in ends[1].both
    assert len(runs_below(outputs, record_of(outputs).run_id)) == 1


@pytest.mark.integration
def test_two_seeds_in_two_terminals(tmp_path):
    """Cells of the other call taken for one's own, and never run."""
    outputs = tmp_path / "outputs"
    processes = [Started(outputs, *TWO, f"seed={seed}") for seed in (1, 2)]
    ends = [process.wait() for process in processes]
    assert [done.status for done in ends] == [0, 0], ends
    record = record_of(outputs)
    assert len(record.cells) == 4 and all_finished(outputs)


def take_trials(url, taken):
    study = optuna.load_study(study_name="queue", storage=SharedStorage(url))
    while (trial := study._pop_waiting_trial_id()) is not None:
        taken.put(trial)
    taken.put(None)


def test_waiting_trials_are_taken_once(studies):
    """Two processes that get the same trial from the database."""
    study = optuna.create_study(study_name="queue", storage=SharedStorage(studies))
    for number in range(60):
        study.enqueue_trial({"x": number})
    processes = server()
    queue = processes.Queue()
    workers = [processes.Process(target=take_trials, args=(studies, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    taken, ended = [], 0
    while ended < 3:
        trial = queue.get(timeout=120)
        ended += trial is None
        taken += [trial] * (trial is not None)
    for worker in workers:
        worker.join()
    assert len(taken) == len(set(taken)) == 60


@pytest.mark.integration
def test_jobs_in_processes_of_their_own(tmp_path):
    """Failures that only the job's process knows of, or a session that cannot be sent to it."""
    outputs = tmp_path / "outputs"
    parallel = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=2"]
    heads = "relation_set.num_relation_heads=choice(5,4)"
    process = start_cold(outputs, *SWEEP, "relations=kk", heads, *parallel)
    text = process.communicate(timeout=300)[0]
    assert process.returncode != 0 and "1 of the runs failed" in text, text
    record = record_of(outputs)
    assert "num_relation_heads=5" in record.cells[0].error
    assert Runs(outputs).standing(record.cells[1])
    ids = {trial.user_attrs["mlflow_run_id"] for trial in trials_of(outputs)}
    assert len(ids) == 2


@pytest.mark.integration
def test_search(tmp_path):
    """Trials beyond those asked for in all, or the same trials asked for again."""
    outputs = tmp_path / "outputs"
    given = [
        "-m", "sweeps=search", "experiment=smoke", "recipe.models=[student]", "num_trials=2",
        "trial_values=[score,parameters]", "hydra.sweeper.direction=[maximize,minimize]",
        "relation_set.num_relation_heads=choice(2,4)", "relations=choice(kk,vv)",
    ]  # fmt: skip
    assert run(outputs, *given).status == 0
    first = [t.params for t in trials_of(outputs)]
    assert len(first) == 2 and all(len(t.values) == 2 for t in trials_of(outputs))
    assert run(outputs, *given, "num_trials=3").status == 0
    assert [t.params for t in trials_of(outputs)][:2] == first
    third = trials_of(outputs)[2]
    assert third.params["training.learning_rate"] not in [
        params["training.learning_rate"] for params in first
    ]
    assert run(outputs, *given, "num_trials=3").status == 0 and len(trials_of(outputs)) == 3
    record = record_of(outputs)
    assert (record.num_trials, record.num_complete) == (3, 3)
    assert record.trial_values == ["score", "parameters"]
    assert record.directions == ["maximize", "minimize"]
    # A trial whose run is gone is made again, and others are not.
    gone = Runs(outputs).result(record.cells[1])
    shutil.rmtree(gone.folder)
    done = run(outputs, *given, "num_trials=3")
    assert done.status == 0 and "3 trials are finished, 1 to go" in done.stdout, done.both
    assert all_finished(outputs) and len(record_of(outputs).cells) == 3
    assert len(trials_of(outputs)) == 4


@pytest.mark.integration
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sweeps=relation_set"], ["sweeps=relation_set", "add -m"]),
        (["-m", "sweeps=relation_sets"], ["relation_set", "teacher_layer"]),
        (
            ["-m", "sweeps=teacher_layer", "teacher=custom", "teacher.path=nowhere"],
            ["teacher.num_layers"],
        ),
        (
            ["-m", "sweeps=relation_set", "training.learning_rate=interval(0.1,0.2)"],
            ["training.learning_rate", "choice"],
        ),
        (
            ["-m", "sweeps=search", "trial_values=[score,parameters]"],
            ["trial_values", "hydra.sweeper.direction"],
        ),
        (["-m", "sweeps=search", "num_trials=0"], ["num_trials=0", "at least 1"]),
        (["-m", "sweeps=search", "num_trials=two"], ["num_trials=two", "at least 1"]),
        (["-m", "sweeps=search", "trial_values=score"], ["trial_values=score", "no list of"]),
        (["-m", "sweeps=search", "trial_values=[scre]"], ["trial_values=['scre']", "parameters"]),
        (["-m", "sweeps=search", "hydra.sweeper.direction=up"], ["direction=up", "maximize"]),
        (
            ["-m", "sweeps=relation_set", "relations=choice(kk,vvv)"],
            ["nothing was started", "relations=vvv", "kk_vv"],
        ),
        (
            ["-m", "sweeps=search", "relations=choice(kk,vvv)"],
            ["nothing was started", "relations=vvv", "kk_vv"],
        ),
        (["-m", "sweeps=relation_set", "trainng.max_steps=1,2"], ["trainng"]),
        (["-m", "sweeps=relation_set", "relations=choice(kk,kk)"], ["relations=kk", "twice"]),
        (["-m", "sweeps=relation_set", "relations=choice()"], ["relations=choice()"]),
    ],
    ids=[
        "no -m",
        "misspelt",
        "unknown shape",
        "a range in a grid",
        "no direction",
        "no trials",
        "trials in words",
        "no list of values",
        "misspelt trial value",
        "misspelt direction",
        "misspelt value",
        "misspelt value of a search",
        "misspelt setting",
        "a value twice",
        "no value",
    ],
)
def test_sweep_that_cannot_begin(tmp_path, overrides, words):
    """Nothing said, or a traceback, or a run with the defaults."""
    done = run(tmp_path / "outputs", *overrides)
    assert done.status != 0 and "Traceback" not in done.both and "unexpected" not in done.both
    assert not list(tmp_path.rglob("sweeps/*.json"))
    for word in words:
        assert word in done.both


def test_damaged_record_is_named(tmp_path):
    """A traceback of JSON for a file that was cut off."""
    with open_record(tmp_path, "s", "s-1") as record:
        record.cell({"seed": "1"})
    file = tmp_path / "sweeps" / "s-1.json"
    assert json.loads(file.read_text())["cells"][0]["values"] == {"seed": "1"}
    file.write_text(file.read_text()[:20])
    with pytest.raises(Exception, match=f"{Path(file).name} is no record of a sweep"):
        read_record(file)
