"""Hostile input, drawn by hypothesis: every answer is a result or one readable message.

`make fuzz` draws more of it, and other cases each time. A case that fails is printed as small as
hypothesis can make it; it belongs into the tests of the part that it broke.
"""

import dataclasses
import gzip
import io
import json
import math
import os
import string

import pyarrow
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings, strategies
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pyarrow import parquet

from minilm_exp.corpus import fingerprint_corpus, prepare_corpus
from minilm_exp.errors import ExperimentError
from minilm_exp.parsing import parse
from minilm_exp.provenance import run_key
from minilm_exp.settings import as_dict, flatten
from minilm_exp.task_settings import Files, parse_tasks
from minilm_exp.tasks.data import load_task
from minilm_exp.tasks.splits import find_splits

# Cases of each test; `make fuzz` sets how many times as many, with a seed of its own.
TIMES = int(os.environ.get("FUZZ_TIMES", "1"))


def cases(number):
    """So many cases, the same ones each time unless more are asked for."""
    return settings(
        max_examples=number * TIMES,
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        # Making a case smaller takes minutes; `make fuzz` does it.
        phases=[Phase.generate] if TIMES == 1 else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


# Configs

NUMBERS = strategies.one_of(
    strategies.integers(-3, 40),
    strategies.integers(-(2**70), 2**70),
    strategies.floats(),
    strategies.sampled_from([0, -1, 2**31, 2**63, 10**30, math.nan, math.inf, -math.inf, 1e-320]),
)
WORDS = strategies.one_of(
    strategies.text(max_size=12),
    strategies.sampled_from(
        ["", " ", "???", "null", "true", "auto", "nan", "${seed}", "${teacher}", "${nothing.there}",
         "${teacher.name}", "${oc.env:NOT_THERE_AT_ALL}", "${evil:1}", "${", "$", "a: b", "..", "~",
         "/", "\x00", "\n", "\u202e", "\ud800", "é" * 300, "x" * 5000, "[1,2]", "{a: 1}", "-",
         "qk", "all", "teacher", "last", "../../etc/passwd", "%s%n", "{0}", "cpu", "cuda:99"]
    ),
)  # fmt: skip
PLAIN = strategies.one_of(strategies.none(), strategies.booleans(), NUMBERS, WORDS)
KEYS = strategies.one_of(strategies.text(string.ascii_letters + "_.-", max_size=8), WORDS)


def nested(inner):
    """The values themselves, and lists and dictionaries of them."""
    lists = strategies.lists(inner, max_size=3)
    return strategies.one_of(inner, lists, strategies.dictionaries(KEYS, inner, max_size=3))


# Not strategies.recursive, which draws one case in two ways once in a while.
JUNK = nested(nested(PLAIN))
BASES = [
    ("experiment=smoke",),
    ("experiment=smoke", "recipe=teacher_assistant"),
    ("experiment=smoke", "recipe=finetune", "recipe.models=[teacher]", "task=[sst2,squad]"),
    ("experiment=smoke", "recipe=task_specific", "objective=logit_kd", "task=mrpc"),
    (
        "experiment=smoke",
        "objective=tinybert",
        "corpus=hf_dataset",
        "corpus.datasets=[{path: a/b}]",
    ),
    ("student=l6h384", "teacher=bert_base", "baseline=bert_base", "task_training=minilmv2"),
]


def names_of(node, prefix=""):
    """Every group and setting of a config, by its dotted name."""
    for key, value in node.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        yield name
        if isinstance(value, dict):
            yield from names_of(value, name)


@pytest.fixture(scope="module")
def bases(compose_config, tmp_path_factory):
    found = []
    for overrides in BASES:
        config = compose_config(*overrides, "outputs_dir=never_written")
        OmegaConf.set_struct(config, False)
        plain = OmegaConf.to_container(config, resolve=False)
        found.append((plain, sorted(names_of(plain))))
    return found


@cases(190)
@given(data=strategies.data())
def test_any_value_of_any_setting_is_taken_or_refused(data, bases):
    """A traceback for a slip of the pen, or a setting that fails only when it is used."""
    plain, names = data.draw(strategies.sampled_from(bases))
    config = OmegaConf.create(plain)
    number = data.draw(strategies.sampled_from([1, 1, 1, 2, 4]))
    for _ in range(number):
        name = data.draw(strategies.sampled_from(names))
        if data.draw(strategies.integers(0, 9)) == 0:
            name += "." + data.draw(strategies.text(string.ascii_letters, min_size=1, max_size=5))
        value = data.draw(JUNK)
        try:
            OmegaConf.update(config, name, value, force_add=True)
        except (OmegaConfBaseException, AttributeError, TypeError, ValueError, AssertionError):
            return  # no config can hold it
    try:
        parsed = parse(config)
    except (ExperimentError, OmegaConfBaseException):
        return
    json.dumps(flatten(parsed))
    assert len(run_key(parsed, "fp32", {})) == 64
    assert yaml.safe_load(yaml.safe_dump(as_dict(parsed)).encode("utf-8", "replace"))


NUMERIC = ["student.num_layers", "student.hidden_size", "student.init_layers", "training.max_steps",
           "training.batch_size", "training.learning_rate", "corpus.block_length", "seed",
           "corpus.held_out_fraction", "runtime.num_threads", "task_training.num_seeds",
           "relation_set.num_relation_heads", "layer_selection.teacher_layer", "teacher.num_layers",
           "baseline.num_batches", "task_training.epochs", "tasks.next_passage.num_train",
           "objective.terms.relations.weight", "runtime.teacher_cache_gb"]  # fmt: skip


@cases(60)
@given(
    name=strategies.sampled_from(NUMERIC),
    value=strategies.one_of(NUMBERS, strategies.lists(NUMBERS, max_size=4)),
)
def test_any_number_is_taken_or_refused(name, value, bases):
    """A loop without end, or an overflow once the run has begun."""
    config = OmegaConf.create(bases[0][0])
    OmegaConf.update(config, name, value, force_add=True)
    try:
        parsed = parse(config)
    except (ExperimentError, OmegaConfBaseException):
        return
    for setting, number in flatten(parsed).items():
        if type(number) in (int, float):
            assert math.isfinite(number) and abs(number) < 1e300, setting
    json.dumps(as_dict(parsed), allow_nan=False)


# Files of text

TEXTS = strategies.one_of(
    strategies.text(max_size=40),
    strategies.sampled_from(
        ["", " ", "the model\nand the teacher", "\x00", "\ufeff", "\u2028", "a" * 300_000,
         "one. two! three?", "\ud800", "\udc00x", "\r\n\r\n", "\t", "é" * 50, "的。" * 30]
    ),
)  # fmt: skip
RECORDS = strategies.one_of(
    strategies.fixed_dictionaries({"text": TEXTS}),
    strategies.fixed_dictionaries({"text": PLAIN}),
    strategies.dictionaries(TEXTS, PLAIN, max_size=2),
    strategies.lists(strategies.integers(-3, 200), max_size=30),
    strategies.lists(PLAIN, max_size=3),
    PLAIN,
)
GOOD = "\n\n".join(f"the model number {i} and the teacher" for i in range(60))


def write_lines(records):
    return "\n".join(json.dumps(record) for record in records).encode("utf-8", "surrogatepass")


def write_parquet(rows, column):
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([{column: row} for row in rows]), file)
    return file.getvalue()


def draw_damage(data, content):
    """The content as it is, cut off, or with bytes changed."""
    how = data.draw(strategies.sampled_from(["whole", "whole", "cut off", "changed"]))
    if how == "cut off":
        return content[: data.draw(strategies.integers(0, len(content)))]
    if how == "changed" and content:
        place = data.draw(strategies.integers(0, len(content) - 1))
        return content[:place] + data.draw(strategies.binary(max_size=4)) + content[place + 2 :]
    return content


def draw_rows(data, values):
    """Values of one kind as a column of parquet can hold; None where it cannot."""
    rows = data.draw(strategies.lists(values, max_size=5))
    try:
        return write_parquet(rows, data.draw(strategies.sampled_from(["text", "text", "body"])))
    except (pyarrow.ArrowException, UnicodeError, OverflowError, ValueError, TypeError):
        return None


def draw_text_file(data, kind):
    if data.draw(strategies.integers(0, 5)) == 0:
        return data.draw(strategies.binary(max_size=200))
    if kind == "txt":
        texts = "\n\n".join(data.draw(strategies.lists(TEXTS, max_size=4)))
        return draw_damage(data, (GOOD + texts).encode("utf-8", "surrogatepass"))
    if kind == "parquet":
        return draw_rows(data, TEXTS) or draw_rows(data, strategies.integers(0, 5)) or b""
    records = data.draw(strategies.lists(RECORDS, max_size=4))
    good = [{"text": text} for text in GOOD.split("\n\n")]
    content = write_lines([*good, *records] if data.draw(strategies.booleans()) else records)
    if kind == "jsonl.gz":
        return draw_damage(data, gzip.compress(draw_damage(data, content)))
    return draw_damage(data, content)


@pytest.fixture(scope="module")
def corpus_settings(compose_config, tmp_path_factory):
    config = compose_config(
        "experiment=smoke", "task=none", "corpus=text_files", "corpus.files=[x]"
    )
    config.outputs_dir = str(tmp_path_factory.mktemp("fuzz"))
    config.corpus.block_length = 16
    return config


@cases(120)
@given(data=strategies.data())
def test_any_file_of_text_is_read_or_refused(data, corpus_settings, tiny_tokenizer):
    """A corpus that ends in a traceback after hours, or that is half read without a word."""
    kind = data.draw(strategies.sampled_from(["txt", "jsonl", "jsonl.gz", "parquet"]))
    pretokenized = data.draw(strategies.booleans()) if kind.startswith("jsonl") else False
    config = corpus_settings.copy()
    file = f"{config.outputs_dir}/text.{kind}"
    with open(file, "wb") as opened:
        opened.write(draw_text_file(data, kind))
    config.corpus.files, config.corpus.pretokenized = [file], pretokenized
    config.corpus.packing = data.draw(strategies.booleans())
    if not pretokenized:
        config.corpus.split = data.draw(strategies.sampled_from(["document", "sentence"]))
    parsed = parse(config)
    try:
        corpus = prepare_corpus(parsed, tiny_tokenizer, fingerprint_corpus(parsed.corpus))
    except ExperimentError as error:
        problem = str(error)
    else:
        for part in (corpus.train, corpus.validation):
            assert len(part) > 0
            ids = part[len(part) - 1]["input_ids"]
            assert int(ids.min()) >= 0 and int(ids.max()) < len(tiny_tokenizer)
        corpus.held_out_documents()
        return
    assert problem.strip() and len(problem) < 2000


# Files of tasks

CELLS = strategies.one_of(
    PLAIN,
    TEXTS,
    strategies.sampled_from(["0", "1", "a", "b", "1.5", "nan", "1e999", "-1", "01", " 0"]),
    strategies.lists(PLAIN, max_size=2),
)
ANSWERS = strategies.one_of(
    JUNK,
    strategies.fixed_dictionaries(
        {
            "text": strategies.one_of(PLAIN, strategies.lists(TEXTS, max_size=2)),
            "answer_start": strategies.one_of(PLAIN, strategies.lists(NUMBERS, max_size=2)),
        }
    ),
)
SPAN = strategies.fixed_dictionaries(
    {"id": CELLS, "question": CELLS, "context": CELLS, "answers": ANSWERS}
)
LABELLED = strategies.fixed_dictionaries({"text": CELLS, "label": CELLS})
FAIR = strategies.fixed_dictionaries(
    {"text": strategies.text(min_size=1), "label": strategies.sampled_from([0, 1])}
)


@pytest.fixture(scope="module")
def all_tasks(compose_config):
    config = compose_config("task=[text_classification,squad,squad_v2]")
    config.tasks.text_classification.files.train = "none"
    return parse_tasks(config.tasks)


def draw_table(data, kind, rows):
    """A file of these rows, or None where such a file cannot hold them."""
    if data.draw(strategies.integers(0, 7)) == 0:
        return data.draw(strategies.binary(max_size=200))
    if kind == "jsonl":
        return draw_damage(data, write_lines(rows))
    if kind == "csv":
        quote = data.draw(strategies.booleans())
        lines = [",".join(row) for row in ([*rows[0]], *(map(str, row.values()) for row in rows))]
        if quote:
            lines = [",".join(json.dumps(str(v)) for v in row.values()) for row in rows]
            lines.insert(0, ",".join(rows[0]))
        return draw_damage(data, "\n".join(lines).encode("utf-8", "surrogatepass"))
    file = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, ValueError, TypeError):
        return None
    return draw_damage(data, file.getvalue())


@cases(180)
@given(data=strategies.data())
def test_any_file_of_a_task_is_read_or_refused(data, all_tasks, tmp_path_factory):
    """A row that ends a run once the student is distilled, or a score on half of the rows."""
    kind = data.draw(strategies.sampled_from(["csv", "jsonl", "parquet"]))
    name = data.draw(strategies.sampled_from(["text_classification", "squad", "squad_v2"]))
    row = SPAN if name != "text_classification" else strategies.one_of(LABELLED, FAIR, FAIR)
    rows = data.draw(strategies.lists(row, min_size=1, max_size=6))
    content = draw_table(data, kind, rows)
    if content is None:
        return
    file = tmp_path_factory.getbasetemp() / f"fuzz_task.{kind}"
    file.write_bytes(content)
    task = dataclasses.replace(
        all_tasks[name], data=None, files=Files(train=str(file)), validation=[], test=[]
    )
    if name == "text_classification":
        task.text_columns, task.label_column = ["text"], "label"
        if data.draw(strategies.booleans()):
            task.kind, task.metrics, task.score = "regression", ["pearson"], "pearson"
    try:
        loaded = load_task(name, task, find_splits(name, task, None, False))
    except ExperimentError as error:
        problem = str(error)
    else:
        assert len(loaded.train) > 0 and len(loaded.validation[""]) > 0
        return
    assert problem.strip() and len(problem) < 3000


TRAINING = {
    "training.learning_rate": [1e-320, 1e-30, 1e30],
    "training.weight_decay": [0.0, 1e30],
    "training.max_grad_norm": [1e-30, 1e30],
    "training.adam_beta1": [0.0, 0.999999],
    "training.max_steps": [2, 3],
    "seed": [0, 2**31],
}


def test_what_is_taken_runs_to_its_end_or_says_why(settings_of):
    """A run that is marked FINISHED without a student, or with a number that is none."""
    from minilm_exp.pipeline import run_experiment
    from minilm_exp.student import load_checkpoint

    @cases(2)
    @given(values=strategies.fixed_dictionaries(
        {name: strategies.sampled_from(given) for name, given in TRAINING.items()}
    ))  # fmt: skip
    def check(values):
        parsed = settings_of(None, **values, **{"training.warmup_steps": 0})
        try:
            result = run_experiment(parsed)
        except ExperimentError as error:
            problem = str(error)
        else:
            student, _ = load_checkpoint(f"{result.folder}/student")
            assert result.status == "FINISHED" and math.isfinite(result.validation_loss)
            assert all(parameter.isfinite().all() for parameter in student.parameters())
            return
        assert "nan" in problem or "inf" in problem

    check()
