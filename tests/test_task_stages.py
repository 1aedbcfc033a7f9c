"""Stages on a task's own data: a fine-tuned teacher beside a student that learns the task."""

import csv
import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from minilm_exp import task_stages
from minilm_exp.errors import ExperimentError
from minilm_exp.parsing import parse
from minilm_exp.pipeline import run_experiment
from minilm_exp.provenance import run_key
from minilm_exp.tasks import finetune as finetune_module

SOFT = {"kind": "logits", "distance": "kl", "temperature": 2.0}
HIDDEN = {"kind": "states", "state": "hidden", "layers": "uniform", "projection": "shared"}
RELATIONS = {"kind": "relations", "pairs": ["qq", "vv"], "num_relation_heads": 4}
STATES = {"name": "states", "terms": {"hidden": HIDDEN, "relations": RELATIONS}}
PREDICTION = {"name": "prediction", "terms": {"soft": SOFT, "labels": {"kind": "labels"}}}
TWO = {
    "intermediate": {"data": "task", "objective": STATES, "task_training": {"epochs": 2}},
    "prediction": {
        "data": "task",
        "start": "intermediate",
        "objective": PREDICTION,
        "head_only": True,
    },
}
ONE = {"task": {"data": "task", "objective": PREDICTION}}


@pytest.fixture
def task_settings_of(settings_of, tmp_path):
    """Settings of a recipe with a made-up task: whether a text is about a model or a student."""
    drawn = random.Random(5)
    rows = []
    for number in range(72):
        word = ("model", "student")[number % 2]
        rows.append((f"the {word} and {''.join(drawn.sample('abcdefgh', 3))}", word))
    for name, part in (("train", rows[:48]), ("validation", rows[48:])):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])

    def made(recipe_stages, *overrides, models=("student", "undistilled"), **values):
        return settings_of(
            recipe_stages, "task=text_classification",
            f"tasks.text_classification.files.train={tmp_path}/train.csv",
            f"tasks.text_classification.files.validation={tmp_path}/validation.csv",
            "task_training=demo", "task_training.max_length=16", "task_training.batch_size=8",
            "task_training.epochs=3",
            f"recipe.models=[{','.join(models)}]", "recipe.keep_models=true", *overrides,
            **values,
        )  # fmt: skip

    return made


def children(settings, run_id):
    client = MlflowClient(tracking_uri=f"sqlite:///{settings.outputs}/mlflow.db")
    experiment = client.get_run(run_id).info.experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return {run.info.run_name: run for run in runs}


def histories(settings, run):
    client = MlflowClient(tracking_uri=f"sqlite:///{settings.outputs}/mlflow.db")
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run, name)]
        for name in client.get_run(run).data.metrics
    }


def student_weights(result):
    folder = Path(result.folder) / "models" / "text_classification-student"
    return load_file(folder / "model.safetensors")


@pytest.fixture
def trained(monkeypatch):
    """Titles of what was fine-tuned, with the steps that were left to do."""
    titles = []
    finetune = task_stages.finetune

    def counted(encoder, tokenizer, job, title, *more, **named):
        titles.append(title)
        return finetune(encoder, tokenizer, job, title, *more, **named)

    monkeypatch.setattr(task_stages, "finetune", counted)
    monkeypatch.setattr("minilm_exp.downstream.finetune", counted)
    return titles


# One stage


def test_student_learns_from_a_teacher_of_the_task(task_settings_of, trained):
    """A teacher that never learnt the task, a student fine-tuned again, or terms unlogged."""
    settings = task_settings_of(ONE)
    result = run_experiment(settings)
    assert trained == [
        "teacher on text_classification",
        "student on text_classification, task",
        "undistilled on text_classification",
    ]
    assert result.status == "FINISHED" and result.validation_loss is None
    assert set(result.scores) == set(result.undistilled_scores) == {"text_classification"}
    assert result.score == result.scores["text_classification"]
    runs = children(settings, result.run_id)
    run = runs["student on text_classification seed=1"]
    assert {"loss/soft", "loss/labels", "loss", "accuracy", "best/accuracy"} <= set(
        run.data.metrics
    )
    assert run.data.params["objective"] == "prediction" and run.data.params["stage"] == "task"
    folder = Path(result.folder)
    assert not (folder / "student").exists() and not (folder / "finetuning").exists()
    assert not (settings.outputs / "cache" / "corpus").exists()
    kept = folder / "models" / "text_classification-student"
    model = AutoModelForSequenceClassification.from_pretrained(kept)
    assert model.config.id2label == {0: "model", 1: "student"}
    assert len(AutoTokenizer.from_pretrained(kept)) == len(model.get_input_embeddings().weight)


def test_finished_run_is_found_again(task_settings_of, trained):
    """A run without a stage on the corpus that nobody recognises as done."""
    first = run_experiment(task_settings_of(ONE))
    trained.clear()
    assert run_experiment(task_settings_of(ONE)).run_id == first.run_id
    assert not trained


def test_result_and_models_of_other_runs_are_taken(task_settings_of, trained):
    """The teacher fine-tuned anew for every student of a sweep."""
    first = run_experiment(task_settings_of(ONE, models=("student",)))
    trained.clear()
    other = {"task": ONE["task"] | {"objective": {"name": "soft", "terms": {"soft": SOFT}}}}
    second = run_experiment(task_settings_of(other, models=("student",)))
    assert trained == ["student on text_classification, task"]
    assert not all(
        student_weights(second)[name].equal(tensor)
        for name, tensor in student_weights(first).items()
    )
    trained.clear()
    # The same fine-tuning in a run that differs elsewhere.
    third = run_experiment(task_settings_of(ONE, "baseline.num_batches=3", models=("student",)))
    assert third.run_id != first.run_id and not trained
    assert third.scores == first.scores


def test_every_seed_has_its_student(task_settings_of, trained):
    """Seeds that share a student, or each fine-tune a teacher for themselves."""
    settings = task_settings_of(ONE, "task_training.num_seeds=2", models=("student",))
    result = run_experiment(settings)
    assert trained == [
        "teacher on text_classification",
        "teacher on text_classification",
        "student on text_classification, task",
        "student on text_classification, task",
    ]
    assert result.num_seeds == 2 and "accuracy" in result.spreads["student"]["text_classification"]


def test_stage_on_the_corpus_comes_first(task_settings_of, trained):
    """A student on the task that forgets what it learnt on the corpus."""
    recipe = {"general": {}, "task": {"data": "task", "start": "general", "objective": PREDICTION}}
    settings = task_settings_of(recipe)
    result = run_experiment(settings)
    assert result.validation_loss is not None
    assert trained[1] == "student on text_classification, task"
    runs = children(settings, result.run_id)
    assert {"stage general", "student on text_classification seed=1"} <= set(runs)
    assert runs["student on text_classification seed=1"].data.params["start"] == "general"
    plain = run_experiment(task_settings_of(ONE))
    assert not all(
        student_weights(result)[name].equal(tensor)
        for name, tensor in student_weights(plain).items()
    )
    assert (Path(result.folder) / "student" / "config.json").is_file()


def test_student_of_a_stage_teaches_the_task(task_settings_of, trained):
    """An assistant that teaches a task without having learnt it."""
    recipe = {
        "assistant": {"student": {"num_layers": 3}},
        "task": {"data": "task", "teacher": "assistant", "objective": PREDICTION},
    }
    result = run_experiment(task_settings_of(recipe, models=("student",)))
    assert trained == [
        "stage-assistant on text_classification",
        "student on text_classification, task",
    ]
    teacher = Path(result.folder) / "models" / "text_classification-stage-assistant"
    assert json.loads((teacher / "config.json").read_text())["num_hidden_layers"] == 3


# Two stages


@pytest.mark.parametrize("head_only", [False, True])
def test_head_alone_is_trained(task_settings_of, head_only, monkeypatch):
    """A backward pass through the whole student for a layer of two outputs."""
    seen = []
    finetune = task_stages.finetune

    def watched(encoder, *arguments, **named):
        scored = finetune(encoder, *arguments, **named)
        seen.append((encoder.state_dict(), load_file(arguments[4] / "model.safetensors")))
        return scored

    outputs = []
    compute_loss = finetune_module._Trainer.compute_loss

    def noted(self, model, inputs, *more, **named):
        def note(module, _, output):
            outputs.append((output[0].requires_grad, module.training))

        if not isinstance(model, finetune_module.Distiller):
            return compute_loss(self, model, inputs, *more, **named)
        handle = model.student.encoder.base_model.encoder.register_forward_hook(note)
        try:
            return compute_loss(self, model, inputs, *more, **named)
        finally:
            handle.remove()

    monkeypatch.setattr(task_stages, "finetune", watched)
    monkeypatch.setattr(finetune_module._Trainer, "compute_loss", noted)
    recipe = {"task": ONE["task"] | {"head_only": head_only}}
    run_experiment(task_settings_of(recipe, models=("student",)))
    ((before, after),) = seen
    changed = {
        name
        for name, tensor in after.items()
        if not before.get(name.removeprefix("bert."), tensor + 1).equal(tensor)
    }
    head = {name for name in after if "pooler" in name or "classifier" in name}
    assert changed == (head if head_only else set(after))
    assert set(outputs) == {(not head_only, not head_only)}


def test_each_stage_is_a_run_with_its_terms(task_settings_of):
    """Two steps that cannot be told apart in the comparison."""
    settings = task_settings_of(TWO, models=("student",))
    result = run_experiment(settings)
    runs = children(settings, result.run_id)
    first = runs["stage intermediate: student on text_classification seed=1"]
    assert {"loss/hidden", "loss/relations/query-query", "loss/relations/value-value"} <= set(
        first.data.metrics
    )
    # The head has learnt nothing yet, so there is nothing to score.
    assert not {"accuracy", "best/accuracy"} & set(first.data.metrics)
    assert first.data.params["epochs"] == "2"
    last = runs["student on text_classification seed=1"]
    assert last.data.params["epochs"] == "3" and last.data.params["stage"] == "prediction"
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_last_stage_has_settings_of_its_own(task_settings_of):
    """Settings that are recorded as the run's, although the stage has others."""
    recipe = {"task": ONE["task"] | {"task_training": {"epochs": 2, "learning_rate": 3e-4}}}
    settings = task_settings_of(recipe, models=("student",))
    result = run_experiment(settings)
    runs = children(settings, result.run_id)
    params = runs["student on text_classification seed=1"].data.params
    assert (params["epochs"], params["learning_rate"]) == ("2", "0.0003")
    assert runs["teacher on text_classification seed=1"].data.params["epochs"] == "3"


BRANCHES = {
    "assistant teaches": (
        {
            "student": {"student": {"num_layers": 3}},
            "task": {"data": "task", "teacher": "student", "objective": PREDICTION},
        },
        2, False, ["stage-student on text_classification", "student on text_classification, task"],
    ),
    "another stage comes last": (
        {
            "general": {},
            "undistilled": {"student": {"num_layers": 3}},
            "task": {
                "data": "task", "start": "general", "teacher": "undistilled",
                "objective": PREDICTION,
            },
        },
        2, True,
        [
            "stage-undistilled on text_classification", "student on text_classification, task",
            "undistilled on text_classification",
        ],
    ),
    "stage on the task teaches": (
        {
            "general": {},
            "large": {"data": "task", "start": "general", "objective": PREDICTION},
            "small": {
                "data": "task", "teacher": "large", "student": {"num_layers": 1},
                "objective": {"name": "soft", "terms": {"soft": SOFT}},
            },
        },
        1, False,
        [
            "teacher on text_classification", "student on text_classification, large",
            "student on text_classification, small",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("branch", BRANCHES)
def test_student_is_that_of_the_last_stage(task_settings_of, trained, branch):
    """Sizes or losses of another stage's student, or a teacher that is overwritten."""
    recipe, num_layers, is_distilled, titles = BRANCHES[branch]
    models = ("student", "undistilled") if "undistilled" in recipe else ("student",)
    settings = task_settings_of(recipe, models=models)
    result = run_experiment(settings)
    assert trained == titles
    folder = Path(result.folder)
    kept = json.loads((folder / "models/text_classification-student/config.json").read_text())
    assert kept["num_hidden_layers"] == num_layers
    assert (folder / "student").exists() == is_distilled
    assert (result.validation_loss is not None) == is_distilled
    if is_distilled:
        assert result.validation_losses == result.stages["general"]
        shape = json.loads((folder / "student" / "config.json").read_text())
        assert shape["num_hidden_layers"] == num_layers
    assert run_experiment(task_settings_of(recipe, models=models)).run_id == result.run_id


class Killed(BaseException):
    pass


STOPS = {
    "teacher": ("teacher on text_classification seed=1", 10),
    "intermediate": ("stage intermediate: student on text_classification seed=1", 10),
    "prediction": ("student on text_classification seed=1", 10),
}


@pytest.mark.parametrize("stop", STOPS)
def test_stopped_stages_go_on_where_they_were(task_settings_of, trained, stop, monkeypatch):
    """A finished stage trained again, another student than without the stop, steps logged twice."""
    more = {"task_training.checkpoint_steps": 4}
    settings = task_settings_of(TWO, models=("student",), **more)
    whole = run_experiment(settings)
    weights = student_weights(whole)
    points = {
        name: histories(settings, run.info.run_id)
        for name, run in children(settings, whole.run_id).items()
    }
    shutil.rmtree(settings.outputs / "finetuned")
    shutil.rmtree(settings.outputs / "runs")
    trained.clear()
    log_metrics = task_stages.Tracker.log_metrics
    stopped_at, step = STOPS[stop]

    def stopping(self, metrics, at=0):
        run = self._client.get_run(self.run_id)
        if run.info.run_name == stopped_at and at == step:
            raise Killed
        return log_metrics(self, metrics, at)

    monkeypatch.setattr(task_stages.Tracker, "log_metrics", stopping)
    with pytest.raises(Killed):
        run_experiment(task_settings_of(TWO, models=("student",), **more))
    monkeypatch.setattr(task_stages.Tracker, "log_metrics", log_metrics)
    before = [*trained]
    trained.clear()
    steps = []
    training_step = finetune_module._Trainer.training_step

    def counted(self, *arguments, **named):
        steps.append(self.state.global_step)
        return training_step(self, *arguments, **named)

    monkeypatch.setattr(finetune_module._Trainer, "training_step", counted)
    result = run_experiment(task_settings_of(TWO, models=("student",), resume=True, **more))
    # The stage that was stopped, and those after it; not from its first step.
    assert trained[0] == before[-1] and len(before) + len(trained) == 4
    assert steps[0] == 8
    assert all(student_weights(result)[name].equal(tensor) for name, tensor in weights.items())
    assert result.scores == whole.scores
    runs = children(settings, result.run_id)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    found = {name: histories(settings, run.info.run_id) for name, run in runs.items()}
    assert {name: set(metrics) for name, metrics in found.items()} == {
        name: set(metrics) for name, metrics in points.items()
    }
    for name, metrics in found.items():
        for metric in ("accuracy", "best/accuracy"):
            assert metrics.get(metric) == points[name].get(metric)
        steps_of = [step for step, _ in metrics.get("loss", [])]
        assert steps_of == sorted(set(steps_of))


def test_finished_seed_is_not_trained_again(task_settings_of, trained, monkeypatch):
    """The model of a seed thrown away because the next one was interrupted."""
    more = ("task_training.num_seeds=2",)
    finetune = task_stages.finetune

    def stopping(encoder, tokenizer, job, title, *arguments, **named):
        if job.seed > 1000 and "prediction" in title:
            raise Killed
        return finetune(encoder, tokenizer, job, title, *arguments, **named)

    monkeypatch.setattr(task_stages, "finetune", stopping)
    with pytest.raises(Killed):
        run_experiment(task_settings_of(TWO, *more, models=("student",)))
    monkeypatch.setattr(task_stages, "finetune", finetune)
    trained.clear()
    result = run_experiment(task_settings_of(TWO, *more, models=("student",), resume=True))
    assert trained == ["student on text_classification, prediction"]
    assert (Path(result.folder) / "models" / "text_classification-student").is_dir()
    assert {path.name for path in (Path(result.folder) / "models").iterdir()} == {
        "text_classification-student",
        "text_classification-teacher",
    }


def test_finished_teacher_is_not_thrown_away(task_settings_of, monkeypatch):
    """A restart without resume that deletes hours of fine-tuning."""
    finetune = task_stages.finetune

    def stopping(*_, **__):
        raise Killed

    monkeypatch.setattr(task_stages, "finetune", stopping)
    with pytest.raises(Killed):
        run_experiment(task_settings_of(ONE, models=("student",)))
    monkeypatch.setattr(task_stages, "finetune", finetune)
    result = run_experiment(task_settings_of(ONE, models=("student",)))
    folders = [path for path in Path(result.folder).parent.iterdir() if path.is_dir()]
    assert len(folders) == 2
    assert all((path / "models" / "text_classification-teacher").is_dir() for path in folders)


# What is refused


UNKNOWN = {"name": "soft", "terms": {"soft": SOFT | {"alpha": 0.5}}}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"task": {"data": "tasks"}}, r"stages\.task\.data=tasks is not corpus or task"),
        ({"task": {"data": "task", "objective": STATES}}, r"does not train the head"),
        (
            {"task": ONE["task"] | {"training": {"max_steps": 3}}},
            r"stages\.task\.training=.*makes no difference.*task_training",
        ),
        (
            {"task": ONE["task"] | {"task_training": {"max_steps": 3}}},
            r"task_training\.max_steps.*epochs",
        ),
        (
            {"task": ONE["task"] | {"task_training": {"learning_rate": -1}}},
            r"learning_rate=-1.0 must be a finite number above 0",
        ),
        (
            {"task": ONE["task"] | {"task_training": {"batch_size": "x"}}},
            r"task_training\.batch_size.*'x'",
        ),
        (
            {"task": ONE["task"] | {"task_training": {"hidden_dropout": 1.5}}},
            r"hidden_dropout=1.5 must be at least 0 and below 1",
        ),
        (
            {"task": ONE["task"] | {"task_training": {"max_length": 500}}},
            r"max_length=500.*above the 64 positions",
        ),
        (
            {"task": ONE["task"] | {"task_training": {"max_train_examples": 5}}},
            r"max_train_examples is the same in all stages",
        ),
        (
            {
                "pruned": {"student": {"vocabulary": "prune_to_corpus"}},
                "soft": {"start": "pruned", "objective": {"name": "s", "terms": {"soft": SOFT}}},
            },
            r"stages\.soft.*terms\.soft.*tokens that the student has not",
        ),
        ({"task": ONE["task"], "after": {}}, r"stages\.after.*before those on a task"),
        ({"task": {"head_only": True}}, r"head_only=true needs data=task"),
        (
            {"task": ONE["task"] | {
                "head_only": True,
                "objective": {"name": "both", "terms": {"soft": SOFT, "hidden": HIDDEN}},
            }},
            r"head_only=true.*hidden do not reach the head",
        ),
        (
            {"task": ONE["task"] | {"student": {"vocabulary": "prune_to_corpus"}}},
            r"student\.vocabulary=prune_to_corpus.*reads a task",
        ),
        (
            {"task": {"data": "task", "objective": UNKNOWN}},
            r"terms of kind logits have no such setting",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(task_settings_of, recipe, words):
    """Hours of fine-tuning before a mistake in the recipe is found."""
    with pytest.raises(ExperimentError, match=words):
        task_settings_of(recipe)


def test_stages_need_the_student_among_the_models(task_settings_of):
    """A run whose stages nobody runs, with the teacher's score for its own."""
    with pytest.raises(ExperimentError, match=r"recipe\.models=\['teacher'\] has no student"):
        task_settings_of(ONE, models=("teacher",))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("objective", r"objective=patient_kd makes no difference with recipe=two_step"),
        ("relations", r"relations makes no difference with recipe=two_step, whose objectives"),
    ],
)
def test_what_no_stage_reads_is_refused(compose_config, name, words):
    """An objective that was asked for, and silently not used."""
    config = compose_config("recipe=two_step", "task=rte", "objective=patient_kd")
    with pytest.raises(ExperimentError, match=words):
        parse(config, typed={name, "recipe", "task"})


def test_search_and_a_stage_do_not_vary_the_same(task_settings_of):
    """Cells of a search that are all trained with one learning rate."""
    recipe = {"task": ONE["task"] | {"task_training": {"learning_rate": 1e-4}}}
    more = {
        "task_training.families.glue.grid": {"learning_rate": [1e-4, 2e-4]},
        "task_training.search": "grid",
    }
    with pytest.raises(ExperimentError, match=r"learning_rate=0.0001.*search=grid varies it"):
        task_settings_of(recipe, **more)


def test_stage_on_a_task_needs_a_task(settings_of):
    """A run without tasks that trains nothing, or one of tasks where nothing is trained."""
    with pytest.raises(ExperimentError, match=r"data=task needs tasks to learn.*there is no task"):
        settings_of(ONE)
    with pytest.raises(ExperimentError, match=r"task=stsb_similarity trains nothing"):
        settings_of(ONE, "task=stsb_similarity")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"distance": "cosine"}, r"terms\.soft\.distance=cosine is not one of ce, kl, mse"),
        ({"temperature": 0}, r"terms\.soft\.temperature=0.0 must be a finite number above 0"),
        ({"distance": "mse"}, r"terms\.soft\.temperature=2.0 makes no difference"),
        ({"tokens": "some"}, r"terms\.soft\.tokens=some is not one of masked, all"),
    ],
)
def test_wrong_soft_labels_are_named(task_settings_of, changed, words):
    """A misspelt distance that becomes another one."""
    objective = {"name": "soft", "terms": {"soft": SOFT | changed}}
    with pytest.raises(ExperimentError, match=words):
        task_settings_of({"task": {"data": "task", "objective": objective}})


def test_sizes_that_do_not_fit_are_told_before_the_corpus(task_settings_of, monkeypatch):
    """A stage on a task that fails after the hours of those on the corpus."""
    objective = {
        "name": "both",
        "terms": {"soft": SOFT, "hidden": HIDDEN | {"projection": "none"}},
    }
    recipe = {"general": {}, "task": {"data": "task", "start": "general", "objective": objective}}
    monkeypatch.setattr("minilm_exp.stages.distil", lambda *_: pytest.fail("a stage was run"))
    settings = task_settings_of(recipe, "student.hidden_size=16", "relation_set=qq")
    with pytest.raises(ExperimentError, match=r"stages\.task.*terms\.hidden.*projection"):
        run_experiment(settings)


# What counts


@pytest.mark.parametrize(
    "change",
    [
        {"recipe.stages.task.objective.terms.soft.temperature": 3.0},
        {"recipe.stages.task.objective.terms.labels.weight": 0.5},
        {"recipe.stages.task.head_only": True},
        {"recipe.stages.task.task_training.learning_rate": 3e-5},
        {"recipe.stages.task.layer_selection.teacher_layer": 2},
        {"task_training.learning_rate": 3e-5},
        {"seed": 2},
    ],
    ids=str,
)
def test_what_changes_the_student_is_in_the_key(task_settings_of, change):
    """A student of other settings taken for this one."""

    def made(**values):
        stages = {"task": ONE["task"] | {"task_training": {}, "layer_selection": {}}}
        config_settings = task_settings_of(stages, **values)
        return config_settings, run_key(config_settings, "fp32", {})

    (_, key), (_, other) = made(), made(**change)
    assert key != other


@pytest.mark.parametrize(
    "change",
    [
        {"training.max_steps": 99},
        {"training.learning_rate": 0.5},
        {"corpus.block_length": 32},
        {"task_training.checkpoint_steps": 7},
    ],
    ids=str,
)
def test_what_nothing_reads_is_not_in_the_key(task_settings_of, change):
    """A finished run repeated for a setting that it never read."""
    keys = [run_key(task_settings_of(ONE, **values), "fp32", {}) for values in ({}, change)]
    assert keys[0] == keys[1]


def test_limit_above_the_data_is_not_in_the_key(task_settings_of, trained):
    """A student trained again for a limit that nothing reaches."""
    run_experiment(task_settings_of(ONE, models=("student",)))
    trained.clear()
    more = {"task_training.max_train_examples": 5000, "models": ("student",)}
    run_experiment(task_settings_of(ONE, **more))
    assert not trained


@pytest.mark.parametrize("recipe", ["task_specific", "mix_step", "two_step", "tinybert"])
def test_recipes_of_the_config(settings_of, recipe, tiny_teacher_folder, tmp_path):
    """An option that does not parse, or whose stages stand in another order."""
    stages = {
        "task_specific": ["task"],
        "mix_step": ["general", "task"],
        "two_step": ["intermediate", "prediction"],
        "tinybert": ["general", "intermediate", "prediction"],
    }
    settings = settings_of(None, f"recipe={recipe}", "task=rte", f"data_root={tmp_path}")
    assert [stage.name for stage in settings.stages] == stages[recipe]
    assert settings.stages[-1].settings.data == "task"
    if recipe == "task_specific":
        chosen = settings_of(None, f"recipe={recipe}", "task=rte", "objective=patient_kd")
        assert settings.objective.name == "logit_kd"
        assert chosen.stages[0].settings.objective.name == "patient_kd"
    assert OmegaConf.is_config(OmegaConf.create(dataclasses.asdict(settings.recipe)))


def test_weights_do_not_share_memory_with_the_encoder(task_settings_of):
    """A stage that changes the encoder which the next seed begins with."""
    settings = task_settings_of(ONE, "task_training.num_seeds=2", models=("student",))
    result = run_experiment(settings)
    alone = run_experiment(
        task_settings_of(ONE, "task_training.num_seeds=1", models=("student",), rerun=True)
    )
    predictions = [
        (Path(r.folder) / "predictions" / "text_classification-student-seed1" / "validation.jsonl")
        for r in (result, alone)
    ]
    assert predictions[0].read_text() == predictions[1].read_text()
    assert torch.isfinite(torch.tensor(list(result.scores.values()))).all()
