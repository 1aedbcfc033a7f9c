"""Checkpoints of somebody else: no code of theirs is run that the config does not allow."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import types

import huggingface_hub
import pytest
import torch
import transformers.dynamic_module_utils
from conftest import REPOSITORY
from hostile import Touch, change, give_code

from minilm_exp import documents as documents_module
from minilm_exp.checkpoints import tensors_only
from minilm_exp.corpus import fingerprint_corpus
from minilm_exp.errors import ExperimentError
from minilm_exp.heads import load_masked_lm
from minilm_exp.hub import hub_commit
from minilm_exp.provenance import _plain, hub_commits
from minilm_exp.student import build_student, load_checkpoint
from minilm_exp.student_folder import save_student
from minilm_exp.tasks.finetune import load_finetuned
from minilm_exp.teacher import fingerprint_teacher, load_encoder, load_tokenizer, source_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOADERS = [load_encoder, load_tokenizer, fingerprint_teacher]


@pytest.fixture
def folder(tiny_teacher_folder, tmp_path):
    """A copy of the tiny teacher that a test may change."""
    return shutil.copytree(tiny_teacher_folder, tmp_path / "theirs")


@pytest.fixture
def marker(tmp_path):
    """A file that is there once code of a checkpoint was run."""
    return tmp_path / "evil"


@pytest.fixture(autouse=True)
def no_question(monkeypatch, tmp_path):
    """A question on the terminal is an error; code goes to a folder of the test."""

    def asked(*_):
        raise AssertionError("the user was asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    modules = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def parsed(settings_for):
    def made(folder, *overrides, **values):
        return settings_for(
            "teacher=custom", "student=tiny", "corpus.block_length=64", "task=none", *overrides,
            values={"teacher.path": str(folder), "student.num_attention_heads": 4,
                    "student.hidden_size": 32, "relation_set.num_relation_heads": 4,
                    **{name.replace("__", "."): value for name, value in values.items()}},
        )  # fmt: skip

    return made


# Pickles


def give_pickle(folder, marker, form):
    (folder / "model.safetensors").unlink()
    if form == "torch":
        torch.save(Touch(marker), folder / "pytorch_model.bin")
    elif form == "among tensors":
        torch.save({"w": torch.zeros(1), "x": Touch(marker)}, folder / "pytorch_model.bin")
    elif form == "plain":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(marker)))
    elif form == "old torch":
        torch.save(
            Touch(marker), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
        )
    else:
        torch.save(Touch(marker), folder / "shard.bin")
        index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": "shard.bin"}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


FORMS = ["torch", "among tensors", "plain", "old torch", "sharded"]


@pytest.mark.parametrize("form", FORMS)
def test_pickled_weights_run_nothing(form, folder, marker, parsed):
    """Weights that run a program when they are loaded, of a teacher, a student or a fine-tuning."""
    settings = parsed(folder)
    give_pickle(folder, marker, form)
    loads = {
        "teacher.path": lambda: load_encoder(settings.teacher),
        "student.path": lambda: load_checkpoint(str(folder)),
    }
    for named, load in loads.items():
        with pytest.raises(ExperimentError, match=re.escape(named)) as caught:
            load()
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert "would run code; get them as safetensors" in str(caught.value)
    with pytest.raises(ExperimentError, match=re.escape(str(folder))):
        load_finetuned(folder, "classification")
    assert not marker.exists()


def test_pickles_beside_the_weights_are_not_read(folder, marker, parsed):
    """Files of a trainer or a tokenizer that nothing needs, and that run a program when read."""
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save(Touch(marker), folder / name)
    for name in ("vocab.pkl", "tokenizer.pickle", "corpus.npy", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Touch(marker)))
    load_encoder(parsed(folder).teacher)
    load_tokenizer(parsed(folder).teacher)
    load_checkpoint(str(folder))
    assert not marker.exists()


def test_message_about_a_foreign_checkpoint_names_the_folder(tmp_path):
    """Advice that fits no place on disk."""
    with pytest.raises(ExperimentError, match=re.escape(str(tmp_path))), tensors_only(tmp_path):
        raise pickle.UnpicklingError


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "", 5, ".."]
)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_shards_lie_in_the_folder(name, kind, folder, parsed):
    """Weights read from anywhere on the machine, of which no fingerprint knows."""
    settings = parsed(folder)
    whole = folder / "model.safetensors"
    whole.rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": name}}
    (folder / f"{kind}.index.json").write_text(json.dumps(index))
    for load in LOADERS:
        with pytest.raises(ExperimentError, match=r"teacher\.path.*no file of the same folder"):
            load(settings.teacher)
    with pytest.raises(ExperimentError, match=r"student\.path.*no file of the same folder"):
        load_checkpoint(str(folder))


# Code of a checkpoint's own


@pytest.mark.parametrize("where", ["config", "tokenizer", "another version of the config"])
def test_code_of_a_teacher_is_not_run(where, folder, marker, parsed):
    """Code that is run, or a question whether to run it that a job on a cluster waits for."""
    teacher = parsed(folder).teacher
    if where == "config":
        give_code(folder, marker, tokenizer=False)
    elif where == "tokenizer":
        auto_map = {"AutoTokenizer": ["tokenization_mine.Mine", None]}
        change(folder / "tokenizer_config.json", auto_map=auto_map)
    else:
        change(folder / "config.json", configuration_files=["config.4.0.0.json"])
        shutil.copy(folder / "config.json", folder / "config.4.0.0.json")
        change(folder / "config.4.0.0.json", auto_map={"AutoConfig": "configuration_mine.Mine"})
    for load in LOADERS:
        with pytest.raises(ExperimentError, match=r"not run.*teacher\.trust_remote_code=true"):
            load(teacher)
    for read in (load_checkpoint, lambda path: parsed(folder, **{"student.path": path})):
        if read is load_checkpoint:
            with pytest.raises(ExperimentError, match=r"student\.path.*run for a teacher only"):
                read(str(folder))
    assert not marker.exists()


def test_code_of_a_student_config_is_not_run(folder, marker, parsed, tiny_bert, tiny_tokenizer):
    """The file of student.config read as if it were trusted."""
    give_code(folder, marker)
    student = dataclasses.replace(parsed(folder).student, config=str(folder / "config.json"))
    with pytest.raises(ExperimentError, match=r"student\.config.*run for a teacher only"):
        build_student(student, tiny_bert, tiny_tokenizer, 2, (0.0, 0.0), 1)
    assert not marker.exists()


@pytest.mark.parametrize("prefix", ["other/repo--", "other/repo--sub/"])
def test_code_of_another_repository_is_refused(prefix, folder, marker, parsed):
    """Code that is fetched from a repository that nobody pinned, as the folder is trusted."""
    give_code(folder, marker, prefix=prefix)
    settings = parsed(folder, teacher__trust_remote_code=True)
    for load in LOADERS:
        with pytest.raises(ExperimentError, match=r"code of another repository \(other/repo"):
            load(settings.teacher)


def test_attention_of_another_repository_is_refused(folder, parsed):
    """A kernel that the library fetches and runs, as config.json names it."""
    change(folder / "config.json", attn_implementation="some/kernel")
    with pytest.raises(ExperimentError, match="attention kernel 'some/kernel'"):
        load_encoder(parsed(folder).teacher)


def test_trusted_code_is_run_and_its_student_loads(folder, marker, parsed, tmp_path):
    """A custom teacher whose student cannot be built, or whose folder no stage can load."""
    give_code(folder, marker)
    settings = parsed(folder, teacher__trust_remote_code=True)
    assert not marker.exists()
    encoder, tokenizer = load_encoder(settings.teacher), load_tokenizer(settings.teacher)
    assert marker.exists()
    assert (type(encoder).__name__, type(tokenizer).__name__) == ("MineModel", "MineTokenizer")
    student = build_student(settings.student, encoder, tokenizer, 2, (0.0, 0.0), 1)
    assert type(student) is type(encoder)
    save_student(student, encoder, tokenizer, tmp_path / "student")
    loaded, its_tokenizer = load_checkpoint(str(tmp_path / "student"), trusts_code=True)
    assert type(loaded).__name__ == "MineModel" and len(its_tokenizer) == len(tokenizer)
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    with pytest.raises(ExperimentError, match="run for a teacher only"):
        load_checkpoint(str(tmp_path / "student"))
    with pytest.raises(ExperimentError, match=r"cannot be loaded|head of masked"):
        load_masked_lm(settings.teacher, encoder)


def test_code_counts_in_the_fingerprint(folder, marker, parsed):
    """A changed line of a model's code answered with the result of the old one."""
    plain = fingerprint_teacher(parsed(folder).teacher)
    trusted = parsed(folder, teacher__trust_remote_code=True).teacher
    assert fingerprint_teacher(trusted) == plain  # there is no code
    give_code(folder, marker)
    seen = [fingerprint_teacher(trusted)]
    for file in ("modeling_mine.py", "sub/more.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        with (folder / file).open("a") as opened:
            opened.write("\n# more\n")
        seen.append(fingerprint_teacher(trusted))
    assert len(set(seen)) == 3
    assert not marker.exists()


def test_key_of_runs_without_code_is_that_of_before(folder, parsed):
    """Every finished run computed again, as the key knows of one more setting."""
    assert "trust_remote_code" not in _plain(parsed(folder), "fp32")["teacher"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["teacher=bert_base", "teacher.revision=null"], r"teacher\.revision=None must be a full"),
        (["teacher=bert_base", "teacher.revision=main"], r"teacher\.revision=main must be a full"),
        (["teacher=bert_base", f"teacher.revision={COMMIT[:-1]}"], "full commit of 40 digits"),
        (["teacher=bert_base", "teacher.weights=random"], "makes no difference"),
        (["teacher=minilm_l6"], "makes no difference"),
        (["teacher=bert_base", "task=next_passage"], "next_passage cannot be fine-tuned"),
    ],
)
def test_trust_without_a_pinned_commit_is_refused(overrides, message, settings_for):
    """Code of a branch that its owner can change after it was read."""
    overrides = ["student=l6h384", "task=none", *overrides, "teacher.trust_remote_code=true"]
    with pytest.raises(ExperimentError, match=message):
        settings_for(*overrides)


def test_trust_of_a_pinned_commit_is_allowed(settings_for):
    """A model of the hub with code of its own that can be used in no way."""
    assert settings_for(
        "teacher=bert_base", "student=l6h384", "task=none", "teacher.trust_remote_code=true"
    ).teacher.trust_remote_code


@pytest.mark.integration
def test_run_with_code_is_marked(folder, marker, tmp_path):
    """A result of foreign code that looks like every other; or a stage that cannot go on."""
    pytest.importorskip("gensim")
    give_code(folder, marker)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the model {i} and the teacher of {i * i}" for i in range(900)))
    command = [
        sys.executable, REPOSITORY / "run.py", "experiment=smoke", "teacher=custom",
        f"teacher.path={folder}", "teacher.trust_remote_code=true", "task=none",
        "recipe=teacher_assistant", "student.hidden_size=16", "student.num_attention_heads=4",
        "relation_set.num_relation_heads=4", "corpus=text_files", f"corpus.files=[{text}]",
        "corpus.block_length=32", f"outputs_dir={tmp_path}/outputs",
    ]  # fmt: skip
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "outputs" / "runs").glob("*/result.json")
    result = json.loads(file.read_text())
    assert result["status"] == "FINISHED"
    assert result["made_by"]["trust_remote_code"] == "true"
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    assert client.get_run(result["run_id"]).data.tags["trust_remote_code"] == "true"


# Commits of the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub that knows one commit of everything; what it was asked for."""
    asked = []

    def repo_info(_, hub_id, revision, repo_type, timeout):
        asked.append((hub_id, revision, repo_type))
        return types.SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: None)
    hub_commit.cache_clear()
    yield asked
    hub_commit.cache_clear()


def test_teacher_is_of_the_commit_that_is_recorded(hub, settings_for):
    """A branch that moves between the fingerprint and the weights, or a record without commit."""
    overrides = ["teacher=bert_base", "student=l6h384", "task=none"]
    settings = settings_for(*overrides, "teacher.revision=some/branch")
    assert source_of(settings.teacher) == ("google-bert/bert-base-uncased", COMMIT)
    name = f"google-bert/bert-base-uncased@{COMMIT}"
    assert fingerprint_teacher(settings.teacher) == name
    assert hub_commits(settings) == {"commit.teacher": name}
    assert hub == [("google-bert/bert-base-uncased", "some/branch", "model")]


def test_corpus_is_of_the_commit_that_is_recorded(hub, settings_for, monkeypatch, tmp_path):
    """Text of another commit than the one by which its cache is known."""
    read = []

    def load_dataset(path, name, **named):
        read.append((path, named["revision"]))
        return iter([{"text": "one"}])

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    other = COMMIT[::-1]
    settings = settings_for(
        "corpus=hf_dataset", "task=none",
        f"corpus.datasets=[{{path: a/b}},{{path: c/d,revision: {other}}},{{path: {tmp_path}}}]",
    )  # fmt: skip
    (tmp_path / "train.txt").write_text("one")
    fingerprint_corpus(settings.corpus)
    assert list(documents_module.read_documents(settings.corpus)) == ["one"] * 3
    assert read == [("a/b", COMMIT), ("c/d", other), (str(tmp_path), None)]
    assert hub_commits(settings) == {"commit.corpus": f"a/b@{COMMIT} c/d@{other}"}
    assert hub == [("a/b", None, "dataset")]  # a commit needs no asking


def test_commits_of_tasks_are_recorded(hub, settings_for, tmp_path):
    """Scores of which nobody knows on which version of the data they are."""
    settings = settings_for("task=[sst2,mlqa,next_passage]")
    assert hub_commits(settings) == {
        "commit.task.sst2": f"nyu-mll/glue@{COMMIT}",
        "commit.task.mlqa": f"facebook/mlqa@{COMMIT} rajpurkar/squad@{COMMIT}",
    }
    assert hub_commits(settings_for("task=sst2", f"data_root={tmp_path}")) == {}
