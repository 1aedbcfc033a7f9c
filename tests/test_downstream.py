"""Scores of models on tasks: what each run records, what is done once, and which model is kept.

Most tests put a stand-in in the place of fine-tuning, which test_finetune.py looks after.
"""

import copy
import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from test_finetune import (
    make_data,
    make_encoder,
    make_examples,
    make_questions,
    make_task,
    make_tokenizer,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from minilm_exp import downstream
from minilm_exp.downstream import Model, Scoring, load_tasks
from minilm_exp.errors import ExperimentError
from minilm_exp.parsing import parse
from minilm_exp.student import load_checkpoint, set_dropout
from minilm_exp.task_settings import Family, Files, Grid, HubData, NextPassage, TaskTraining
from minilm_exp.tasks.finetune import Scored
from minilm_exp.tasks.spans import Answer
from minilm_exp.tracking import start_tracking

NAME = "made_up"
BELOW = "tags.`mlflow.parentRunId` = '{}'"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Database URI and its folder; a database takes seconds to make, so there is one."""
    folder = tmp_path_factory.mktemp("store")
    return f"sqlite:///{folder}/mlflow.db", folder


@pytest.fixture(scope="module")
def client(store):
    start_tracking(store[0], "an experiment", store[1], "the first").finish("FINISHED")
    return MlflowClient(tracking_uri=store[0])


@pytest.fixture(scope="module")
def base_settings(compose_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unused")
    return parse(compose_config("experiment=smoke", f"outputs_dir={folder}"))


@pytest.fixture(scope="module")
def model():
    return Model(make_encoder().eval(), make_tokenizer())


def make_training(grid=None, **changes):
    family = Family(
        epochs=2,
        batch_size=4,
        learning_rate=1e-3,
        warmup_ratio=0.1,
        weight_decay=0.01,
        hidden_dropout=0.1,
        attention_dropout=0.0,
        max_length=20,
        doc_stride=4,
        grid=Grid(**(grid or {})),
    )
    return TaskTraining({"glue": family}, search="grid" if grid else "none", **changes)


@pytest.fixture
def scoring(store, base_settings, tmp_path):
    """Makes the scoring of a run; runs of one test share their outputs folder."""

    def made(
        run_id=None,
        *,
        folder="run",
        task=None,
        keep_models=False,
        precision="fp32",
        seed=1,
        rerun=False,
        resume=False,
        grid=None,
        **training,
    ):
        settings = dataclasses.replace(
            base_settings,
            outputs_dir=str(tmp_path / "outputs"),
            tasks={NAME: task or make_task()},
            task_training=make_training(grid, **training),
            recipe=dataclasses.replace(base_settings.recipe, keep_models=keep_models),
            seed=seed,
            rerun=rerun,
            resume=resume,
        )
        tracker = start_tracking(store[0], "an experiment", store[1], "a run", run_id)
        run_folder = tmp_path / "outputs" / "runs" / folder
        run_folder.mkdir(parents=True, exist_ok=True)
        return Scoring(settings, precision, run_folder, tracker)

    return made


class Stand:
    """Stands in for fine-tuning: scores as told, and keeps a folder that says what was trained.

    Attributes:
        jobs: What was fine-tuned.
        scores: Gives the metrics of a job, or raises.
        answers: Gives the predictions of a part.
    """

    def __init__(self):
        self.jobs = []
        self.scores = lambda job: {"accuracy": 0.5}
        self.answers = lambda part, examples: [0] * len(examples)

    def __call__(
        self,
        encoder,
        tokenizer,
        job,
        title,
        log_metrics,
        keep_in=None,
        checkpoints=None,
        lm_head=None,
    ):
        self.jobs.append(job)
        log_metrics({"loss": 1.5}, 10)
        metrics = self.scores(job)
        if keep_in is not None:
            keep_in.mkdir(parents=True)
            (keep_in / "model").write_text(describe(job))
        parts = dict(job.data.validation)
        parts |= {f"test_{part}".rstrip("_"): e for part, e in job.data.test.items()}
        predictions = {part: self.answers(part, examples) for part, examples in parts.items()}
        return Scored(metrics, [metrics], 1, predictions)

    @property
    def trained(self):
        return [describe(job) for job in self.jobs]


def describe(job):
    return f"rate {job.settings.learning_rate:g} epochs {job.settings.epochs} seed {job.seed}"


@pytest.fixture
def stand(monkeypatch):
    stand = Stand()
    monkeypatch.setattr(downstream, "finetune", stand)
    return stand


def by_rate(scores):
    """Scores of a stand-in by learning rate and seed; a text is the reason why there is none."""

    def score(job):
        value = scores[job.settings.learning_rate]
        if isinstance(value, dict) and job.seed in value:
            value = value[job.seed]
        if isinstance(value, str):
            raise ExperimentError(value)
        return value if isinstance(value, dict) else {"accuracy": value}

    return score


@pytest.fixture
def children(client):
    """The runs below a run, the first one first."""

    def found(run_id):
        [experiment] = {client.get_run(run_id).info.experiment_id}
        runs = client.search_runs([experiment], BELOW.format(run_id))
        return sorted(runs, key=lambda run: run.info.start_time)

    return found


def history(client, run, name):
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]


def artifact(client, run_id, name):
    return Path(client.download_artifacts(run_id, name)).read_text(encoding="utf-8")


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


# What is recorded


def test_every_fine_tuning_is_a_run_below(scoring, client, children, model):
    """Hours of training that leave one number, or runs that nobody finds from their parent."""
    data = make_data(num_train=40)
    run = scoring(num_seeds=2)
    outcome = run.score(NAME, data, "student", model)
    parent_id = run.tracker.run_id
    below = children(parent_id)
    assert [child.info.run_name for child in below] == [
        f"student on {NAME} seed=1",
        f"student on {NAME} seed=1001",
    ]
    for child, seed in zip(below, (1, 1001)):
        assert child.info.status == "FINISHED"
        tags, params = child.data.tags, child.data.params
        assert (tags["task"], tags["role"], tags["seed"]) == (NAME, "student", str(seed))
        assert tags["finetuning_key"] and "taken_from" not in tags
        expected = {"task": NAME, "role": "student", "seed": seed, "learning_rate": 1e-3,
                    "epochs": 2, "batch_size": 4, "max_length": 20, "warmup_ratio": 0.1,
                    "weight_decay": 0.01, "hidden_dropout": 0.1}  # fmt: skip
        assert {name: params[name] for name in expected} == {n: str(v) for n, v in expected.items()}
        # 10 steps an epoch, and a loss each 10.
        assert [step for step, _ in history(client, child, "loss")] == [10, 20]
        epochs = history(client, child, "accuracy")
        assert [step for step, _ in epochs] == [10, 20]
        best = child.data.metrics["best/accuracy"]
        assert best == max(value for _, value in epochs)
        assert epochs[int(child.data.metrics["best/epoch"]) - 1][1] == best
        written = lines(artifact(client, child.info.run_id, "predictions/validation.jsonl"))
        rows = [{name: line[name] for name in ("first", "second", "label")} for line in written]
        assert rows == data.validation[""].rows.to_list()
        right = [line["prediction"] == line["label"] for line in written]
        assert sum(right) / len(right) == best
        here = run.folder / "predictions" / f"{NAME}-student-seed{seed}" / "validation.jsonl"
        assert lines(here.read_text(encoding="utf-8")) == written
    # And the parent has their mean and spread.
    values = [child.data.metrics["best/accuracy"] for child in below]
    parent = client.get_run(parent_id).data.metrics
    assert parent[f"task/{NAME}/accuracy"] == statistics.fmean(values)
    assert parent[f"task/{NAME}/accuracy_std"] == pytest.approx(statistics.stdev(values))
    assert parent[f"task/{NAME}/num_seeds"] == 2
    assert not [name for name in parent if name == "loss" or name.startswith("best/")]
    assert outcome.best.mean == {"accuracy": statistics.fmean(values)}
    assert outcome.best.spread == {"accuracy": pytest.approx(statistics.stdev(values))}
    assert outcome.best.num_seeds == 2


def test_mean_and_spread_are_those_of_the_seeds(scoring, client, children, model, stand):
    """A spread of the whole population, of the wrong runs, or where there is one run alone."""
    values = {1: 0.5, 1001: 0.75, 2001: 0.625}
    stand.scores = lambda job: {"accuracy": values[job.seed], "f1": 1 - values[job.seed]}
    run = scoring(num_seeds=3)
    best = run.score(NAME, make_data(), "student", model).best
    assert [job.seed for job in stand.jobs] == [1, 1001, 2001]
    assert best.mean == {"accuracy": 0.625, "f1": 0.375}
    assert best.spread == {"accuracy": 0.125, "f1": 0.125}
    parent = client.get_run(run.tracker.run_id).data.metrics
    assert parent == {
        f"task/{NAME}/accuracy": 0.625,
        f"task/{NAME}/f1": 0.375,
        f"task/{NAME}/accuracy_std": 0.125,
        f"task/{NAME}/f1_std": 0.125,
        f"task/{NAME}/num_seeds": 3,
    }
    alone = scoring(seed=5)
    values[5] = 0.5
    assert alone.score(NAME, make_data(), "student", model).best.spread == {}
    names = client.get_run(alone.tracker.run_id).data.metrics
    assert not [name for name in names if name.endswith("_std")]


def test_models_are_told_apart(scoring, client, children, model, stand):
    """The teacher's score written over the student's."""
    values = {"student": 0.5, "undistilled": 0.25, "teacher": 0.75}
    run = scoring()
    for number, (role, value) in enumerate(values.items()):
        stand.scores = lambda job, value=value: {"accuracy": value}
        other = Model(make_encoder(seed=10 + number), model.tokenizer)
        run.score(NAME, make_data(), role, other)
    parent = client.get_run(run.tracker.run_id).data.metrics
    assert {name: value for name, value in parent.items() if "num_seeds" not in name} == {
        f"task/{NAME}/accuracy": 0.5,
        f"task/{NAME}/undistilled/accuracy": 0.25,
        f"task/{NAME}/teacher/accuracy": 0.75,
    }
    assert [child.data.tags["role"] for child in children(run.tracker.run_id)] == list(values)
    folders = {path.name for path in (run.folder / "predictions").iterdir()}
    assert folders == {f"{NAME}-{role}-seed1" for role in values}


def test_predictions_of_every_part_are_written(scoring, client, children, model, stand):
    """One language's or split's predictions over another's; or numbers where labels have names."""
    whole = make_data(num_validation=12).validation[""].rows
    first, second = (make_examples(whole.to_list()[part]) for part in (slice(4), slice(4, 12)))
    data = dataclasses.replace(
        make_data(),
        validation={"en": first, "de": second},
        test={"de": second},
        label_names=["ham", "späm"],
    )
    answers = {"en": 0, "de": 1, "test_de": 0}
    stand.answers = lambda part, examples: [answers[part]] * len(examples)
    stand.scores = lambda job: {"accuracy_mean": 0.5}
    run = scoring(task=make_task(score="accuracy_mean"))
    run.score(NAME, data, "student", model)
    [child] = children(run.tracker.run_id)
    names = [file.path for file in client.list_artifacts(child.info.run_id, "predictions")]
    assert sorted(names) == [f"predictions/{part}.jsonl" for part in ("de", "en", "test_de")]
    labels = ["ham", "späm"]
    for part, examples in (("en", first), ("de", second), ("test_de", second)):
        written = lines(artifact(client, child.info.run_id, f"predictions/{part}.jsonl"))
        assert [line["first"] for line in written] == examples.rows["first"][:]
        assert [line["label"] for line in written] == [labels[i] for i in examples.rows["label"]]
        assert {line["prediction"] for line in written} == {labels[answers[part]]}


def test_predictions_of_a_share_stand_beside_their_examples(scoring, model):
    """Predictions of a part of a split next to the first examples of the whole of it."""
    data = make_data(num_train=8, num_validation=50)
    run = scoring(max_validation_examples=7)
    run.score(NAME, data, "student", model)
    folder = run.folder / "predictions" / f"{NAME}-student-seed1"
    written = lines((folder / "validation.jsonl").read_text(encoding="utf-8"))
    chosen = [data.validation[""].rows[index * 50 // 7]["first"] for index in range(7)]
    assert [line["first"] for line in written] == chosen


def test_answers_are_written_as_the_official_scripts_read_them(
    scoring, client, children, model, stand
):
    """Answers without ids, with escaped letters, or without the scores that a threshold needs."""
    data = make_questions(num_train=4, num_validation=3)
    stand.answers = lambda part, examples: [Answer("wörd", -1.5), Answer("", 2.0), Answer("b", 0.0)]
    stand.scores = lambda job: {"f1": 0.5, "exact_match": 0.5}
    run = scoring(task=make_task("spans"))
    run.score(NAME, data, "student", model)
    [child] = children(run.tracker.run_id)
    ids = data.validation[""].rows["id"][:]
    answers = artifact(client, child.info.run_id, "predictions/validation.json")
    assert json.loads(answers) == dict(zip(ids, ["wörd", "", "b"]))
    assert "wörd" in answers
    nulls = artifact(client, child.info.run_id, "predictions/validation_null_scores.json")
    assert json.loads(nulls) == dict(zip(ids, [-1.5, 2.0, 0.0]))


# A search


def test_search_trains_every_cell_and_reports_the_best(scoring, client, children, model, stand):
    """The last cell for the best one; or the best alone, so that nobody sees the others."""
    stand.scores = lambda job: {
        "accuracy": {1e-3: 0.5, 2e-3: 0.75}[job.settings.learning_rate]
        + {1: 0.0, 3: 0.125}[job.settings.epochs]
        + {1: 0.0, 1001: 0.0625}[job.seed]
    }
    run = scoring(grid={"learning_rate": [1e-3, 2e-3], "epochs": [1, 3]}, num_seeds=2)
    outcome = run.score(NAME, make_data(), "teacher", model)
    cells = [(rate, epochs) for rate in (1e-3, 2e-3) for epochs in (1, 3)]
    assert [cell.settings for cell in outcome.cells] == [
        {"learning_rate": rate, "epochs": epochs} for rate, epochs in cells
    ]
    assert [cell.mean["accuracy"] for cell in outcome.cells] == [
        0.53125, 0.65625, 0.78125, 0.90625
    ]  # fmt: skip
    assert [cell.num_seeds for cell in outcome.cells] == [2] * 4
    assert outcome.best is outcome.cells[3]
    below = children(run.tracker.run_id)
    assert len(below) == len(stand.jobs) == 8
    tried = {(c.data.params["learning_rate"], c.data.params["epochs"], c.data.params["seed"])
             for c in below}  # fmt: skip
    assert tried == {(str(r), str(e), str(s)) for r, e in cells for s in (1, 1001)}
    assert len({child.info.run_name for child in below}) == 8
    assert f"teacher on {NAME} seed=1 epochs=3, learning_rate=0.002" in {
        child.info.run_name for child in below
    }
    assert len(list((run.folder / "predictions").iterdir())) == 8
    metrics = client.get_run(run.tracker.run_id).data.metrics
    prefix = f"task/{NAME}/teacher"
    assert metrics[f"{prefix}/accuracy"] == 0.90625
    assert metrics[f"{prefix}/best/learning_rate"] == 2e-3
    assert metrics[f"{prefix}/best/epochs"] == 3
    table = json.loads(artifact(client, run.tracker.run_id, f"grids/{NAME}-teacher.json"))
    assert table == [dataclasses.asdict(cell) for cell in outcome.cells]


def test_search_is_decided_by_the_selected_value(scoring, client, model, stand):
    """A cross-lingual cell chosen by the score that is reported, not by what the task says."""
    stand.scores = by_rate({
        1e-3: {"accuracy": 0.9, "macro_f1": 0.1},
        2e-3: {"accuracy": 0.5, "macro_f1": 0.3},
        3e-3: {"accuracy": 0.7, "macro_f1": 0.3},
    })  # fmt: skip
    task = make_task(metrics=["accuracy", "macro_f1"], select="macro_f1")
    run = scoring(task=task, grid={"learning_rate": [1e-3, 2e-3, 3e-3]})
    outcome = run.score(NAME, make_data(), "student", model)
    # Of equal cells the first one.
    assert outcome.best is outcome.cells[1]
    metrics = client.get_run(run.tracker.run_id).data.metrics
    assert metrics[f"task/{NAME}/accuracy"] == 0.5
    assert metrics[f"task/{NAME}/best/learning_rate"] == 2e-3


def test_one_cell_is_no_search(scoring, client, model, stand):
    """A table of one cell, or its settings as what a search found."""
    run = scoring(grid={"learning_rate": [2e-3]})
    outcome = run.score(NAME, make_data(), "student", model)
    assert [cell.settings for cell in outcome.cells] == [{}]
    assert stand.trained == ["rate 0.002 epochs 2 seed 1"]
    metrics = client.get_run(run.tracker.run_id).data.metrics
    assert not [name for name in metrics if "/best/" in name]
    assert not client.list_artifacts(run.tracker.run_id, "grids")


def test_diverging_cell_does_not_end_the_others(scoring, client, children, model):
    """A search of a day that ends in its first cell; or a cell that is silently left out."""
    data = make_data(num_train=40)
    run = scoring(grid={"learning_rate": [1e30, 1e-3]})
    outcome = run.score(NAME, data, "student", model)
    diverged, best = outcome.cells
    assert outcome.best is best
    assert diverged.settings == {"learning_rate": 1e30}
    assert (diverged.mean, diverged.spread, diverged.num_seeds) == ({}, {}, 0)
    assert "task_training.learning_rate" in diverged.error
    assert best.error is None
    failed, finished = children(run.tracker.run_id)
    assert (failed.info.status, finished.info.status) == ("FAILED", "FINISHED")
    assert "task_training.learning_rate" in failed.data.tags["error"]
    table = json.loads(artifact(client, run.tracker.run_id, f"grids/{NAME}-student.json"))
    assert "task_training.learning_rate" in table[0]["error"]
    # What failed was not stored as if it had been done.
    assert len(list(Path(run.settings.outputs / "finetuned").iterdir())) == 1


def test_cell_without_one_of_its_seeds_has_no_mean(scoring, model, stand):
    """A cell that wins by the one seed which did not diverge."""
    stand.scores = by_rate({1e-3: {1: 0.9, 1001: "diverged"}, 2e-3: 0.5})
    run = scoring(grid={"learning_rate": [1e-3, 2e-3]}, num_seeds=2)
    outcome = run.score(NAME, make_data(), "student", model)
    assert outcome.best is outcome.cells[1]
    assert (outcome.cells[0].error, outcome.cells[0].mean) == ("diverged", {})


def test_search_without_a_single_score_is_an_error(scoring, client, children, model, stand):
    """An empty table that looks like a result."""
    stand.scores = by_rate({1e-3: "first reason", 2e-3: "last reason"})
    run = scoring(grid={"learning_rate": [1e-3, 2e-3]})
    with pytest.raises(ExperimentError, match=f"student on {NAME}.*2 cells.*last reason"):
        run.score(NAME, make_data(), "student", model)
    assert [child.info.status for child in children(run.tracker.run_id)] == ["FAILED"] * 2
    assert client.get_run(run.tracker.run_id).data.metrics == {}


def test_given_value_is_no_longer_searched(scoring, children, model, stand):
    """A learning rate that was asked for, with cells of others beside it."""
    grid = {"learning_rate": [1e-3, 2e-3], "epochs": [1, 3]}
    run = scoring(grid=grid, learning_rate=5e-4)
    outcome = run.score(NAME, make_data(), "student", model)
    assert [cell.settings for cell in outcome.cells] == [{"epochs": 1}, {"epochs": 3}]
    assert stand.trained == ["rate 0.0005 epochs 1 seed 1", "rate 0.0005 epochs 3 seed 1"]


# What was done before


def test_same_fine_tuning_is_done_once(scoring, client, children, model, monkeypatch):
    """The teacher of six students fine-tuned six times; or a score without its predictions."""
    data = dataclasses.replace(make_questions(num_train=12, num_validation=6), num_labels=2)
    task = make_task("spans")
    first = scoring(task=task, folder="first")
    expected = first.score(NAME, data, "teacher", model)
    monkeypatch.setattr(downstream, "finetune", None)  # calling it would be an error
    second = scoring(task=task, folder="second")
    # The same weights, whatever they are called in this run.
    outcome = second.score(NAME, data, "student", model)
    assert outcome.best.mean == expected.best.mean
    [source], [child] = children(first.tracker.run_id), children(second.tracker.run_id)
    assert child.data.tags["taken_from"] == source.info.run_id
    assert child.data.tags["role"] == "student"
    assert child.info.status == "FINISHED"
    best = {n: v for n, v in source.data.metrics.items() if n.startswith("best/")}
    assert best and {n: v for n, v in child.data.metrics.items() if n.startswith("best/")} == best
    for name in ("validation.json", "validation_null_scores.json"):
        texts = [
            artifact(client, run.info.run_id, f"predictions/{name}") for run in (source, child)
        ]
        assert texts[0] == texts[1]
        assert (second.folder / "predictions" / f"{NAME}-student-seed1" / name).is_file()
    score = first.settings.tasks[NAME].score
    metrics = client.get_run(second.tracker.run_id).data.metrics
    assert metrics[f"task/{NAME}/{score}"] == expected.best.mean[score]


def twice(scoring, stand, model, first=None, second=None, data=None, other=None, other_data=None):
    """What is trained in a second run after a first one."""
    scoring(folder="first", **(first or {})).score(NAME, data or make_data(), "student", model)
    stand.jobs.clear()
    run = scoring(folder="second", **(second or {}))
    run.score(NAME, other_data or data or make_data(), "student", other or model)
    return stand.trained


DIFFERENT = {
    "seed": {"seed": 2},
    "precision": {"precision": "bf16"},
    "learning rate": {"learning_rate": 2e-3},
    "epochs": {"epochs": 3},
    "length": {"max_length": 19},
    "share of the examples": {"max_validation_examples": 5},
    "metrics": {"task": make_task(metrics=["accuracy", "f1"])},
    "selection": {"task": make_task(metrics=["accuracy", "f1"], select="f1")},
    "version": {"task": dataclasses.replace(make_task(), version=2)},
    "rerun": {"rerun": True},
}


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_other_fine_tuning_is_done(change, scoring, model, stand):
    """The stored score of other settings, or the old one where a new one was asked for."""
    stand.scores = lambda job: {"accuracy": 0.5, "f1": 0.5}
    assert len(twice(scoring, stand, model, second=change)) == 1


ALIKE = {
    "task data elsewhere": {"task": make_task(data=HubData("x/y", None, "main", "elsewhere"))},
    "files elsewhere": {"task": make_task(files=Files("elsewhere.csv"))},
    "more seeds": {"num_seeds": 1},
    "default written out": {"learning_rate": 1e-3},
    "kept": {"keep_models": False},
    "limits above the data": {"max_train_examples": 1000, "max_validation_examples": 1000},
}


@pytest.mark.parametrize("change", ALIKE.values(), ids=ALIKE.keys())
def test_names_and_places_do_not_make_another_fine_tuning(change, scoring, model, stand):
    """A moved folder that trains everything anew."""
    assert twice(scoring, stand, model, second=change) == []


def test_further_seeds_are_added(scoring, model, stand):
    """Three seeds trained again for want of a fourth."""
    more = {"num_seeds": 4}
    trained = twice(scoring, stand, model, first={"num_seeds": 3}, second=more)
    assert trained == ["rate 0.001 epochs 2 seed 3001"]


def test_cell_of_a_search_is_found_without_the_search(scoring, model, stand):
    """The best cell trained again to report it alone."""
    first = {"grid": {"learning_rate": [1e-3, 2e-3]}}
    assert twice(scoring, stand, model, first, {"learning_rate": 2e-3}) == []


def test_other_weights_are_fine_tuned(scoring, model, stand):
    """One student's score for another that differs by its last layer."""
    encoder = copy.deepcopy(model.encoder)
    with torch.no_grad():
        encoder.encoder.layer[-1].output.dense.bias[-1] += 1e-6
    assert twice(scoring, stand, model, other=Model(encoder, model.tokenizer))


def test_other_architecture_over_the_same_weights_is_fine_tuned(scoring, model, stand):
    """A head count or an activation, which no tensor shows."""
    encoder = copy.deepcopy(model.encoder)
    encoder.config.num_attention_heads = 4
    assert twice(scoring, stand, model, other=Model(encoder, model.tokenizer))


def test_other_tokens_are_fine_tuned(scoring, model, stand):
    """The score with one tokenizer for that with another."""
    other = Model(model.encoder, make_tokenizer("roberta"))
    assert twice(scoring, stand, model, other=other)


def test_saved_and_loaded_model_is_the_same(scoring, model, stand, tmp_path):
    """A checkpoint that is fine-tuned again although its distillation has just done it."""
    encoder = copy.deepcopy(model.encoder)
    set_dropout(encoder.config, 0.3, 0.2)
    encoder.save_pretrained(tmp_path / "student")
    model.tokenizer.save_pretrained(tmp_path / "student")
    loaded = Model(*load_checkpoint(str(tmp_path / "student")))
    # What a call leaves in a tokenizer does not make another of it.
    loaded.tokenizer(["w1 w2"], truncation=True, max_length=3, padding="max_length")
    assert twice(scoring, stand, model, other=loaded) == []


@pytest.mark.parametrize("part", ["train", "validation", "test", "name of a part"])
def test_other_data_are_fine_tuned_on(part, scoring, model, stand):
    """Scores of a data set that was edited since."""
    data = make_data()
    test = make_data(num_validation=9).validation[""]
    data = dataclasses.replace(data, test={"": test})
    changed = make_examples([{**test.rows[0], "label": 1 - test.rows[0]["label"]}])
    other = {
        "train": {"train": changed},
        "validation": {"validation": {"": changed}},
        "test": {"test": {"": changed}},
        "name of a part": {"test": {"de": test}},
    }[part]
    assert twice(scoring, stand, model, data=data, other_data=dataclasses.replace(data, **other))


def test_other_results_version_is_fine_tuned(scoring, model, stand, monkeypatch):
    """Scores of code that computed something else."""
    scoring(folder="first").score(NAME, make_data(), "student", model)
    monkeypatch.setattr(downstream, "RESULTS_VERSION", downstream.RESULTS_VERSION + 1)
    scoring(folder="second").score(NAME, make_data(), "student", model)
    assert len(stand.jobs) == 2


DAMAGE = {
    "empty": lambda text: "",
    "garbage": lambda text: "\x00\x01",
    "cut": lambda text: text[: len(text) // 2],
    "null": lambda text: "null",
    "list": lambda text: "[]",
    "of another key": lambda text: text.replace('"key": "', '"key": "0'),
    "without predictions": lambda text: json.dumps(
        {name: value for name, value in json.loads(text).items() if name != "predictions"}
    ),
    "without a run": lambda text: json.dumps(
        {name: value for name, value in json.loads(text).items() if name != "parent_id"}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_result_is_ignored(damage, scoring, children, model, stand):
    """A full disk or a killed copy ends every later run, or gives a score of nothing."""
    scoring(folder="first").score(NAME, make_data(), "student", model)
    [file] = (scoring().settings.outputs / "finetuned").iterdir()
    whole = file.read_text(encoding="utf-8")
    file.write_text(damage(whole), encoding="utf-8")
    second = scoring(folder="second")
    second.score(NAME, make_data(), "student", model)
    assert len(stand.jobs) == 2
    # And it is whole again.
    assert json.loads(file.read_text(encoding="utf-8"))["parent_id"] == second.tracker.run_id
    assert list(file.parent.iterdir()) == [file]


# Runs that go on


def test_resumed_run_repeats_nothing(scoring, client, children, model, stand):
    """What was done before the interruption is trained, or stands in MLflow, twice."""
    more = {"num_seeds": 2, "grid": {"learning_rate": [1e-3, 2e-3]}}
    stand.scores = by_rate({1e-3: 0.5, 2e-3: 0.75})
    first = scoring(**more)
    expected = first.score(NAME, make_data(), "student", model)
    resumed = scoring(first.tracker.run_id, resume=True, **more)
    assert resumed.tracker.run_id == first.tracker.run_id
    outcome = resumed.score(NAME, make_data(), "student", model)
    assert outcome == expected
    assert len(stand.jobs) == 4
    assert len(children(first.tracker.run_id)) == 4
    run = client.get_run(first.tracker.run_id)
    assert history(client, run, f"task/{NAME}/accuracy") == [(0, 0.75)]


def test_interrupted_run_goes_on_where_it_was(scoring, client, children, model, stand):
    """A resumed run that begins with the first cell again, or that skips the interrupted one."""

    def interrupt(job):
        if job.seed == 1001:
            raise KeyboardInterrupt
        return {"accuracy": 0.5}

    stand.scores = interrupt
    first = scoring(num_seeds=3)
    with pytest.raises(KeyboardInterrupt):
        first.score(NAME, make_data(), "student", model)
    assert [child.info.status for child in children(first.tracker.run_id)] == ["FINISHED", "KILLED"]
    stand.jobs.clear()
    stand.scores = lambda job: {"accuracy": 0.5}
    resumed = scoring(first.tracker.run_id, num_seeds=3, resume=True)
    resumed.score(NAME, make_data(), "student", model)
    assert [job.seed for job in stand.jobs] == [1001, 2001]
    statuses = [child.info.status for child in children(first.tracker.run_id)]
    assert statuses == ["FINISHED"] * 3


def test_run_that_takes_a_result_takes_it_once(scoring, children, model, stand):
    """A resumed run lists what it took from another run a second time."""
    scoring(folder="first").score(NAME, make_data(), "student", model)
    second = scoring(folder="second")
    second.score(NAME, make_data(), "student", model)
    resumed = scoring(second.tracker.run_id, folder="second", resume=True)
    resumed.score(NAME, make_data(), "student", model)
    assert len(stand.jobs) == 1
    assert len(children(second.tracker.run_id)) == 1


def test_resumed_rerun_does_not_take_the_result_of_before(scoring, children, model, stand):
    """rerun=true that trains half anew, and after an interruption takes the rest from the store."""
    scoring(folder="first", num_seeds=2).score(NAME, make_data(), "student", model)
    stand.jobs.clear()
    rerun = scoring(folder="second", num_seeds=1, rerun=True)
    rerun.score(NAME, make_data(), "student", model)
    resumed = scoring(rerun.tracker.run_id, folder="second", num_seeds=2, rerun=True, resume=True)
    resumed.score(NAME, make_data(), "student", model)
    assert [job.seed for job in stand.jobs] == [1, 1001]
    assert len(children(rerun.tracker.run_id)) == 2


def test_result_is_not_done_before_it_is_recorded(scoring, children, model, stand, monkeypatch):
    """Killed between training and recording: a run without predictions that is never repaired."""
    tracker_class = type(scoring().tracker)
    log_artifact = tracker_class.log_artifact

    def killed(self, path, folder=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(tracker_class, "log_artifact", killed)
    first = scoring()
    with pytest.raises(KeyboardInterrupt):
        first.score(NAME, make_data(), "student", model)
    monkeypatch.setattr(tracker_class, "log_artifact", log_artifact)
    scoring(first.tracker.run_id, resume=True).score(NAME, make_data(), "student", model)
    finished = [run for run in children(first.tracker.run_id) if run.info.status == "FINISHED"]
    assert len(finished) == 1
    assert "best/accuracy" in finished[0].data.metrics


# The models that stay


def kept_models(run):
    """What lies in the folder of kept models; every file of it."""
    return {
        str(path.relative_to(run.folder / "models")): path.read_text(encoding="utf-8")
        for path in (run.folder / "models").rglob("*")
        if path.is_file() and path.name != "finetuning_key"
    }


def test_model_of_the_best_cell_and_seed_is_kept(scoring, model, stand):
    """Gigabytes of every cell, or the last model under the best score."""
    stand.scores = by_rate(
        {1e-3: {1: 0.5, 1001: 0.25}, 2e-3: {1: 0.625, 1001: 0.75}, 3e-3: {1: 0.25, 1001: 0.5}}
    )
    grid = {"learning_rate": [1e-3, 2e-3, 3e-3]}
    run = scoring(grid=grid, num_seeds=2, keep_models=True)
    run.score(NAME, make_data(), "student", model)
    assert kept_models(run) == {f"{NAME}-student/model": "rate 0.002 epochs 2 seed 1001"}
    assert [path.name for path in (run.folder / "models").iterdir()] == [f"{NAME}-student"]
    other = Model(make_encoder(seed=3), model.tokenizer)
    run.score(NAME, make_data(), "teacher", other)
    assert set(kept_models(run)) == {f"{NAME}-student/model", f"{NAME}-teacher/model"}


def test_kept_model_belongs_to_the_reported_cell(scoring, model, stand):
    """A lucky seed of another cell: a model whose settings are not those that are reported."""
    stand.scores = by_rate(
        {1e-3: {1: 0.625, 1001: 0.6875}, 2e-3: {1: 0.25, 1001: 0.75}, 3e-3: {1: 0.5, 1001: 0.5}}
    )
    grid = {"learning_rate": [1e-3, 2e-3, 3e-3]}
    run = scoring(grid=grid, num_seeds=2, keep_models=True)
    outcome = run.score(NAME, make_data(), "student", model)
    assert outcome.best.settings == {"learning_rate": 1e-3}
    assert kept_models(run) == {f"{NAME}-student/model": "rate 0.001 epochs 2 seed 1001"}


def test_model_of_a_failed_cell_is_not_kept(scoring, model, stand):
    """The model of a cell that is reported as failed, because its first seed was good."""
    stand.scores = by_rate({1e-3: {1: 0.9, 1001: "diverged"}, 2e-3: {1: 0.5, 1001: 0.25}})
    run = scoring(grid={"learning_rate": [1e-3, 2e-3]}, num_seeds=2, keep_models=True)
    run.score(NAME, make_data(), "student", model)
    assert kept_models(run) == {f"{NAME}-student/model": "rate 0.002 epochs 2 seed 1"}


def test_no_model_is_kept_unasked(scoring, model, stand):
    """A disk full of fine-tuned models after a sweep."""
    run = scoring()
    run.score(NAME, make_data(), "student", model)
    assert not (run.folder / "models").exists()


def test_kept_model_survives_a_resumption(scoring, children, model, stand):
    """The best model trained again, or gone, because the resumed run trained nothing."""
    more = {"num_seeds": 3, "keep_models": True}
    values = {1: 0.5, 1001: 0.75, 2001: 0.25}
    stand.scores = lambda job: {"accuracy": values[job.seed]}
    first = scoring(**more)
    first.score(NAME, make_data(), "student", model)
    resumed = scoring(first.tracker.run_id, resume=True, **more)
    resumed.score(NAME, make_data(), "student", model)
    assert len(stand.jobs) == 3
    best = {f"{NAME}-student/model": "rate 0.001 epochs 2 seed 1001"}
    assert kept_models(resumed) == best
    # Another seed is better than what lay there.
    values[3001] = 1.0
    resumed = scoring(first.tracker.run_id, resume=True, **more | {"num_seeds": 4})
    resumed.score(NAME, make_data(), "student", model)
    assert kept_models(resumed) == {f"{NAME}-student/model": "rate 0.001 epochs 2 seed 3001"}
    assert len(stand.jobs) == 4


def test_model_of_a_taken_result_is_trained_again(scoring, children, model, stand):
    """A task-specific teacher that is not there, because its score was known already."""
    values = {1: 0.5, 1001: 0.75}
    stand.scores = lambda job: {"accuracy": values[job.seed]}
    scoring(folder="first", num_seeds=2).score(NAME, make_data(), "student", model)
    stand.jobs.clear()
    second = scoring(folder="second", num_seeds=2, keep_models=True)
    second.score(NAME, make_data(), "student", model)
    assert stand.trained == ["rate 0.001 epochs 2 seed 1001"]
    assert kept_models(second) == {f"{NAME}-student/model": "rate 0.001 epochs 2 seed 1001"}
    names = sorted(child.info.run_name for child in children(second.tracker.run_id))
    assert len(names) == 3 and [name for name in names if "trained again" in name] == names[-1:]


def test_model_of_a_taken_result_is_copied(scoring, model, stand):
    """Hours of fine-tuning a teacher again that lies beside, for every student of a sweep."""
    values = {1: 0.5, 1001: 0.75}
    stand.scores = lambda job: {"accuracy": values[job.seed]}
    first = scoring(folder="first", num_seeds=2, keep_models=True)
    first.score(NAME, make_data(), "student", model)
    stand.jobs.clear()
    second = scoring(folder="second", num_seeds=2, keep_models=True)
    second.score(NAME, make_data(), "student", model)
    assert not stand.jobs
    assert kept_models(second) == kept_models(first)
    assert kept_models(second) == {f"{NAME}-student/model": "rate 0.001 epochs 2 seed 1001"}


def test_half_written_model_is_not_taken_for_the_best(scoring, model, stand):
    """A model that was being saved when the run was killed, under the key of another one."""
    more = {"num_seeds": 2, "keep_models": True}
    values = {1: 0.5, 1001: 0.75}

    def killed(job):
        if job.seed == 1001:
            half = first.folder / "models" / f"{NAME}-student.next"
            half.mkdir(parents=True)
            (half / "model").write_text("half of a model")
            raise KeyboardInterrupt
        return {"accuracy": values[job.seed]}

    stand.scores = killed
    first = scoring(**more)
    with pytest.raises(KeyboardInterrupt):
        first.score(NAME, make_data(), "student", model)
    stand.scores = lambda job: {"accuracy": values[job.seed]}
    values[1001] = 0.25  # so that nothing better comes later
    resumed = scoring(first.tracker.run_id, resume=True, **more)
    resumed.score(NAME, make_data(), "student", model)
    assert kept_models(resumed) == {f"{NAME}-student/model": "rate 0.001 epochs 2 seed 1"}


def test_kept_model_is_the_one_that_was_scored(scoring, model):
    """A folder with the encoder alone, or with other weights than those of the score."""
    data = make_data(num_train=40)
    run = scoring(num_seeds=2, keep_models=True)
    run.score(NAME, data, "student", model)
    folder = run.folder / "models" / f"{NAME}-student"
    kept = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in data.validation[""].rows:
        with torch.no_grad():
            output = kept(**tokenizer(row["first"], row["second"], return_tensors="pt"))
        found.append(int(output.logits[0].argmax()))
    scores = {}
    for path in (run.folder / "predictions").glob("*/validation.jsonl"):
        predictions = [line["prediction"] for line in lines(path.read_text(encoding="utf-8"))]
        right = [p == row["label"] for p, row in zip(predictions, data.validation[""].rows)]
        scores[sum(right)] = predictions
    assert len(scores) >= 1
    assert found == scores[max(scores)]


# Failures


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("the sky fell"), "FAILED"),
        (ExperimentError("the sky fell"), "FAILED"),
        (KeyboardInterrupt("the sky fell"), "KILLED"),
    ],
    ids=["unexpected", "expected", "interrupted"],
)
def test_failure_is_recorded_and_raised(error, status, scoring, children, model, stand):
    """A fine-tuning that runs for ever in MLflow, or an error that only its run knows of."""

    def fail(job):
        raise error

    stand.scores = fail
    run = scoring()
    with pytest.raises(type(error), match="the sky fell"):
        run.score(NAME, make_data(), "student", model)
    [child] = children(run.tracker.run_id)
    assert child.info.status == status
    assert "the sky fell" in child.data.tags["error"]
    assert type(error).__name__ in child.data.tags["error"]
    assert child.info.end_time is not None
    assert not list((run.settings.outputs / "finetuned").glob("*"))


def test_unexpected_error_ends_the_search(scoring, model, stand):
    """A bug that is reported as a cell which could not be trained."""

    def fail(job):
        raise RuntimeError("a bug")

    stand.scores = fail
    run = scoring(grid={"learning_rate": [1e-3, 2e-3]})
    with pytest.raises(RuntimeError, match="a bug"):
        run.score(NAME, make_data(), "student", model)
    assert len(stand.jobs) == 1


# Before anything is trained


def write_csv(path, rows):
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "labels", "message"),
    [
        ({"score": "macro_f1"}, ["a", "b"], r"tasks\.made_up\.score=macro_f1 is not among"),
        ({"select": "f1_en"}, ["a", "b"], r"tasks\.made_up\.select=f1_en is not among"),
        (
            {"metrics": ["matthews"], "score": "matthews"},
            ["a", "a"],
            "matthews of made_up is not defined",
        ),
        ({}, ["a", "c"], "label='c'"),
    ],
    ids=["score", "selection", "one label", "unknown label"],
)
def test_scores_that_cannot_be_are_refused_before_training(
    changes, labels, message, scoring, tmp_path
):
    """A mistake in the task that shows once the distillation of a day has ended."""
    rows = [(f"text {index}", "ab"[index % 2]) for index in range(20)]
    files = Files(
        train=write_csv(tmp_path / "train.csv", rows),
        validation=write_csv(tmp_path / "validation.csv", list(enumerate(labels))),
    )
    task = make_task(files=files, text_columns=["text"], **changes)
    settings = scoring(task=task).settings
    with pytest.raises(ExperimentError, match=message):
        load_tasks(settings, downstream.find_tasks(settings), [])


def test_tasks_are_loaded_from_where_they_were_found(scoring, tmp_path):
    """The task that is made from the corpus left out, or looked for on the hub."""
    rows = [(f"text {index}", "ab"[index % 2]) for index in range(40)]
    task = make_task(files=Files(write_csv(tmp_path / "mine.csv", rows)), text_columns=["text"])
    settings = scoring(task=task).settings
    smoke = NextPassage(version=1, num_train=32, num_validation=32, passage_characters=20)
    settings.tasks["next_passage"] = smoke
    splits = downstream.find_tasks(settings)
    assert list(splits) == [NAME]
    documents = ["\n".join(f"Here {d} stands passage {p}." for p in range(9)) for d in range(30)]
    loaded = load_tasks(settings, splits, documents)
    assert list(loaded) == [NAME, "next_passage"]
    assert loaded[NAME].label_names == ["a", "b"]
    assert len(loaded[NAME].train) + len(loaded[NAME].validation[""]) == 40
    assert len(loaded["next_passage"].train) == smoke.num_train
