"""What a run leaves in MLflow, read back through MLflow's own client from a fresh database."""

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient

from minilm_exp.errors import ExperimentError
from minilm_exp.tracking import end_interrupted, start_tracking

SECRET = "sekret-31415"
URI = f"postgresql://user:{SECRET}@db.example/x"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Database URI and outputs folder; a database takes seconds to make, so there is one."""
    outputs = tmp_path_factory.mktemp("store") / "outputs"
    return f"sqlite:///{outputs}/mlflow.db", outputs


@pytest.fixture
def start(store):
    def started(run_id=None, name="a run"):
        return start_tracking(*store[:1], "an experiment", store[1], name, run_id)

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
    tracker.log_params({f"group.name{i}": i for i in range(150)} | {"flag": True, "list": [1, 2]})
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
    assert len(run.data.params) == 152
    assert run.data.params["group.name149"] == "149"
    assert run.data.params["list"] == "[1, 2]"
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


def test_secrets_are_blacked_out(start, client, store, monkeypatch):
    """A password or token is stored for everybody who can read the database."""
    monkeypatch.setenv("HF_TOKEN", "opaque-2718281828")
    tracker = start()
    tracker.log_params({"tracking.uri": URI, "token": "x opaque-2718281828 y"})
    tracker.set_tags({"error": f"cannot reach {URI}", "hub": "hf_abcdefghijklmnop"})
    tracker.log_text(f"uri: {URI}\npassword: {SECRET}\nopaque-2718281828\n", "config.txt")
    tracker.log_dataset("corpus", "0" * 8, f"s3://key:{SECRET}@host/x", "training")
    run = client.get_run(tracker.run_id)
    text = read(client, store, tracker.run_id, "config.txt")
    everything = f"{run.to_dictionary()} {text}"
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
