"""Exports: what they compute, how they stand alone, and what a finished run has of them."""

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from running import client_of, environment
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
)

from minilm_exp import checks, run_exports, stages
from minilm_exp.errors import ExperimentError
from minilm_exp.export import ExportGraph, export_model
from minilm_exp.exported import load_exported
from minilm_exp.pipeline import run_experiment
from minilm_exp.sentence_modules import Pooling, read_pooling

TEXTS = ["the model", "a student of the teacher, and of another one", "x"]
MORE = {
    "electra": {"embedding_size": 24},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8, "bos_token_id": 2,
                   "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                   "position_buckets": 16, "share_att_key": True},
}  # fmt: skip


def make_config(model_type, tokenizer):
    config = AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=32,
        num_attention_heads=4, max_position_embeddings=66, pad_token_id=0, num_labels=3,
        initializer_range=0.2, **MORE.get(model_type, {}),
    )  # fmt: skip
    for name in ("intermediate_size", "hidden_dim"):
        if hasattr(config, name):
            setattr(config, name, 48)
    return config


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    """Gives token types, as BERT's own does."""
    typed = copy.deepcopy(tiny_tokenizer)
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return typed


@pytest.mark.parametrize(
    "model_type, heads",
    [
        ("bert", AutoModelForQuestionAnswering),
        ("roberta", AutoModelForSequenceClassification),
        ("distilbert", AutoModelForSequenceClassification),
        ("mpnet", AutoModel),
        ("albert", AutoModel),
        ("electra", AutoModelForQuestionAnswering),
        ("deberta-v2", AutoModelForSequenceClassification),
        ("modernbert", AutoModelForSequenceClassification),
    ],
)
def test_every_architecture(model_type, heads, tokenizer, tmp_path):
    """A number or length of sequences, padding or token types that an exporter takes for fixed."""
    torch.manual_seed(3)
    config = make_config(model_type, tokenizer)
    config.num_labels = 2
    model = heads.from_config(config).eval()
    names = ["input_ids", "attention_mask"]
    if model_type not in ("distilbert", "mpnet", "modernbert"):
        names.append("token_type_ids")
    graph = ExportGraph(model, tokenizer, None)
    for name, tolerance in (("onnx", 2e-5), ("torch_int8", 1.0)):
        export_model(graph, tokenizer, name, tmp_path / name)
        exported = load_exported(tmp_path / name, model.config)
        assert exported._inputs == names
        for texts, pairs in ((TEXTS, TEXTS[::-1]), (TEXTS[:1], None)):
            inputs = tokenizer(texts, pairs, padding=True, return_tensors="pt")
            read = {key: value for key, value in inputs.items() if key in names}
            with torch.inference_mode():
                expected, found = model(**read), exported(**read)
            is_real = inputs["attention_mask"].bool()
            assert set(found) <= set(expected) and len(found) > 0
            for key, value in found.items():
                difference = (value - expected[key]).abs()
                if value.shape[:2] == is_real.shape:
                    difference = difference[is_real]
                assert difference.max() < tolerance, (name, key)


@pytest.fixture(scope="module")
def classifier(tokenizer):
    torch.manual_seed(4)
    config = make_config("bert", tokenizer)
    config.id2label = {0: "no", 1: "yes", 2: "perhaps"}
    return AutoModelForSequenceClassification.from_config(config).eval()


def test_stands_alone(classifier, tokenizer, tmp_path):
    """A folder that needs this framework, torch or another library to be used."""
    graph = ExportGraph(classifier, tokenizer, None)
    export_model(graph, tokenizer, "onnx", tmp_path / "onnx")
    export_model(graph, tokenizer, "torch_int8", tmp_path / "torch_int8")
    with torch.inference_mode():
        inputs = tokenizer(TEXTS, TEXTS, padding=True, return_tensors="pt")
        expected = classifier(**inputs).logits
        expected_int8 = load_exported(tmp_path / "torch_int8", classifier.config)(**inputs).logits
    code = f"""
import json, sys
sys.modules["minilm_exp"] = sys.modules["transformers"] = None
import numpy, onnxruntime, tokenizers
tokenizer = tokenizers.Tokenizer.from_file({str(tmp_path / "onnx" / "tokenizer.json")!r})
tokenizer.enable_padding()
rows = tokenizer.encode_batch([(text, text) for text in {TEXTS!r}])
columns = {{"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}}
inputs = {{name: [getattr(row, own) for row in rows] for name, own in columns.items()}}
session = onnxruntime.InferenceSession({str(tmp_path / "onnx" / "model.onnx")!r})
assert "torch" not in sys.modules
arrays = {{name: numpy.array(values) for name, values in inputs.items()}}
outputs = {{"onnx": session.run(["logits"], arrays)[0].tolist()}}
import torch
model = torch.jit.load({str(tmp_path / "torch_int8" / "model.pt")!r})
tensors = {{name: torch.tensor(values) for name, values in inputs.items()}}
outputs["torch_int8"] = model(**tensors)["logits"].tolist()
labels = json.load(open({str(tmp_path / "torch_int8" / "config.json")!r}))["id2label"]
assert labels == {{"0": "no", "1": "yes", "2": "perhaps"}}
print(json.dumps(outputs))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outputs = json.loads(done.stdout.splitlines()[-1])
    assert numpy.allclose(outputs["onnx"], expected, atol=1e-5)
    assert numpy.allclose(outputs["torch_int8"], expected_int8, atol=1e-5)


def test_onnx_int8_is_quiet_and_small(classifier, tokenizer, tmp_path, capfd, caplog):
    """Weights that stay as they were; what libraries print; a handler that logs all twice."""
    handlers = list(logging.root.handlers)
    graph = ExportGraph(classifier, tokenizer, None)
    export_model(graph, tokenizer, "onnx_int8", tmp_path / "exports" / "onnx_int8")
    assert logging.root.handlers == handlers and logging.root.manager.disable == 0
    printed = capfd.readouterr()
    assert printed.out == "" and "WARNING" not in printed.err
    # Its traces for its own log go to no handler but that of the tests.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    folder = tmp_path / "exports" / "onnx_int8"
    assert [path.name for path in folder.parent.iterdir()] == ["onnx_int8"]
    assert not [path.name for path in folder.glob("*.onnx*") if path.name != "model.onnx"]
    import onnx

    matrices = {
        weight.data_type
        for weight in onnx.load(folder / "model.onnx").graph.initializer
        if len(weight.dims) == 2 and min(weight.dims) >= 32
    }
    assert matrices <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    found = load_exported(folder, classifier.config)(**inputs).logits
    with torch.inference_mode():
        expected = classifier(**inputs).logits
    assert 0 < (found - expected).abs().max() < 0.5 * expected.abs().max()


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_sentence_embeddings(mode, tiny_bert, tokenizer, tmp_path):
    """Padding in the mean, or embeddings other than those of sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    tiny_bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    encoder = Transformer(str(tmp_path / "bert"))
    modules = [encoder, Pooling(32, mode), *([Normalize()] if mode == "mean" else [])]
    sentences = SentenceTransformer(modules=modules, device="cpu")
    sentences.save(str(tmp_path / "sentences"))
    pooling = read_pooling(tmp_path / "sentences")
    graph = ExportGraph(tiny_bert, tokenizer, pooling)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        found = {"here": graph(**inputs)}
        if mode == "mean":
            export_model(graph, tokenizer, "onnx", tmp_path / "onnx")
            found["onnx"] = load_exported(tmp_path / "onnx", tiny_bert.config)(**inputs)
    for outputs in found.values():
        assert list(outputs) == ["last_hidden_state", "sentence_embedding"]
        assert numpy.allclose(outputs["sentence_embedding"], sentences.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    "modules, config, expected",
    [
        (["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True}, Pooling("mean", False)),
        (["Transformer", "Pooling", "Normalize"], {"pooling_mode": "cls"},
         Pooling("first_token", True)),
        (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, None),
        (["Transformer", "Pooling"], {"pooling_mode": ["mean", "max"]}, None),
        (["Transformer", "Pooling"], {"pooling_mode": "lasttoken"}, None),
        (["Transformer"], {}, None),
    ],
)  # fmt: skip
def test_pooling_is_read(modules, config, expected, tmp_path):
    """A projection or another pooling that is left out without a word."""
    listed = [{"type": f"sentence_transformers.models.{one}", "path": one} for one in modules]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "Pooling").mkdir()
    (tmp_path / "Pooling" / "config.json").write_text(json.dumps(config))
    assert read_pooling(tmp_path) == expected


class ByLength(torch.nn.Module):
    """Computes something that a trace takes for a constant."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.device = model, model.config, model.device

    def forward(self, input_ids, attention_mask):
        output = self.inner(input_ids, attention_mask)
        output["last_hidden_state"] = output.last_hidden_state * float(input_ids.shape[1])
        return output


def test_what_computes_something_else_is_refused(tiny_bert, tokenizer, tmp_path):
    """An export that is right for the example it was made with, and for no other."""
    graph = ExportGraph(ByLength(tiny_bert), tokenizer, None)
    with pytest.raises(ExperimentError, match=r"export=torch_int8: a bert .*differs by"):
        export_model(graph, tokenizer, "torch_int8", tmp_path / "exports" / "torch_int8")
    assert not (tmp_path / "exports" / "torch_int8").exists()


def test_architecture_that_cannot_be_exported(tokenizer, tmp_path):
    """A traceback of an exporter, or a folder without a model."""

    class Odd(ByLength):
        def forward(self, input_ids, attention_mask):
            raise RuntimeError("no such operator\nmore")

    model = Odd(AutoModel.from_config(BertConfig(hidden_size=32, num_attention_heads=4,
                                                 num_hidden_layers=1, vocab_size=50)))  # fmt: skip
    with pytest.raises(ExperimentError, match=r"export=onnx: a bert \(Odd\) .*no such operator;"):
        export_model(ExportGraph(model, tokenizer, None), tokenizer, "onnx", tmp_path / "onnx")


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["export=[tflite]"], "export=tflite is not one of onnx, onnx_int8, torch_int8"),
        (["export=[onnx,torch_int8,onnx]"], "names onnx twice"),
        (["export=[onnx]", "recipe=prepare_corpus"], "prepare_corpus makes no student"),
        (["push_to=a/b", "recipe=prepare_corpus"], "prepare_corpus makes no student"),
        (["export=[onnx]", "recipe=finetune", "recipe.models=[teacher]"],
         "recipe=finetune leaves no student that can be exported"),
        (["export=[onnx]", "recipe=task_specific", "task=xsum"], "leaves no student"),
        (["push_to=a/b", "recipe=task_specific", "task=[sst2,rte]"], "keeps 2: choose one task"),
    ],
)  # fmt: skip
def test_wrong_settings(settings_for, overrides, words):
    """A mistake that is told after hours of training."""
    with pytest.raises(ExperimentError, match=words):
        settings_for("student=tiny", *overrides)


def test_missing_library(settings_for, monkeypatch):
    """An import error after training, of a library that this export does not need at that."""
    found = checks.importlib.util.find_spec
    monkeypatch.setattr(
        checks.importlib.util, "find_spec", lambda name: None if "onnx" in name else found(name)
    )
    with pytest.raises(ExperimentError, match=r"needs onnx, .*pip install 'minilm_exp\[export\]'"):
        settings_for("export=[onnx_int8]")
    assert settings_for("export=[torch_int8]").export == ["torch_int8"]


@pytest.fixture
def once(monkeypatch):
    """Counts what is made, and trains once only."""
    written = []
    write = run_exports.export_model

    def counted(graph, tokenizer, name, folder):
        written.append((folder.parent.name, name))
        write(graph, tokenizer, name, folder)

    monkeypatch.setattr(run_exports, "export_model", counted)
    return written


def test_finished_run_gets_exports(settings_of, once, monkeypatch):
    """A run that is trained again for an export, an export made twice, or one left damaged."""
    given = ("task=next_passage_smoke", "recipe.keep_models=true", "baseline.num_batches=2",
             "recipe.models=[student]", "task_training.max_length=48")  # fmt: skip
    values = {"tasks.next_passage.passage_characters": 20, "corpus.held_out_fraction": 0.5}
    first = run_experiment(settings_of(None, *given, **values))
    assert first.exports == {} and once == []
    monkeypatch.setattr(stages.Chain, "run", lambda *_: pytest.fail("it is trained again"))
    result = run_experiment(settings_of(None, *given, "export=[torch_int8]", **values))
    assert result.run_id == first.run_id and result.scores == first.scores
    assert once == [("student", "torch_int8"), ("next_passage", "torch_int8")]
    student = result.exports["student"]["models"]
    assert list(student) == ["teacher", "student", "torch_int8"]
    assert student["teacher"]["speedup"] == {"1": 1.0, "16": 1.0}
    assert set(student["torch_int8"]["differences"]) == {"last_hidden_state"}
    own = result.exports["next_passage"]["models"]
    # As it was scored when it was fine-tuned.
    assert own["student"]["scores"]["next_passage"] == first.metrics["student"]["next_passage"]
    assert "accuracy" in own["torch_int8"]["scores"]["next_passage"]
    assert all(value > 0 for value in own["torch_int8"]["milliseconds"].values())
    again = run_experiment(settings_of(None, *given, "export=[torch_int8]", **values))
    assert len(once) == 2 and again.exports == result.exports

    folder = Path(result.folder)
    (folder / "exports" / "student" / "torch_int8" / "model.pt").write_bytes(b"cut off")
    run_experiment(settings_of(None, *given, "export=[torch_int8]", **values))
    assert once[2:] == [("student", "torch_int8")]

    card = (folder / "student" / "README.md").read_text()
    assert "| torch_int8 |" in card and "largest difference" in card
    client = client_of(folder.parents[1])
    metrics = client.get_run(result.run_id).data.metrics
    assert (
        metrics["export/torch_int8/next_passage/next_passage/accuracy"]
        == (own["torch_int8"]["scores"]["next_passage"]["accuracy"])
    )
    assert metrics["export/student/speedup_batch_16"] > 0
    history = client.get_metric_history(result.run_id, "export/torch_int8/megabytes")
    assert [metric.step for metric in history] == [0, 1]
    paths = {one.path for one in client.list_artifacts(result.run_id, "exports/student/torch_int8")}
    assert "exports/student/torch_int8/model.pt" in paths


def test_similarity_is_scored_after_export(settings_of, tmp_path, once):
    """An encoder whose embeddings are worse by an export, which nobody sees."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [f"{{\"a\": \"the model {i}\", \"b\": \"a teacher {i * i}\", \"label\": {i % 6}}}\n"
            for i in range(40)]  # fmt: skip
    (folder / "validation.jsonl").write_text("".join(rows))
    result = run_experiment(
        settings_of(
            None, "task=stsb_similarity", "export=[onnx,torch_int8]", "baseline.num_batches=2",
            **{"tasks.stsb_similarity.files": {"validation": f"{folder}/validation.jsonl"},
               "tasks.stsb_similarity.data": None, "tasks.stsb_similarity.test": [],
               "tasks.stsb_similarity.text_columns": ["a", "b"]},
        )
    )  # fmt: skip
    models = result.exports["student"]["models"]
    scores = {name: one["scores"].get("stsb_similarity") for name, one in models.items()}
    assert scores["teacher"] is None
    assert scores["student"] == result.metrics["student"]["stsb_similarity"]
    assert scores["onnx"]["spearman"] == pytest.approx(scores["student"]["spearman"], abs=1e-3)
    assert models["onnx"]["differences"]["last_hidden_state"] < 1e-4
    assert models["torch_int8"]["differences"]["last_hidden_state"] > 1e-3
