"""Teachers that are more than an encoder: classifiers and sentence encoders."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
)

from minilm_exp.errors import ExperimentError
from minilm_exp.hub import hub_commit
from minilm_exp.pipeline import run_experiment
from minilm_exp.sentence_modules import Pooling, keep_modules, read_pooling
from minilm_exp.task_settings import TeacherLabels
from minilm_exp.tasks.examples import Examples, TaskData
from minilm_exp.tasks.teacher_labels import _numbers, make_teacher_labels
from minilm_exp.teacher_facts import kind_of, modules_folder, pooling_of
from tests.running import assert_told_simply, results, run

pytestmark = pytest.mark.usefixtures("quick_collection")

OLD_POOLING = {
    "word_embedding_dimension": 32,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_max_tokens": False,
}
NEW_POOLING = {"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}


def add_modules(folder, pooling=OLD_POOLING, kinds=("Transformer", "Pooling", "Normalize")):
    modules = []
    for number, kind in enumerate(kinds):
        place = f"{number}_{kind}" if number else ""
        prefix = "" if "." in kind else "sentence_transformers.models."
        modules.append({"idx": number, "name": str(number), "path": place, "type": prefix + kind})
        if place:
            (folder / place).mkdir(exist_ok=True)
            content = pooling if kind == "Pooling" else {"kind": kind}
            (folder / place / "config.json").write_text(json.dumps(content))
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    return folder


@pytest.fixture
def sentence_encoder(tiny_teacher_folder, tmp_path):
    folder = tmp_path / "sentence_encoder"
    shutil.copytree(tiny_teacher_folder, folder)
    return add_modules(folder)


@pytest.fixture
def classifier(tiny_bert, tiny_tokenizer, texts, tmp_path):
    """Its classes are by chance, but differ from text to text."""
    torch.manual_seed(3)
    config = type(tiny_bert.config).from_dict(
        tiny_bert.config.to_dict()
        | {
            "num_labels": 3,
            "id2label": {0: "Cold", 1: "Warm", 2: "Hot"},
            "label2id": {"Cold": 0, "Warm": 1, "Hot": 2},
            "initializer_range": 0.5,
        }
    )
    folder = tmp_path / "classifier"
    model = BertForSequenceClassification(config).eval()
    read = tiny_tokenizer(texts.read_text().splitlines(), padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(read["input_ids"], read["attention_mask"]).logits
    model.classifier.bias.data -= logits.mean(dim=0)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    """A file of 120 sentences, each a document."""
    file = tmp_path / "texts.txt"
    words = ("stone", "river", "model", "of", "the", "7", "teacher", "and", "z", "quick")
    lines = [
        " ".join(words[(number * step + step) % 10] for step in range(1, 4 + number % 5))
        + f" {number}"
        for number in range(120)
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def overrides_of(teacher, texts):
    return [
        "experiment=compress", f"teacher.path={teacher}", f"corpus.files=[{texts}]",
        "corpus.block_length=16", "corpus.held_out_fraction=0.3", "training.max_steps=2",
        "training.warmup_steps=1", "training.batch_size=4", "student.budget.params=25k",
        "student.budget.num_layers=[2]", "task_training.epochs=2", "task_training.max_length=24",
        "task_training.learning_rate=1e-3",
    ]  # fmt: skip


def test_kinds_are_told_apart(tiny_teacher_folder, sentence_encoder, classifier):
    """A sentence encoder whose student has no pooling, a classifier whose student has no labels."""
    assert kind_of(str(tiny_teacher_folder), None) == "encoder"
    assert kind_of(str(sentence_encoder), None) == "sentence_encoder"
    assert kind_of(str(classifier), None) == "classifier"


@pytest.mark.parametrize(
    ("pooling", "kinds", "found"),
    [
        (OLD_POOLING, ("Transformer", "Pooling", "Normalize"), Pooling("mean", True)),
        (OLD_POOLING, ("Transformer", "Pooling"), Pooling("mean", False)),
        (NEW_POOLING, ("Transformer", "Pooling"), Pooling("first_token", False)),
        (OLD_POOLING | {"pooling_mode_max_tokens": True}, ("Transformer", "Pooling"), None),
        ({"pooling_mode": "lasttoken"}, ("Transformer", "Pooling"), None),
        ({"pooling_mode": 3}, ("Transformer", "Pooling"), None),
        (OLD_POOLING, ("Transformer", "Pooling", "Dense"), None),
        (OLD_POOLING, ("Transformer", "elsewhere.Pooling"), None),
    ],
)
def test_pooling_is_read_in_old_and_new_files(tmp_path, pooling, kinds, found):
    """Embeddings that are pooled otherwise than the teacher's."""
    assert read_pooling(add_modules(tmp_path, pooling, kinds)) == found
    if found is None:
        with pytest.raises(ExperimentError, match=r"teacher\.pooling"):
            pooling_of(str(tmp_path), None)


@pytest.mark.parametrize("content", ["", "[", "{}", "[1]", '[{"type": 1}]', '[{"type": "a"}]'])
def test_damaged_modules_are_told(tmp_path, content):
    """A traceback of a file that somebody else wrote."""
    (tmp_path / "modules.json").write_text(content)
    assert read_pooling(tmp_path) is None
    (tmp_path / "student").mkdir()
    if content != "{}":
        with pytest.raises(ExperimentError, match=r"modules\.json"):
            keep_modules(tmp_path, tmp_path / "student")


@pytest.mark.parametrize(
    "module",
    [
        {"path": "../../etc", "type": "sentence_transformers.models.Pooling"},
        {"path": "/etc", "type": "sentence_transformers.models.Pooling"},
        {"path": "..", "type": "sentence_transformers.models.Pooling"},
        {"path": "1_Pooling", "type": "evil.Pooling"},
        {"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"path": "a\0b", "type": "sentence_transformers.models.Pooling"},
        {"path": "", "type": "sentence_transformers.models.Pooling"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.CLIPModel"},
    ],
)
def test_hostile_modules_are_refused(tmp_path, module):
    """Files of the machine in a student's folder, or code that its users import."""
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0"} | module]))
    (tmp_path / "student").mkdir()
    with pytest.raises(ExperimentError, match=r"modules\.json has the module"):
        keep_modules(tmp_path, tmp_path / "student")


@pytest.mark.integration
def test_student_of_a_sentence_encoder_is_one(sentence_encoder, texts, tmp_path):
    """A folder that sentence-transformers cannot load, or that pools in another way."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    shutil.rmtree(sentence_encoder / "2_Normalize")
    add_modules(sentence_encoder, NEW_POOLING)
    outputs = tmp_path / "outputs"
    done = run(outputs, *overrides_of(sentence_encoder, texts))
    assert done.status == 0, done.both
    (result,) = results(outputs).values()
    assert [*result["stages"]] == ["relations", "embedding"]
    config = (
        tmp_path / "outputs" / "runs" / next(iter(results(outputs))) / "config.yaml"
    ).read_text()
    assert "- first_token" in config
    folder = outputs / "runs" / next(iter(results(outputs))) / "student"
    student = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    encoded = student.encode(["the model", "a river"], convert_to_tensor=True)
    assert encoded.shape == (2, 32)
    assert torch.allclose(encoded.norm(dim=1), torch.ones(2), atol=1e-5)
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    with torch.inference_mode():
        states = encoder.eval()(**tokenizer(["the model"], return_tensors="pt")).last_hidden_state
    first = torch.nn.functional.normalize(states[0, 0], dim=0)
    assert torch.allclose(encoded[0], first, atol=1e-5)


def test_relations_alone_make_no_sentence_encoder(settings_of, sentence_encoder):
    """A folder that loads as a sentence encoder, with embeddings that nothing trained."""
    changes = {"teacher.path": str(sentence_encoder), "training.max_steps": 2}
    result = run_experiment(settings_of(None, **changes))
    assert not (Path(result.folder) / "student" / "modules.json").exists()
    assert result.untrained


@pytest.mark.integration
def test_student_of_a_classifier_takes_its_place(classifier, texts, tmp_path):
    """A student with classes in another order or under other names, or a teacher trained anew."""
    outputs = tmp_path / "outputs"
    done = run(outputs, *overrides_of(classifier, texts))
    assert done.status == 0, done.both
    ((name, result),) = results(outputs).items()
    assert result["teacher_scores"] == {"teacher_labels": 1.0}
    assert 0 < result["scores"]["teacher_labels"] <= 1
    models = outputs / "runs" / name / "models"
    student, teacher = (
        AutoModelForSequenceClassification.from_pretrained(folder)
        for folder in (models / "teacher_labels-student", classifier)
    )
    assert student.config.id2label == teacher.config.id2label == {0: "Cold", 1: "Warm", 2: "Hot"}
    kept = AutoModelForSequenceClassification.from_pretrained(models / "teacher_labels-teacher")
    for tensor, other in zip(kept.state_dict().values(), teacher.state_dict().values()):
        assert torch.equal(tensor, other)


@pytest.mark.integration
def test_own_data_in_the_words_of_the_teacher(classifier, texts, tmp_path):
    """Labels in the order of the alphabet, of which the teacher knows nothing."""
    outputs = tmp_path / "outputs"
    file = tmp_path / "mine.csv"
    labels = ("hot", "cold", "warm")
    lines = [f"{text},{labels[i % 3]}" for i, text in enumerate(texts.read_text().splitlines())]
    file.write_text("\n".join(["text,label", *lines]))
    given = [
        *overrides_of(classifier, texts), "task=text_classification",
        f"tasks.text_classification.files.train={file}",
    ]  # fmt: skip
    done = run(outputs, *given)
    assert done.status == 0, done.both
    ((name, result),) = results(outputs).items()
    assert result["teacher_scores"]["text_classification"] < 1
    folder = outputs / "runs" / name
    config = json.loads(
        (folder / "models" / "text_classification-student" / "config.json").read_text()
    )
    assert config["id2label"] == {"0": "Cold", "1": "Warm", "2": "Hot"}
    (predictions,) = folder.glob("predictions/text_classification-teacher-*/validation.jsonl")
    said = [json.loads(line) for line in predictions.read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    truth = dict(line.rsplit(",", 1) for line in lines)
    for row in said:
        with torch.inference_mode():
            logits = model(**tokenizer(row["first"], truncation=True, max_length=24,
                                       return_tensors="pt")).logits  # fmt: skip
        assert row["prediction"] == model.config.id2label[int(logits.argmax())]
        assert row["label"].casefold() == truth[row["first"]]

    file.write_text(file.read_text().replace("cold", "icy"))
    refused = run(outputs, *given)
    assert_told_simply(refused, "teacher.head=own", "icy", "Cold, Warm, Hot")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=teacher_labels"], "set teacher.head=own"),
        (["teacher.head=own"], "teacher.head=own with task=none"),
        (["teacher.head=own", "task=next_passage"], "teacher.head=own with task=next_passage"),
        (["teacher.head=own", "task=stsb_similarity"], "the head predicts classes"),
        (["teacher.head=mine", "task=teacher_labels"], "teacher.head=mine is not one of"),
        (["teacher.pooling=max"], "teacher.pooling=max is not one of"),
        (
            ["teacher.head=own", "task=teacher_labels", "teacher.weights=random"],
            "teacher.weights=random",
        ),
    ],
)
def test_heads_that_cannot_be_are_refused(settings_of, overrides, words):
    """A head that is drawn at random, or not used."""
    with pytest.raises(ExperimentError, match=words):
        settings_of(None, *[o for o in overrides if not o.startswith("task=none")])


def test_encoder_without_a_head_is_told(settings_of):
    """A head drawn at random that labels the corpus."""
    settings = settings_of(None, "task=teacher_labels", "teacher.head=own", "recipe=task_specific")
    with pytest.raises(ExperimentError, match="no head of sequence classification"):
        run_experiment(settings)


def test_modules_come_from_the_hub_too(sentence_encoder, tmp_path, monkeypatch):
    """A sentence encoder that is one only where somebody downloaded it by hand."""
    cache, commit = tmp_path / "cache", "a" * 40
    folder = cache / "models--org--encoder"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(sentence_encoder, folder / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    hub_commit.cache_clear()
    assert modules_folder("org/encoder", None) == folder / "snapshots" / commit
    assert pooling_of("org/encoder", None) == "mean"
    assert modules_folder("org/other", None) is None
    hub_commit.cache_clear()


@pytest.mark.parametrize(
    ("asked", "number", "names", "found"),
    [
        (["a", "b"], 2, ["b", "a"], [1, 0]),
        (["neg", "POS"], 2, ["NEG", "Pos", "other"], [0, 1]),
        (["0", "1"], 2, ["LABEL_0", "LABEL_1"], [0, 1]),
        (["0", "1"], 2, ["1", "0"], [1, 0]),
        (None, 2, ["x", "y", "z"], [0, 1]),
        (None, 3, ["x", "y"], None),
        (["pos", "POS"], 2, ["Pos", "neg"], None),
        (["pos", "new"], 2, ["pos", "neg"], None),
        (["x"], 1, ["x", "x"], None),
    ],
)
def test_labels_are_matched(asked, number, names, found):
    """Two classes of the data in one of the teacher's, or a name that is taken for a number."""
    rows = Examples(Dataset.from_dict({"first": [], "label": []}), "")
    assert _numbers(TaskData(rows, {}, {}, number, asked), names) == found


def test_held_out_sentences_are_not_learnt(tmp_path):
    """A sentence that stands in many documents, learnt and asked for."""
    held_out = [f"Shared line. Held out {number}." for number in range(10)]
    others = [f"Shared line. Another one {number}." for number in range(30)]
    task = TeacherLabels(1, 12, 100)
    data = make_teacher_labels([*others, *held_out], held_out, "sentence", task)
    train, asked = (set(part.rows["first"][:]) for part in (data.train, data.validation[""]))
    assert len(train) == 12 and len(asked) == 11 and not train & asked
    everything = make_teacher_labels(others, held_out, "sentence", TeacherLabels(1, 1000, 100))
    assert train <= set(everything.train.rows["first"][:])
