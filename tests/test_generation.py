"""Fine-tuning of tiny encoders that write, from rows of data to what is kept."""

import dataclasses
import json
import logging
import random

import pyarrow
import pytest
import torch
from pyarrow import parquet
from test_finetune import make_examples
from test_prefix_lm import CONFIGS, PLAIN
from test_writer import TOKENS, make_tokenizer
from transformers import AutoModel, BertForMaskedLM

from minilm_exp.downstream import find_tasks
from minilm_exp.errors import ExperimentError
from minilm_exp.heads import load_lm_head
from minilm_exp.parsing import parse
from minilm_exp.pipeline import run_experiment
from minilm_exp.prefix_lm import NO_LABEL
from minilm_exp.student import load_checkpoint
from minilm_exp.task_settings import WRITERS, Task, TaskSettings
from minilm_exp.tasks import finetune as finetune_module
from minilm_exp.tasks.data import load_task
from minilm_exp.tasks.encode import encode
from minilm_exp.tasks.examples import TaskData
from minilm_exp.tasks.finetune import Finetuning, finetune, with_head
from minilm_exp.tasks.seq2seq import Seq2SeqCollator, encode_seq2seq, writing_of
from minilm_exp.writer import Writer

WORDS = TOKENS[6:16]


def make_task(**changes):
    given = {"metrics": ["rouge1", "rougeL"], "score": "rougeL", "text_columns": ["article"]}
    return Task(
        version=1, kind="generation", family="xsum", target_column="summary", **{**given, **changes}
    )


def make_settings(**changes):
    given = {
        "epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "warmup_ratio": 0.1,
        "weight_decay": 0.01, "hidden_dropout": 0.1, "attention_dropout": 0.0, "max_length": 24,
        "max_target_length": 6, "min_target_length": 0, "label_smoothing": 0.1, "num_beams": 1,
        "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    }  # fmt: skip
    return TaskSettings(**{**given, **changes})


def make_data(num_train=32, num_validation=12):
    """The target is the first two words of the source."""
    draw = random.Random(4)

    def row():
        words = draw.choices(WORDS, k=draw.randint(2, 9))
        return {"source": " ".join(words), "target": " ".join(words[:2])}

    train = make_examples([row() for _ in range(num_train)])
    return TaskData(train, {"": make_examples([row() for _ in range(num_validation)])}, {}, 1)


def make_encoder(architecture="bert", seed=0):
    torch.manual_seed(seed)
    config = CONFIGS[architecture](
        vocab_size=len(TOKENS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=40, pad_token_id=1,
        initializer_range=0.3, type_vocab_size=2 if architecture == "bert" else 1,
    )  # fmt: skip
    return AutoModel.from_config(config).eval()


@pytest.fixture(scope="module")
def runtime(compose_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unused")
    return parse(compose_config("experiment=smoke", f"outputs_dir={folder}")).runtime


@pytest.fixture
def make_job(runtime, tmp_path):
    def made(data=None, *, seed=1, microbatch=None, precision="fp32", task=None, **settings):
        return Finetuning(
            name="made up",
            task=task or make_task(),
            data=data or make_data(),
            settings=make_settings(**settings),
            seed=seed,
            precision=precision,
            runtime=dataclasses.replace(runtime, microbatch_size=microbatch),
            cache=tmp_path / "cache",
        )

    return made


def train(job, architecture="bert", **named):
    logged = []

    def log(metrics, step):
        logged.append((step, dict(metrics)))

    scored = finetune(make_encoder(architecture), make_tokenizer(), job, "a test", log, **named)
    return scored, logged


# Token ids


def test_rows_are_source_and_closed_target():
    """A target without its end, or one that the validation reads."""
    rows = {"source": ["w1 w2", "w3"], "target": ["w4", "w5 w6 w7 w8"]}
    w = TOKENS.index("w0")
    found = encode_seq2seq(rows, make_tokenizer(), 3, 4, for_training=True)
    assert found["input_ids"] == [[2, w + 1, 3, w + 4, 3], [2, w + 3, 3, w + 5, w + 6, w + 7, 3]]
    assert found["num_source"] == [3, 3]
    assert found["source_is_cut"] == [True, False]
    assert found["target_is_cut"] == [False, True]
    found = encode_seq2seq(rows, make_tokenizer(), 12, 4, for_training=False)
    assert found["input_ids"] == [[2, w + 1, w + 2, 3], [2, w + 3, 3]]


def test_labels_are_the_next_tokens_of_the_target():
    """A label that its own place can see, or one in the source or the padding."""
    rows = [
        {"input_ids": [2, 10, 11, 3, 20, 21, 3], "num_source": 4, "index": 5},
        {"input_ids": [2, 12, 3, 22, 3], "num_source": 3, "index": 7},
    ]
    batch = Seq2SeqCollator(make_tokenizer())(rows)
    no = NO_LABEL
    assert batch["labels"].tolist() == [[no, no, no, 20, 21, 3, no], [no, no, 22, 3, no, no, no]]
    assert batch["input_ids"].tolist() == [[2, 10, 11, 3, 20, 21, 3], [2, 12, 3, 22, 3, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    assert batch["source_mask"].tolist() == [[1] * 4 + [0] * 3, [1] * 3 + [0] * 4]
    assert batch["index"].tolist() == [5, 7]


def test_source_has_what_the_target_leaves():
    """The papers' 464 tokens of an article, of 512 with 48 for its summary."""
    writing = writing_of(make_settings(max_length=512, max_target_length=48))
    assert (writing.max_source_length, writing.max_length) == (464, 48)


def test_cache_knows_the_length_of_the_target(tmp_path):
    """Targets of a former setting, cut elsewhere."""
    examples = make_data().train
    encoded = [
        encode(examples, "generation", True, make_tokenizer(), settings, tmp_path)
        for settings in (
            make_settings(max_target_length=6),
            make_settings(max_target_length=2),
            make_settings(max_target_length=6, max_length=20),
        )
    ]
    assert len(list(tmp_path.glob("*.arrow"))) == 3
    assert not any(encoded[0]["target_is_cut"][:])
    assert all(encoded[1]["target_is_cut"][:])


def test_text_without_a_token(tmp_path):
    """A target of control characters, whose only token would be the closing one."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = None
    for source, target, message in (("", "w1", "the source '' is"), ("w1", "", "the target '' is")):
        with pytest.raises(ExperimentError, match=message):
            encode_seq2seq({"source": [source], "target": [target]}, tokenizer, 9, 9, True)


# Training


@pytest.mark.parametrize("architecture", WRITERS)
def test_a_rule_is_learnt(architecture, make_job):
    """A loss on other tokens than those that are written later, or one place beside them."""
    rows = [{"source": f"{w} " * n, "target": f"{w} ."} for w in WORDS for n in range(1, 6)]
    examples = make_examples(rows)
    data = TaskData(examples, {"": examples}, {}, 1)
    job = make_job(data, epochs=12, hidden_dropout=0.0, learning_rate=1e-2, num_beams=2)
    scored, _ = train(job, architecture)
    assert scored.metrics["rouge1"] > 0.6  # by chance 0.1
    assert {text.split()[-1][-1] for text in scored.predictions[""]} == {"."}


def test_micro_batches_change_nothing(make_job):
    """Micro-batches of short and of long targets that count alike."""
    data = make_data()
    rows = data.train.rows.to_list()
    for number, row in enumerate(rows):
        row["target"] = "w1 " * (1 + number % 4)
    data = dataclasses.replace(data, train=make_examples(rows))

    def losses(microbatch):
        job = make_job(data, microbatch=microbatch, hidden_dropout=0.0, epochs=3)
        scored, logged = train(job)
        assert scored.predictions
        return [metrics["loss"] for _, metrics in logged if "loss" in metrics]

    whole, parts = losses(None), losses(2)
    assert whole and parts == pytest.approx(whole, rel=1e-5)


def test_first_weights_are_the_encoders_and_the_heads(make_job, tmp_path):
    """A head that is drawn although the checkpoint has one, or an encoder that is drawn."""
    config = make_encoder().config
    torch.manual_seed(9)
    plain = BertForMaskedLM(config)
    torch.nn.init.normal_(plain.cls.predictions.bias)
    plain.save_pretrained(tmp_path / "with")
    make_tokenizer().save_pretrained(tmp_path / "with")
    head = load_lm_head(tmp_path / "with")
    encoder, _ = load_checkpoint(str(tmp_path / "with"))
    model = with_head(encoder, make_job(), head)
    found = model.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(found[name], tensor), name
    encoder.save_pretrained(tmp_path / "without")
    assert load_lm_head(tmp_path / "without") == {}
    drawn = [with_head(encoder, make_job(seed=seed)).state_dict() for seed in (1, 1, 2)]
    name = "cls.predictions.transform.dense.weight"
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])


@pytest.mark.parametrize("architecture", ["roberta", "xlm-roberta"])
def test_heads_of_other_architectures_have_their_names(architecture, make_job, tmp_path):
    """A head that is left out because its parameters are called otherwise."""
    plain = PLAIN[architecture](make_encoder(architecture).config)
    torch.nn.init.normal_(plain.lm_head.bias)
    plain.save_pretrained(tmp_path)
    model = with_head(make_encoder(architecture), make_job(), load_lm_head(tmp_path))
    assert torch.equal(model.lm_head.bias, plain.lm_head.bias)
    assert torch.equal(model.lm_head.dense.weight, plain.lm_head.dense.weight)


def test_kept_model_writes_the_predictions(make_job, tmp_path):
    """A model of another epoch than the best, or one that reads otherwise than it was scored."""
    data = make_data()
    job = make_job(data, precision="bf16", num_beams=2, no_repeat_ngram_size=2, epochs=3)
    scored, _ = train(job, keep_in=tmp_path / "kept")
    writer = Writer.load(tmp_path / "kept")
    assert writer.write(data.validation[""].rows["source"][:]) == scored.predictions[""]
    assert writer.writing == writing_of(job.settings, "article")
    encoder, _ = load_checkpoint(str(tmp_path / "kept"))
    assert encoder.config.is_decoder is False


def test_what_is_cut_is_said_at_the_end(make_job, caplog):
    """Articles whose end nobody read, without a word."""
    with caplog.at_level(logging.WARNING):
        train(make_job(epochs=1))
        assert not caplog.records
        train(make_job(epochs=1, max_length=12))
    [record] = caplog.records
    assert "sources were cut to 6 tokens, 0 of 32 targets to 6" in record.message
    assert "of 44 sources" in record.message


def test_interrupted_training_goes_on(make_job, tmp_path, monkeypatch):
    """A checkpoint of a model with tied weights that cannot be taken up."""
    job = dataclasses.replace(make_job(epochs=2), checkpoint_steps=2)
    whole, _ = train(job)
    counts = []
    compute = finetune_module._Trainer.compute_loss

    def failing(trainer, *given, **named):
        counts.append(1)
        if len(counts) == 7:
            raise RuntimeError("interrupted")
        return compute(trainer, *given, **named)

    monkeypatch.setattr(finetune_module._Trainer, "compute_loss", failing)
    with pytest.raises(RuntimeError):
        train(job, checkpoints=tmp_path / "checkpoints")
    resumed, _ = train(job, checkpoints=tmp_path / "checkpoints")
    assert len(counts) < 7 + 8
    assert resumed == whole


# Data and settings


def write(root, split, **columns):
    folder = root / "xsum"
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), folder / f"{split}.parquet")


@pytest.fixture
def load(compose_config, tmp_path):
    def loaded(**columns):
        good = {"document": ["a", "b"], "summary": ["c", "d"], "id": ["1", "2"]}
        write(tmp_path, "validation", **good)
        write(tmp_path, "train", **{**good, **columns})
        settings = parse(compose_config("task=xsum", f"data_root={tmp_path}"))
        return load_task("xsum", settings.tasks["xsum"], find_tasks(settings)["xsum"])

    return loaded


def test_sources_and_targets_stay_in_their_rows(load):
    """Summaries of other articles."""
    assert load().train.rows.to_list() == [
        {"source": "a", "target": "c"},
        {"source": "b", "target": "d"},
    ]


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"document": ["a", " "]}, ["train.parquet, row 2", "document is empty", "read"]),
        ({"summary": ["", "d"]}, ["train.parquet, row 1", "summary is empty", "write"]),
        ({"summary": [None, "d"]}, ["row 1", "summary is missing"]),
        ({"document": [["a"], ["b"]]}, ["row 1", "is no text"]),
    ],
)
def test_rows_that_cannot_be_learnt_are_named(columns, words, load):
    """A model that learns to write nothing."""
    with pytest.raises(ExperimentError) as caught:
        load(**columns)
    for word in words:
        assert word in str(caught.value)


def test_columns_of_other_names(compose_config, tmp_path):
    """A setting of another kind of task in the advice."""
    for split in ("train", "validation"):
        write(tmp_path, split, text=["a"], summary=["b"])
    settings = parse(compose_config("task=xsum", f"data_root={tmp_path}"))
    with pytest.raises(ExperimentError, match=r"text_columns and .target_column"):
        load_task("xsum", settings.tasks["xsum"], find_tasks(settings)["xsum"])


PAPER = {
    "xsum": (512, 48, 64, 1.5e-4, 50, 0.9),
    "cnn_dailymail": (512, 160, 64, 1.5e-4, 25, 0.7),
    "squad_qg": (512, 48, 32, 8e-5, 25, 1.3),
    "squad_qg_zhao": (512, 48, 32, 8e-5, 25, 1.3),
}


@pytest.mark.parametrize("option", ["minilmv1", "minilmv2"])
def test_settings_are_those_of_the_paper(option, settings_for):
    """Lengths or a search of another task; the lengths of CNN/DailyMail are said to differ."""
    settings = settings_for(f"task=[{','.join(PAPER)}]", f"task_training={option}")
    for name, values in PAPER.items():
        [cell] = settings.task_training.cells(name, settings.tasks[name])
        assert values == (
            cell.max_length, cell.max_target_length, cell.batch_size, cell.learning_rate,
            cell.epochs, cell.length_penalty,
        )  # fmt: skip
        assert (cell.label_smoothing, cell.num_beams) == (0.1, 5)


def test_the_two_splits_of_question_generation_are_reversed(settings_for):
    """The same split under two names."""
    tasks = settings_for("task=[squad_qg,squad_qg_zhao]").tasks
    du, zhao = tasks["squad_qg"], tasks["squad_qg_zhao"]
    assert (du.validation, du.test) == (zhao.test, zhao.validation) == (["validation"], ["test"])
    same = {"validation": [], "test": []}
    assert dataclasses.replace(du, **same) == dataclasses.replace(zhao, **same)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["task=xsum", "task_training.max_length=1000"], "above the 512 positions"),
        (["task=xsum", "task_training.max_target_length=256"], "leaves no room for the source"),
        (["task=xsum", "task_training.min_target_length=48"], "min_target_length=48 .for xsum."),
        (["task=xsum", "task_training.num_beams=0"], "task_training.num_beams=0"),
        (["task=xsum", "task_training.label_smoothing=1"], "task_training.label_smoothing=1"),
        (["task=xsum", "task_training.length_penalty=nan"], "task_training.length_penalty=nan"),
        (["task=xsum", "task_training.no_repeat_ngram_size=-1"], "no_repeat_ngram_size=-1"),
        (["task=xsum", "task_training.families.xsum.num_beams=null"], "num_beams .for xsum. is"),
        (["task=xsum", "tasks.xsum.target_column=null"], "must name one column each"),
        (["task=xsum", "tasks.xsum.text_columns=[a,b]"], "must name one column each"),
        (["task=xsum", "tasks.xsum.metrics=[accuracy]"], "generation has rouge1"),
        (["task=xsum", "recipe=task_specific", "objective=logit_kd"], "no objective compares"),
        (["task=xsum", "teacher=modernbert_base", "teacher.weights=random"], "cannot write"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides, message, settings_for):
    """A mistake that only shows after hours of distilling."""
    with pytest.raises(ExperimentError, match=message):
        settings_for(*overrides)


def test_settings_of_generation_are_no_other_tasks(settings_for):
    """A number of beams that makes a classification another one."""
    plain = settings_for("task=sst2")
    changed = settings_for("task=sst2", "task_training.num_beams=3")
    for settings in (plain, changed):
        [cell] = settings.task_training.cells("sst2", settings.tasks["sst2"])
        assert cell.num_beams is None
        assert "num_beams" not in cell.as_dict()


# Whole runs


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, number in (("train", 24), ("validation", 8)):
        texts = [f"the model {n} and the teacher of student {n}" for n in range(number)]
        write(root, split, document=texts, summary=[f"model {n}" for n in range(number)])
    return root


@pytest.fixture
def whole_run(compose_config, tiny_teacher_folder, data_root, tmp_path):
    def ran(*overrides):
        config = compose_config(
            "experiment=smoke", "teacher=custom", f"teacher.path={tiny_teacher_folder}",
            "task=xsum", f"data_root={data_root}", f"outputs_dir={tmp_path}",
            "task_training.max_length=60", "task_training.max_target_length=8",
            "student.hidden_size=32", "student.num_attention_heads=4",
            "relation_set.num_relation_heads=4", *overrides,
        )  # fmt: skip
        return run_experiment(parse(config))

    return ran


def test_recipe_finetune_keeps_a_generator(whole_run, tmp_path):
    """A run whose outputs nobody can read, or whose model cannot write again."""
    result = whole_run("recipe=finetune", "recipe.models=[teacher]")
    folder = tmp_path / "runs" / result.folder.rsplit("/", 1)[1]
    [file] = folder.glob("predictions/*/validation.jsonl")
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [*rows[0]] == ["source", "target", "prediction"]
    writer = Writer.load(folder / "models" / "xsum-teacher")
    assert writer.write([row["source"] for row in rows]) == [row["prediction"] for row in rows]
    assert set(result.metrics["teacher"]["xsum"]) == {"rouge1", "rouge2", "rougeL"}
    [table] = tmp_path.glob("artifacts/*/artifacts/examples/validation.json")
    content = json.loads(table.read_text("utf-8"))
    assert content["columns"] == ["source", "target", "output"]
    assert content["data"] == [[row["source"], row["target"], row["prediction"]] for row in rows]
    before = sorted(folder.rglob("*"))
    assert whole_run("recipe=finetune", "recipe.models=[teacher]").run_id == result.run_id
    assert sorted(folder.rglob("*")) == before


def test_distilled_student_writes(whole_run, tmp_path):
    """A kind of task that works for a checkpoint only."""
    result = whole_run("recipe.models=[student,undistilled]", "student.num_layers=2")
    assert set(result.scores) == set(result.undistilled_scores) == {"xsum"}
    assert 0 <= result.scores["xsum"] <= 1
