"""The model card: what the hub reads of it, and what people do."""

import importlib.metadata
from dataclasses import replace
from email.message import Message
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from minilm_exp import licences
from minilm_exp.licences import licence_of_teacher
from minilm_exp.model_card import is_card_of, write_model_card
from minilm_exp.result import Result

HOSTILE = "a|b: *c* `d` <script>\n---\nlicense: mit # \"'"


@pytest.fixture
def result():
    return Result(
        run_id="r1", run_key="k" * 64, status="FINISHED", folder="", meaningful=True,
        baseline="bert_base", speedup=2.0449, num_seeds=3, elapsed_seconds=61.4,
        parameters={"student": {"total": 1234567, "embedding": 1000, "transformer": 999},
                    "teacher": {"total": 7654321, "embedding": 2000, "transformer": 888}},
        validation_losses={"query-query": 0.12344, "total": 0.5678}, validation_loss=0.5678,
        metrics={"student": {"sst2": {"accuracy": 0.91234, "f1": 0.8}},
                 "teacher": {"sst2": {"accuracy": 0.95}}},
        spreads={"student": {"sst2": {"accuracy": 0.00321}}},
        exports={"student": {"threads": 2, "models": {
            "teacher": {"megabytes": 90.9, "milliseconds": {"1": 3.0}, "speedup": {"1": 1.0},
                        "differences": {}, "scores": {}},
            "student": {"megabytes": 45.0, "milliseconds": {"1": 1.5}, "speedup": {"1": 2.0},
                        "differences": {}, "scores": {"stsb": {"spearman": 0.7891}}},
            "onnx": {"megabytes": 44.4, "milliseconds": {"1": 1.25}, "speedup": {"1": 2.4},
                     "differences": {"last_hidden_state": 3.2e-6},
                     "scores": {"stsb": {"spearman": 0.7892}}}}}},
    )  # fmt: skip


@pytest.fixture
def write(settings_for, result, tmp_path):
    """Writes a card for the teacher, changed, and gives its text and its front matter."""

    def written(task=None, overrides=(), **changes):
        settings = settings_for("task=sst2", *overrides)
        settings.teacher = replace(settings.teacher, **changes)
        folder = tmp_path / "student"
        folder.mkdir(exist_ok=True)
        write_model_card(folder, settings, result, task)
        assert is_card_of(folder, result)
        assert not is_card_of(folder, replace(result, run_key="another"))
        return (folder / "README.md").read_text(), ModelCard.load(folder / "README.md").data

    return written


def test_every_number_is_there(write):
    """A number that was measured and is looked for in vain."""
    text, data = write()
    for line in (
        "| speedup over bert_base | x2.04 |",
        "| parameters without pooler | 1,234,567 |",
        "| parameters, embedding of the teacher | 2,000 |",
        "| the run took | 61 s |",
        "| query-query | 0.1234 |",
        "| sst2 | accuracy | 0.9123 ± 0.0032 (n=3) | - | 0.9500 |",
        "| sst2 | f1 | 0.8000 | - | - |",
        "| teacher | 90.9 | 3.00 | x1.00 | - | - |",
        "| onnx | 44.4 | 1.25 | x2.40 | 3.2e-06 (last_hidden_state) | 0.7892 |",
        "- Data: English Wikipedia articles shipped with gensim 4.4.0 (CC BY-SA)",
        "apache-2.0, that of the teacher according to the model card (README.md) in the package",
    ):
        assert line in text, line
    assert data.license == "apache-2.0" and data.language == ["en"]
    assert data.library_name == "transformers" and data.pipeline_tag == "feature-extraction"
    assert "outputs_dir" not in text and "tracking" not in text


def test_kind_of_model(write, tmp_path):
    """A card that loads a classifier as an encoder, or an encoder of sentences without pooling."""
    text, data = write("sst2")
    assert data.pipeline_tag == "text-classification" and data.datasets == ["nyu-mll/glue"]
    assert "AutoModelForSequenceClassification.from_pretrained" in text
    (tmp_path / "student" / "modules.json").write_text("[]")
    text, data = write()
    assert data.library_name == "sentence-transformers" and "SentenceTransformer(" in text


def test_names_of_the_hub(write):
    """A base model or data sets that the hub cannot link; a folder that it takes for a model."""
    corpus = ("corpus=hf_dataset", "corpus.datasets=[{path: some/texts, name: null}]")
    _, data = write(overrides=corpus, package=None, hub_id="google-bert/bert-base-uncased")
    assert data.base_model == "google-bert/bert-base-uncased" and data.datasets == ["some/texts"]
    _, data = write(package=None, path=str(Path(__file__).parent))
    assert data.base_model is None


@pytest.mark.parametrize("field", ["name", "package", "path", "hub_id"])
def test_hostile_names(write, field, monkeypatch):
    """Front matter that a name ends or adds to; a table that it breaks; code."""
    monkeypatch.setattr("minilm_exp.model_card.licence_of_teacher",
                        lambda _: licences.Licence("other", HOSTILE, HOSTILE))  # fmt: skip
    changes = {"package": None, field: HOSTILE}
    text, data = write(**changes)
    assert data.license == "other" and data.license_name == HOSTILE
    front, _, body = text[4:].partition("\n---\n\n")
    assert "\n---" not in front and "<script>" not in body.split("## Config")[0]
    assert "license: mit" not in body.split("\n")
    lengths = [line.replace("\\|", "").count("|") for line in body.split("\n") if line[:1] == "|"]
    assert set(lengths) <= {3, 6, 7}


def test_backticks_do_not_end_the_config(write):
    """Markdown of somebody else after a name with a fence in it."""
    text, _ = write(name="x\n```\n# Run this")
    assert "````yaml\n" in text and text.endswith("````\n")


def pretend(monkeypatch, folder, metadata=None):
    monkeypatch.setattr(licences, "package_folder", lambda _: folder)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"p": ["d"]})
    message = Message()
    for name, value in (metadata or {}).items():
        message[name] = value
    monkeypatch.setattr(importlib.metadata, "metadata", lambda _: message)


APACHE = "\n      Apache License\n   Version 2.0, January 2004\n"


@pytest.mark.parametrize(
    "files, metadata, expected",
    [
        ({"README.md": "---\nlicense: mit\nlanguage: [en, de]\n---\n"}, {}, ("mit", None)),
        ({"README.md": "---\nlicense: other\nlicense_name: own\n---\n"}, {}, ("other", "own")),
        ({"README.md": "---\nlicense: [cc-by-4.0]\n---\n"}, {}, ("cc-by-4.0", None)),
        ({"README.md": "---\nlicense: \"Our 'own': terms\"\n---\n"}, {},
         ("other", "Our 'own': terms")),
        ({"README.md": "---\n: [\n---\n", "LICENSE": APACHE}, {}, ("apache-2.0", None)),
        ({"README.md": "no front matter", "LICENSE": "MIT License\n\nCopyright"}, {},
         ("mit", None)),
        ({"LICENSE": "You may look at it."}, {}, ("other", "LICENSE")),
        ({}, {"License": "MIT"}, ("mit", None)),
        ({}, {"License-Expression": "Apache-2.0", "License": "x"}, ("apache-2.0", None)),
        ({}, {"Classifier": "License :: OSI Approved :: MIT License"}, ("mit", None)),
        ({}, {}, (None, None)),
    ],
)  # fmt: skip
def test_licence_of_a_package(files, metadata, expected, settings_for, tmp_path, monkeypatch):
    """A licence that is guessed, or one that is there and not found."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    pretend(monkeypatch, tmp_path, metadata)
    found = licence_of_teacher(replace(settings_for().teacher, package="p"))
    assert (found.identifier, found.name) == expected
    assert found.source
    folder = licence_of_teacher(replace(settings_for().teacher, package=None, path=str(tmp_path)))
    assert (folder.identifier, folder.name) == (expected if files else (None, None))


def test_licence_that_cannot_be_known(write, settings_for):
    """Silence, or the name of a licence that nobody gave."""
    text, data = write(package=None, hub_id="some/model")
    assert data.license is None and "- Licence: **not known**: the card of some/model" in text
    text, data = write(weights="random")
    assert data.license is None and "a teacher with random weights names none" in text
