"""What a run leaves in MLflow, read back through MLflow's own client from a fresh database."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient

from minilm_exp.errors import ExperimentError
from minilm_exp.tracking import end_interrupted, start_tracking

pytestmark = pytest.mark.makes_database

SECRET = "sekret-31415"
URI = f"postgresql://user:{SECRET}@db.example/x"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Database URI and outputs folder; a database takes seconds to make, so there is one."""
    outputs = tmp_path_factory.mktemp("store") / "outputs"
    return f"sqlite:///{outputs}/mlflow.db", outputs


@pytest.fixture
def start(store):
    def started(run_id=None, name="a run", parent_id=None, experiment="an experiment"):
        return start_tracking(store[0], experiment, store[1], name, run_id, parent_id)

    return started


@pytest.fixture
def client(store):
    return MlflowClient(tracking_uri=store[0])


def read(client, store, run_id, name):
    """The text of an artifact, from where the store says that it is."""
    folder = client.download_artifacts(run_id, "")
    assert folder.startswith(str(store[1]))
    with open(f"{folder}/{name}", encoding="utf-8") as file:
        return file.read()


def steps_and_values(client, run_id, name):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def test_everything_is_there(start, client, store, tmp_path, monkeypatch):
    """A kind of record goes nowhere, or artifacts land below the working directory."""
    monkeypatch.chdir(tmp_path)
    tracker = start(name="teacher-student-seed1")
    tracker.log_params(
        {f"group.name{i}": i for i in range(150)} | {"flag": True, "list": [1, 2], "none": []}
    )
    tracker.set_tags({"seed": "1"})
    tracker.log_metrics({"distill/loss/query-query": 0.5}, 2)
    tracker.log_metrics({"distill/loss/query-query": 0.25}, 4)
    tracker.log_metrics({"score": 0.75})
    tracker.log_dataset("corpus", "0123456789abcdef", "a folder", "training")
    tracker.log_text("first\tsecond\n", "predictions/x.tsv")
    figure = Figure()
    figure.subplots().plot([1, 2])
    tracker.log_figure(figure, "plots/loss.png")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    tracker.log_artifact(tmp_path / "student")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    tracker.log_artifact(tmp_path / "config.yaml")
    tracker.finish("FINISHED")

    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "teacher-student-seed1"
    assert run.info.end_time is not None
    assert len(run.data.params) == 153
    assert run.data.params["group.name149"] == "149"
    assert run.data.params["list"] == "1,2" and run.data.params["none"] == "[]"
    assert run.data.tags["seed"] == "1"
    assert run.data.metrics == {"distill/loss/query-query": 0.25, "score": 0.75}
    history = [(2, 0.5), (4, 0.25)]
    assert steps_and_values(client, tracker.run_id, "distill/loss/query-query") == history
    assert tracker.history("distill/loss/query-query") == history
    [given] = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("corpus", "0123456789abcdef")
    assert [tag.value for tag in given.tags if tag.key == "mlflow.data.context"] == ["training"]
    assert read(client, store, tracker.run_id, "predictions/x.tsv") == "first\tsecond\n"
    assert read(client, store, tracker.run_id, "student/config.json") == "{}"
    assert read(client, store, tracker.run_id, "config.yaml") == "seed: 1\n"
    [plot] = client.list_artifacts(tracker.run_id, "plots")
    assert plot.file_size > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"student", "config.yaml"}


def test_processes_name_the_same_dataset_at_once(start, client):
    """MLflow looks for a dataset and then adds it: a run that another one's dataset breaks."""
    trackers = [start(name=f"run {number}") for number in range(4)]
    for number in range(10):
        gate = Barrier(len(trackers))

        def log(tracker, digest=f"{number:032d}", gate=gate):
            gate.wait()
            tracker.log_dataset("corpus", digest, "a folder", "training")

        with ThreadPoolExecutor(len(trackers)) as threads:
            list(threads.map(log, trackers))
    for tracker in trackers:
        inputs = client.get_run(tracker.run_id).inputs.dataset_inputs
        assert len({one.dataset.digest for one in inputs}) == len(inputs) == 10


def test_artifacts_are_below_the_outputs(start, client, store):
    """MLflow's default, ./mlruns of whatever folder one stands in."""
    tracker = start()
    assert client.get_run(tracker.run_id).info.artifact_uri.startswith(store[1].as_uri())


def test_two_runs_share_the_experiment(start, client):
    """Each run makes an experiment of its own, and nothing can be compared."""
    runs = [client.get_run(start().run_id).info for _ in range(2)]
    assert runs[0].run_id != runs[1].run_id
    assert runs[0].experiment_id == runs[1].experiment_id
    assert client.get_experiment(runs[0].experiment_id).name == "an experiment"


def test_database_that_was_being_created_is_no_obstacle(tmp_path):
    """A kill in the first second of the first run, and no other run ever."""
    (tmp_path / "mlflow.db.partial").write_bytes(b"half a database")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = start_tracking(uri, "e", tmp_path, "r")
    tracker.finish("FINISHED")
    assert not (tmp_path / "mlflow.db.partial").exists()
    assert MlflowClient(tracking_uri=uri).get_run(tracker.run_id).info.status == "FINISHED"


def start_when_all_do(folder, gate, started):
    gate.wait(60)
    uri = f"sqlite:///{folder}/mlflow.db"
    try:
        started.put(start_tracking(uri, "e", folder, "r").run_id)
    except BaseException as error:
        started.put(repr(error))


def test_processes_make_the_database_at_once(tmp_path):
    """Two first runs find no database, and one makes it while the other does."""
    context = multiprocessing.get_context("fork")
    gate, started = context.Barrier(2), context.SimpleQueue()
    given = (tmp_path, gate, started)
    processes = [context.Process(target=start_when_all_do, args=given) for _ in range(2)]
    for process in processes:
        process.start()
    run_ids = [started.get() for _ in processes]
    for process in processes:
        process.join(60)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert [client.get_run(run_id).info.run_id for run_id in run_ids] == run_ids
    assert len(client.search_experiments(filter_string="name = 'e'")) == 1


def test_resumed_run_logs_no_step_twice(start, client):
    """Steps since the last checkpoint stand twice in the history, and means are wrong."""
    first = start()
    for step in (1, 2, 3):
        first.log_metrics({"loss": float(step), "other": 0.0}, step)
    resumed = start(run_id=first.run_id)
    assert resumed.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    for step in (2, 3, 4, 5):
        resumed.log_metrics({"loss": float(step), "new": 1.0}, step)
    assert steps_and_values(client, first.run_id, "loss") == [(s, float(s)) for s in range(1, 6)]
    assert [step for step, _ in steps_and_values(client, first.run_id, "new")] == [2, 3, 4, 5]


def test_resumed_run_logs_what_has_no_step(start, client):
    """Final numbers, at step 0, are taken for old ones."""
    first = start()
    first.log_metrics({"loss": 1.0}, 3)
    resumed = start(run_id=first.run_id)
    resumed.log_metrics({"score": 0.5})
    assert client.get_run(first.run_id).data.metrics["score"] == 0.5


def test_resumed_run_may_repeat_its_params(start, client):
    """MLflow refuses a param that changes, which ends a run resumed with another log interval."""
    first = start()
    first.log_params({"seed": 1})
    first.finish("FAILED")
    resumed = start(run_id=first.run_id)
    resumed.log_params({"seed": 2})
    assert client.get_run(first.run_id).data.params == {"seed": "1"}


def test_run_that_is_gone_starts_anew(start):
    """Resuming fails because someone deleted the run or the database."""
    assert start(run_id="0" * 32).run_id != "0" * 32


def test_deleted_run_starts_anew(start, client):
    """What a user put into the bin is written on, unseen."""
    first = start()
    client.delete_run(first.run_id)
    assert start(run_id=first.run_id).run_id != first.run_id


@pytest.mark.parametrize(("status", "expected"), [(None, "KILLED"), ("FAILED", "FAILED")])
def test_left_over_run_is_killed(start, store, client, status, expected):
    """A run of a dead process looks as if it ran; or a run that had ended is rewritten."""
    tracker = start()
    if status:
        tracker.finish(status)
    end_interrupted(store[0], tracker.run_id)
    assert client.get_run(tracker.run_id).info.status == expected
    end_interrupted(store[0], "0" * 32)  # one that is not there is no error


# Runs below runs


def test_child_is_a_run_of_its_own(start, client):
    """Losses of several fine-tunings in one history, or runs that their parent does not show."""
    parent = start(name="the parent")
    child = parent.child("the child", {"task": "mrpc", "seed": "1"})
    other = parent.child("another", {})
    child.log_metrics({"loss": 1.0}, 10)
    other.log_metrics({"loss": 2.0}, 10)
    child.log_params({"epochs": 3})
    child.finish("FINISHED")
    run = client.get_run(child.run_id)
    assert run.info.run_name == "the child"
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert (run.data.tags["task"], run.data.tags["seed"]) == ("mrpc", "1")
    assert steps_and_values(client, child.run_id, "loss") == [(10, 1.0)]
    assert steps_and_values(client, other.run_id, "loss") == [(10, 2.0)]
    above = client.get_run(parent.run_id)
    assert above.info.status == client.get_run(other.run_id).info.status == "RUNNING"
    assert above.data.metrics == above.data.params == {}
    assert "mlflow.parentRunId" not in above.data.tags
    assert above.info.experiment_id == run.info.experiment_id


def test_children_of_a_resumed_run_log_everything(start, client):
    """A new child taken for a resumed one, whose first steps are left out."""
    first = start()
    first.log_metrics({"loss": 1.0}, 30)
    child = start(run_id=first.run_id).child("a child", {})
    child.log_params({"epochs": 3})
    for step in (10, 20):
        child.log_metrics({"loss": float(step)}, step)
    assert steps_and_values(client, child.run_id, "loss") == [(10, 10.0), (20, 20.0)]
    assert client.get_run(child.run_id).data.params == {"epochs": "3"}


def test_run_can_stand_below_a_run_of_before(start, client):
    """Scores of a checkpoint in another experiment than the run that made it."""
    parent = start(experiment="the first experiment")
    parent.finish("FINISHED")
    below = start(parent_id=parent.run_id)
    run = client.get_run(below.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.info.experiment_id == client.get_run(parent.run_id).info.experiment_id
    assert client.get_run(parent.run_id).info.status == "FINISHED"
    # And goes on below it.
    assert start(run_id=below.run_id, parent_id=parent.run_id).run_id == below.run_id


def test_parent_that_is_gone_is_no_error(start, client):
    """A checkpoint that cannot be fine-tuned because its run is in another database, or deleted."""
    parent = start()
    client.delete_run(parent.run_id)
    for missing in ("0" * 32, parent.run_id):
        run = client.get_run(start(parent_id=missing).run_id)
        assert "mlflow.parentRunId" not in run.data.tags
        assert client.get_experiment(run.info.experiment_id).name == "an experiment"


@pytest.mark.parametrize("by_resuming", [False, True])
def test_left_over_children_are_killed_with_their_run(by_resuming, start, store, client):
    """A fine-tuning of a dead process looks as if it ran; or one that had ended is rewritten."""
    parent = start()
    running, finished, failed = (parent.child(name, {}) for name in ("a", "b", "c"))
    finished.finish("FINISHED")
    failed.finish("FAILED")
    unrelated = start().child("d", {})
    by_another_process = start(parent_id=parent.run_id)
    if by_resuming:
        start(run_id=parent.run_id)
    else:
        end_interrupted(store[0], parent.run_id)
    runs = (parent, running, finished, failed, unrelated, by_another_process)
    assert [client.get_run(tracker.run_id).info.status for tracker in runs] == [
        "RUNNING" if by_resuming else "KILLED", "KILLED", "FINISHED", "FAILED", "RUNNING",
        "RUNNING",
    ]  # fmt: skip


# Failures


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("too small"), "FAILED"), (KeyboardInterrupt("too small"), "KILLED")],
)
def test_failure_is_recorded_with_its_reason(error, status, start, client):
    """A failed run without its reason, or one that the user ended among those that failed."""
    tracker = start()
    tracker.fail(error)
    run = client.get_run(tracker.run_id)
    assert run.info.status == status
    assert run.data.tags["error"] == f"{type(error).__name__}: too small"


def test_failure_of_the_record_does_not_hide_the_error(start, monkeypatch, caplog):
    """A lost database reported in place of what went wrong; or the status lost with the reason."""
    tracker = start()
    finished = []

    def lost(*_):
        raise OSError(f"cannot reach {URI}")

    monkeypatch.setattr(tracker, "set_tags", lost)
    monkeypatch.setattr(tracker, "finish", finished.append)
    tracker.fail(ValueError("too small"))
    assert finished == ["FAILED"]
    assert "could not be recorded" in caplog.text
    assert SECRET not in caplog.text


def test_secrets_are_blacked_out(start, client, store, monkeypatch):
    """A password or token is stored for everybody who can read the database."""
    monkeypatch.setenv("HF_TOKEN", "opaque-2718281828")
    tracker = start()
    tracker.log_params({"tracking.uri": URI, "token": "x opaque-2718281828 y"})
    tracker.set_tags({"error": f"cannot reach {URI}", "hub": "hf_abcdefghijklmnop"})
    tracker.log_text(f"uri: {URI}\npassword: {SECRET}\nopaque-2718281828\n", "config.txt")
    tracker.log_dataset("corpus", "0" * 8, f"s3://key:{SECRET}@host/x", "training")
    child = tracker.child("a child", {"hub": "hf_abcdefghijklmnop"})
    child.fail(OSError(f"cannot reach {URI}"))
    run = client.get_run(tracker.run_id)
    text = read(client, store, tracker.run_id, "config.txt")
    everything = f"{run.to_dictionary()} {client.get_run(child.run_id).to_dictionary()} {text}"
    for secret in (SECRET, "opaque-2718281828", "hf_abcdefghijklmnop"):
        assert secret not in everything
    assert run.data.params["tracking.uri"] == "postgresql://user:***@db.example/x"
    assert "uri: postgresql://user:***@db.example/x" in text


def test_long_values_are_cut_and_not_refused(start, client):
    """A long list of files or a long error ends the run."""
    tracker = start()
    tracker.log_params({"corpus.files": "x" * 20_000})
    tracker.set_tags({"error": "y" * 20_000})
    run = client.get_run(tracker.run_id)
    assert set(run.data.params["corpus.files"]) == {"x"}
    assert set(run.data.tags["error"]) == {"y"}


@pytest.mark.parametrize(
    "uri",
    [
        pytest.param(f"http://user:{SECRET}@127.0.0.1:9", id="server"),
        pytest.param(f"postgresql://user:{SECRET}@127.0.0.1:9/x", id="postgresql"),
        pytest.param(f"mysql+pymysql://user:{SECRET}@127.0.0.1:9/x", id="mysql"),
        pytest.param(f"nonsense://user:{SECRET}@127.0.0.1", id="unknown scheme"),
    ],
)
def test_store_that_cannot_be_reached(uri, tmp_path, monkeypatch):
    """A traceback of the database library, with the password in it."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_MAX_RETRIES", "0")
    with pytest.raises(ExperimentError, match=r"tracking\.uri") as caught:
        start_tracking(uri, "an experiment", tmp_path / "outputs", "a run")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["mlflow.db", "mlflow.db/below.db"])
def test_file_that_is_no_database(tmp_path, name):
    """A damaged database, or a file where its folder should be, ends in a traceback."""
    (tmp_path / "mlflow.db").write_text("no database\n" * 100)
    with pytest.raises(ExperimentError, match=r"tracking\.uri"):
        start_tracking(f"sqlite:///{tmp_path}/{name}", "an experiment", tmp_path, "a run")
