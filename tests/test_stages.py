"""Recipes of several stages: what they are made of, and what is left of them when they stop."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertForMaskedLM,
    BertModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from minilm_exp import stages
from minilm_exp.errors import ExperimentError
from minilm_exp.heads import add_masked_lm_head, load_masked_lm
from minilm_exp.pipeline import run_experiment
from minilm_exp.provenance import run_key

THREE = {
    "first": {"student": {"num_layers": 3}, "training": {"max_steps": 4}},
    "second": {"teacher": "first", "training": {"learning_rate": 5e-4}},
    "third": {
        "start": "second",
        "objective": {
            "name": "mine",
            "terms": {
                "states": {
                    "kind": "states",
                    "state": "hidden",
                    "layers": [[4, 2], [2, 1]],
                    "projection": "each",
                    "distance": "cosine",
                },
                "scores": {"kind": "relations", "pairs": ["qk"], "num_relation_heads": 4},
            },
        },
    },
}


# What a stage is made of


def test_stage_differs_from_the_run_only_where_it_says(settings_of):
    """A stage that forgets the run's settings, or one whose settings leak into the next."""
    settings = settings_of(THREE)
    first, second, third = settings.stages
    assert [stage.name for stage in settings.chain] == ["first", "second", "third"]
    assert first.settings.student.num_layers == 3
    assert second.settings.student.num_layers == settings.student.num_layers == 2
    assert first.settings.training == dataclasses.replace(settings.training, max_steps=4)
    assert second.settings.training == dataclasses.replace(settings.training, learning_rate=5e-4)
    assert third.settings.training == settings.training
    assert first.settings.objective == settings.objective
    assert third.settings.objective.name == "mine"
    assert (first.teacher, second.teacher, third.teacher) == ("teacher", "first", "teacher")
    assert third.start == "second"


def test_student_of_a_stage_is_the_teacher_of_another(settings_of):
    """The run's teacher, or its layers and heads, where the assistant's are meant."""
    teacher = settings_of(THREE).stages[1].settings.teacher
    assert (teacher.name, teacher.num_layers, teacher.hidden_size) == ("first", 3, 32)
    assert teacher.path is None
    second = settings_of(THREE).stages[1].settings
    assert second.layer_selection.teacher_layer == 3  # of the assistant


def test_single_stage_is_the_run_itself(settings_of):
    """The default recipe with a key, a folder or a name of its own."""
    settings = settings_of(None)
    [stage] = settings.chain
    assert stage.settings is settings and settings.stages == []


WRONG = {
    "teacher that comes later": ({"a": {"teacher": "b"}, "b": {}}, "recipe.stages.a.teacher=b"),
    "start that is not there": ({"a": {"start": "x"}}, "recipe.stages.a.start=x"),
    "start from the teacher": ({"a": {"start": "teacher"}}, "recipe.stages.a.start=teacher"),
    "unknown key": ({"a": {"teachr": "teacher"}}, "recipe.stages.a"),
    "stage called teacher": ({"teacher": {}}, "recipe.stages.teacher"),
    "shape of what goes on": (
        {"a": {}, "b": {"start": "a", "student": {"num_layers": 3}}},
        "recipe.stages.b.student=",
    ),
    "unknown setting": ({"a": {"training": {"max_stepz": 3}}}, "max_stepz"),
    "wrong value": ({"a": {"training": {"max_steps": 0}}}, "training.max_steps=0"),
    "wrong layer": (
        {"a": {"layer_selection": {"teacher_layer": 9}}},
        "layer_selection.teacher_layer=9 is outside 1..4",
    ),
    "wrong term": (
        {"a": {"objective": {"name": "x", "terms": {"t": {"kind": "magic"}}}}},
        "objective.terms.t.kind=magic",
    ),
}


def test_positions_and_tokens_are_carried_on(settings_of, tiny_bert, tiny_tokenizer, tmp_path):
    """Blocks longer than an earlier stage's student, or ids that it does not know, after hours."""
    config = tiny_bert.config.__class__(
        **tiny_bert.config.to_dict() | {"max_position_embeddings": 32}
    )
    folder = tmp_path / "short"
    AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    short = {"student": {"path": str(folder)}, "corpus": {"block_length": 16}}
    for key in ("start", "teacher"):
        with pytest.raises(ExperimentError, match=r"block_length=64.*32 positions"):
            settings_of({"a": short, "b": {key: "a", "corpus": {"block_length": 64}}})
    pruned = {"student": {"vocabulary": "prune_to_corpus"}}
    for key in ("start", "teacher"):
        with pytest.raises(ExperimentError, match=r"pretokenized=true"):
            settings_of({"a": pruned, "b": {key: "a", "corpus": {"pretokenized": True}}})


@pytest.mark.parametrize(("given", "named"), WRONG.values(), ids=WRONG.keys())
def test_wrong_stage_is_named(settings_of, given, named):
    """A chain that fails in its last stage, after days."""
    with pytest.raises(ExperimentError) as caught:
        settings_of(given)
    assert named in str(caught.value)
    assert "recipe.stages." in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [["layer_selection.teacher_layer=2"], ["student.init=teacher_layers"]],
    ids=str,
)
def test_what_stages_take_from_the_run_is_in_the_key(settings_of, overrides):
    """A finished run given for one whose stages have other layers or another start."""
    stages = {"a": {}, "b": {"teacher": "a"}}
    inputs = {"teacher": "t", "student": "", "corpus": "c"}
    more = ["student.intermediate_size=48"]
    one = run_key(settings_of(stages, *more), "fp32", inputs)
    assert run_key(settings_of(stages, *more, *overrides), "fp32", inputs) != one
    other_order = {"b": {}, "a": {"teacher": "b"}}
    assert run_key(settings_of(other_order, *more), "fp32", inputs) != one


def test_last_stage_that_cannot_be_is_told_before_the_first(settings_of, monkeypatch):
    """Hours of distilling before a size is compared."""
    monkeypatch.setattr(stages, "distil", lambda *_: pytest.fail("a stage was begun"))
    last = {"name": "x", "terms": {"t": {"kind": "states", "state": "hidden", "layers": "last"}}}
    with pytest.raises(ExperimentError, match=r"recipe\.stages\.b.*terms\.t.*projection"):
        run_experiment(settings_of({"a": {}, "b": {"objective": last}}, "student.hidden_size=16"))


@pytest.mark.parametrize(
    ("layers", "hidden_size", "word"),
    [(2, 16, "are"), (3, 16, "are not"), (2, 32, "are not")],
)
def test_assistant_says_whether_the_paper_would_use_one(settings_of, layers, hidden_size, word):
    """An assistant where the paper found no use for it, without a word."""
    settings = settings_of(
        None,
        "recipe=teacher_assistant",
        f"student.num_layers={layers}",
        f"student.hidden_size={hidden_size}",
    )
    [note] = [note for note in settings.notes if "teacher_assistant" in note]
    assert note.endswith(f"of 32 {word}") or f"of 32 {word}, so" in note
    assistant, student = settings.stages
    assert assistant.settings.student.num_layers == 4
    assert assistant.settings.student.hidden_size == hidden_size
    assert student.settings.teacher.num_layers == 4


# Runs


def children(outputs, run_id):
    client = MlflowClient(tracking_uri=f"sqlite:///{outputs}/mlflow.db")
    experiment = client.get_run(run_id).info.experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return sorted(runs, key=lambda run: run.info.start_time)


def history(outputs, run_id, name):
    client = MlflowClient(tracking_uri=f"sqlite:///{outputs}/mlflow.db")
    return [(m.step, m.value) for m in client.get_metric_history(run_id, name)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Filled by the first test that runs the three stages."""
    return {}


def run_three(settings_of, *overrides, **values):
    return run_experiment(settings_of(THREE, *overrides, **values))


def test_three_stages_of_a_user(settings_of, whole, tmp_path):
    """A stage left out, one that trains another model, or runs that nobody finds again."""
    result = run_three(settings_of, outputs_dir=str(tmp_path / "whole"))
    folder = Path(result.folder)
    assert result.status == "FINISHED"
    assert list(result.stages) == ["first", "second", "third"]
    assert set(result.stages["third"]) == {"states", "scores/query-key", "total"}
    assert result.validation_losses == result.stages["third"]
    parts = children(folder.parents[1], result.run_id)
    assert [part.info.run_name for part in parts] == [
        "stage first", "stage second", "stage third"
    ]  # fmt: skip
    assert {part.info.status for part in parts} == {"FINISHED"}
    assert [part.data.params["teacher"] for part in parts] == ["tiny_bert", "first", "tiny_bert"]
    assert [part.data.params["training.max_steps"] for part in parts] == ["4", "6", "6"]
    for part in parts:
        assert "distill/validation/total" in part.data.metrics
    sizes = {
        name: json.loads((folder / "stages" / name / "student" / "config.json").read_text())[
            "num_hidden_layers"
        ]
        for name in result.stages
    }
    assert sizes == {"first": 3, "second": 2, "third": 2}
    # The last stage went on with the student of the second, and changed it.
    weights = {
        name: load_file(folder / "stages" / name / "student" / "model.safetensors")
        for name in ("second", "third")
    }
    name = "embeddings.word_embeddings.weight"
    assert not weights["second"][name].equal(weights["third"][name])
    final = load_file(folder / "student" / "model.safetensors")
    assert all(final[key].equal(tensor) for key, tensor in weights["third"].items())
    assert not list(folder.glob("**/checkpoint-*"))
    whole["weights"], whole["result"] = weights["third"], result
    whole["histories"] = {
        part.data.tags["stage"]: history(folder.parents[1], part.info.run_id, "distill/loss/total")
        for part in parts
    }


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage_name, step", [("first", 4), ("second", 4), ("third", 4)])
def test_stopped_chain_goes_on_where_it_was(
    settings_of, whole, stage_name, step, monkeypatch, tmp_path
):
    """Finished stages trained again, another student than without the stop, steps logged twice."""
    if not whole:
        test_three_stages_of_a_user(settings_of, whole, tmp_path)
    log_metrics = stages.Tracker.log_metrics
    trained = []
    distil = stages.distil

    def counted(settings, *arguments):
        trained.append(settings.training.max_steps)
        return distil(settings, *arguments)

    def stopping(self, metrics, at=0):
        run = self._client.get_run(self.run_id)
        if run.data.tags.get("stage") == stage_name and at == step:
            raise Killed
        return log_metrics(self, metrics, at)

    monkeypatch.setattr(stages, "distil", counted)
    monkeypatch.setattr(stages.Tracker, "log_metrics", stopping)
    with pytest.raises(Killed):
        run_three(settings_of)
    monkeypatch.setattr(stages.Tracker, "log_metrics", log_metrics)
    number = ["first", "second", "third"].index(stage_name)
    assert len(trained) == number + 1
    trained.clear()
    result = run_three(settings_of, resume=True)
    assert len(trained) == 3 - number
    assert result.status == "FINISHED"
    folder = Path(result.folder)
    found = load_file(folder / "student" / "model.safetensors")
    assert all(found[key].equal(tensor) for key, tensor in whole["weights"].items())
    assert result.stages == whole["result"].stages
    parts = children(folder.parents[1], result.run_id)
    assert len(parts) == 3
    for part in parts:
        assert part.info.status == "FINISHED"
        name = part.data.tags["stage"]
        points = history(folder.parents[1], part.info.run_id, "distill/loss/total")
        assert points == whole["histories"][name]


def test_unfinished_chain_is_not_thrown_away(settings_of, monkeypatch):
    """A restart without resume that deletes the stages which were finished."""
    distil = stages.distil

    def failing(settings, *arguments):
        if settings.objective.name == "mine":
            raise Killed
        return distil(settings, *arguments)

    monkeypatch.setattr(stages, "distil", failing)
    with pytest.raises(Killed):
        run_three(settings_of)
    monkeypatch.setattr(stages, "distil", distil)
    result = run_three(settings_of)
    left = [path for path in Path(result.folder).parent.iterdir() if path.is_dir()]
    assert len(left) == 2
    assert all((path / "stages" / "second" / "losses.json").is_file() for path in left)
    shutil.rmtree(result.folder)


# Masked language modelling


@pytest.fixture(scope="session")
def masked_lm_folder(tiny_bert, tiny_tokenizer, tmp_path_factory):
    """The tiny BERT with a head."""
    torch.manual_seed(12)
    model = BertForMaskedLM(tiny_bert.config)
    model.bert.load_state_dict(tiny_bert.state_dict(), strict=False)
    model.cls.predictions.bias.data.normal_()
    folder = tmp_path_factory.mktemp("models") / "tiny_masked_lm"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


MASKED = {
    "mlm_kd": {"soft", "total"},
    "distilbert": {"soft", "masked", "cosine", "total"},
}


def test_tied_weights_are_trained(settings_of, tiny_tokenizer, tmp_path):
    """Embeddings that a model card calls untrained, because the head shows them first."""
    torch.manual_seed(5)
    config = XLMRobertaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=48, max_position_embeddings=66, pad_token_id=0,
    )  # fmt: skip
    XLMRobertaForMaskedLM(config).save_pretrained(tmp_path / "xlmr")
    tiny_tokenizer.save_pretrained(tmp_path / "xlmr")
    settings = settings_of(None, "objective=mlm_kd", f"teacher.path={tmp_path}/xlmr")
    result = run_experiment(settings)
    assert "not trained" not in (Path(result.folder) / "student" / "README.md").read_text()


@pytest.mark.parametrize("objective", MASKED)
def test_masked_language_modelling(settings_of, masked_lm_folder, objective, tmp_path):
    """A head that is left behind, tied weights that no checkpoint can hold, or nothing learnt."""
    more = ("student.init=teacher_layers", "student.intermediate_size=48")
    settings = settings_of(
        None, f"objective={objective}", *more, f"teacher.path={masked_lm_folder}",
        "training.max_steps=12", "training.learning_rate=1e-3",
    )  # fmt: skip
    result = run_experiment(settings)
    assert set(result.validation_losses) == MASKED[objective]
    losses = [
        value for _, value in history(settings.outputs, result.run_id, "distill/validation/total")
    ]
    assert losses[-1] < losses[0]
    student = AutoModel.from_pretrained(Path(result.folder) / "student")
    assert type(student) is BertModel and student.config.num_hidden_layers == 2
    teacher = AutoModel.from_pretrained(masked_lm_folder)
    # Its last layer learns, other than by relations.
    own, old = (
        model.encoder.layer[index].output.dense.weight
        for model, index in ((student, 1), (teacher, 3))
    )
    assert not own.equal(old)
    card = (Path(result.folder) / "student" / "README.md").read_text()
    assert "not trained" not in card


def test_head_begins_with_the_teachers(settings_of, masked_lm_folder, tiny_bert):
    """A copied student under a head that knows nothing."""
    teacher = load_masked_lm(
        settings_of(None, f"teacher.path={masked_lm_folder}").teacher, tiny_bert
    )
    torch.manual_seed(3)
    student = BertModel(tiny_bert.config)
    model = add_masked_lm_head(student, teacher, 1, of_teacher=True)
    head, wanted = model.cls.predictions, teacher.cls.predictions
    assert head.transform.dense.weight.equal(wanted.transform.dense.weight)
    assert head.bias.equal(wanted.bias)
    embeddings = student.embeddings.word_embeddings.weight
    assert model.get_input_embeddings().weight.equal(embeddings)
    assert head.decoder.weight is model.get_input_embeddings().weight
    other = add_masked_lm_head(student, teacher, 1, of_teacher=False)
    assert not other.cls.predictions.transform.dense.weight.equal(wanted.transform.dense.weight)
    assert other.get_input_embeddings().weight.equal(embeddings)


def test_masked_language_modelling_goes_on_where_it_was(settings_of, masked_lm_folder, monkeypatch):
    """Other tokens masked after a stop than without it."""

    def run(**values):
        settings = settings_of(
            None, "objective=distilbert", "student.init=teacher_layers",
            "student.intermediate_size=48", f"teacher.path={masked_lm_folder}", **values,
        )  # fmt: skip
        result = run_experiment(settings)
        return result, load_file(Path(result.folder) / "student" / "model.safetensors")

    whole, weights = run()
    log_metrics = stages.Tracker.log_metrics

    def stopping(self, metrics, at=0):
        if at == 4:
            raise Killed
        return log_metrics(self, metrics, at)

    monkeypatch.setattr(stages.Tracker, "log_metrics", stopping)
    with pytest.raises(Killed):
        run(rerun=True)
    monkeypatch.setattr(stages.Tracker, "log_metrics", log_metrics)
    resumed, found = run(rerun=True, resume=True)
    assert resumed.run_id != whole.run_id
    assert resumed.validation_losses == whole.validation_losses
    assert all(found[name].equal(tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("objective", MASKED)
def test_teacher_without_the_head_is_unavailable(settings_of, objective, monkeypatch):
    """A head drawn at random that a student learns from for hours."""
    monkeypatch.setattr(stages, "prepare_corpus", lambda *_: pytest.fail("corpus was read"))
    with pytest.raises(ExperimentError, match=r"unavailable.*no head of masked language"):
        run_experiment(settings_of(None, f"objective={objective}"))


def test_assistant_has_no_head_of_masked_language_modelling(settings_of):
    """The head of a stage's student, which nobody kept."""
    recipe = {"assistant": {}, "student": {"teacher": "assistant"}}
    with pytest.raises(ExperimentError, match=r"stages\.student.*assistant has not"):
        settings_of(recipe, "objective=mlm_kd")


def test_cache_is_for_one_layer(settings_of):
    """A cache asked for where it cannot hold what is needed, and silently not used."""
    third = {"third": {"objective": THREE["third"]["objective"]}}
    with pytest.raises(ExperimentError, match=r"teacher_cache=true.*objective=mine"):
        run_experiment(settings_of(third, "runtime.teacher_cache=true"))


# A vocabulary of its own


@pytest.fixture
def pruned(settings_of):
    """A student of all the teacher's layers that reads only the corpus's tokens, hardly trained."""
    return run_experiment(
        settings_of(
            None,
            "student.num_layers=4",
            "student.init=teacher_layers",
            "student.intermediate_size=48",
            "student.vocabulary=prune_to_corpus",
            "training.learning_rate=1e-12",
            "task=next_passage_smoke",
            "tasks.next_passage.passage_characters=10",
        )
    )


def test_pruned_student_is_the_teacher_on_its_tokens(pruned, tiny_teacher_folder):
    """Embeddings in another order than the tokens, or a teacher that reads pruned ids."""
    assert pruned.validation_loss < 1e-5
    folder = Path(pruned.folder) / "student"
    own, whole = (AutoTokenizer.from_pretrained(f) for f in (folder, tiny_teacher_folder))
    assert len(own) < 0.7 * len(whole)
    text = "the model number 17 and the teacher"
    assert own.tokenize(text) == whole.tokenize(text)
    states = []
    for path, tokenizer in ((folder, own), (tiny_teacher_folder, whole)):
        model = AutoModel.from_pretrained(path).eval()
        with torch.no_grad():
            states.append(model(**tokenizer(text, return_tensors="pt")).last_hidden_state)
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-4)
    assert AutoModel.from_pretrained(folder).config.vocab_size == len(own)
    assert set(pruned.scores) == set(pruned.teacher_scores) == {"next_passage"}


def test_pruned_student_goes_on(pruned, settings_of):
    """A checkpoint with fewer tokens than its teacher refused, or read with the teacher's ids."""
    again = run_experiment(
        settings_of(None, f"student.path={pruned.folder}/student", "training.learning_rate=1e-12")
    )
    assert again.validation_loss < 1e-5
