"""The key of a run, and what is kept out of logs."""

import dataclasses
import subprocess

import pytest

from minilm_exp import provenance
from minilm_exp.errors import ExperimentError
from minilm_exp.provenance import fingerprint_files, fingerprint_model, run_key
from minilm_exp.redaction import redact
from minilm_exp.settings import Recipe, flatten

FINGERPRINTS = {"teacher": "t", "student": "s", "corpus": "c"}
NO_RESULT_DEPENDS_ON = {
    "outputs_dir",
    "data_root",
    "resume",
    "rerun",
    "trial_values",
    "num_trials",
    "export",
    "push_to",
    "report",
    "candidates",
    "profile",
    "notes",
    "training.logging_steps",
    "training.evaluation_steps",
    "training.checkpoint_steps",
    "task_training.checkpoint_steps",
    "training.keep_checkpoints",
}
# What stands behind these names and paths is in the fingerprints.
INPUTS = {
    "teacher.name",
    "teacher.path",
    "teacher.hub_id",
    "teacher.revision",
    "teacher.package",
    "teacher.trust_remote_code",
    "student.path",
    "student.config",
    "corpus.files",
    "corpus.datasets",
}
TASK_INPUTS = ("data", "train_data", "files", "pooling")  # which is that of similarity


def is_neutral(name):
    group, *rest = name.split(".")
    if group == "tasks" and rest[1] in TASK_INPUTS:
        return True
    # What only tasks that write read: keys are older than these.
    if group == "tasks" and rest[1] == "target_column" and rest[0] != "xsum":
        return True
    if name.startswith(("task_training.families.cnn_", "task_training.families.squad_qg")):
        return True
    # The shape that a budget chose counts, and the pooling where it is read.
    if name == "teacher.pooling" or name.startswith("student.budget."):
        return True
    return group in ("runtime", "tracking") or name in NO_RESULT_DEPENDS_ON | INPUTS


def key_of(settings, precision="fp32", **fingerprints):
    return run_key(settings, precision, FINGERPRINTS | fingerprints)


def changed(value):
    if value is None:
        return "x"
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list):
        return [*value, "qv"]
    return value + 1 if isinstance(value, int) else value * 1.5 + 0.01


def leaves(node, prefix=""):
    """Every setting with its dotted name, those that are null too."""
    if prefix == "stages":  # made from recipe.stages
        return
    if dataclasses.is_dataclass(node):
        inner = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    elif isinstance(node, dict):
        inner = node
    else:
        yield prefix, node
        return
    for name, value in inner.items():
        yield from leaves(value, f"{prefix}.{name}" if prefix else name)


def with_value(settings, name, value):
    """A copy of the settings with one value replaced; nothing is checked again."""

    def replaced(node, names):
        first, *rest = names
        inner = node[first] if isinstance(node, dict) else getattr(node, first)
        new = replaced(inner, rest) if rest else value
        if isinstance(node, dict):
            return node | {first: new}
        return dataclasses.replace(node, **{first: new})

    return replaced(settings, name.split("."))


@pytest.fixture
def settings(settings_for):
    """Settings with every kind of task, and with something in every group."""
    return settings_for(
        "teacher=tiny_random",
        "student=tiny",
        "student.intermediate_size=64",
        "student.embedding_size=48",
        "runtime.microbatch_size=8",
        "runtime.num_threads=1",
        "baseline=bert_base",
        "task=[next_passage,mnli,mlqa,text_classification,xsum]",
        "tasks.text_classification.files.train=train.csv",
        "task_training=minilmv2",
    )


def test_key_follows_every_setting_that_can_change_a_result(settings):
    """A changed setting answered with an old result, or a run repeated for a thread more."""
    key = key_of(settings)
    names = dict(leaves(settings))
    assert len(names) > 200
    # A new optional field, null by default, that the key does not know of.
    assert set(flatten(settings)) <= set(names)
    wrong = []
    for name, value in names.items():
        if name == "training.precision":
            continue
        is_changed = key_of(with_value(settings, name, changed(value))) != key
        if is_changed == is_neutral(name):
            wrong.append(name)
    assert wrong == []


def test_another_task_is_another_run(settings):
    """Scores on one task answered with those on another."""
    fewer = {name: task for name, task in settings.tasks.items() if name != "mnli"}
    assert key_of(dataclasses.replace(settings, tasks=fewer)) != key_of(settings)


# Runs that only fine-tune


def of_finetuning(settings, *models):
    recipe = Recipe("finetune", list(models), True)
    tasks = {name: task for name, task in settings.tasks.items() if name != "next_passage"}
    return dataclasses.replace(settings, recipe=recipe, tasks=tasks)


def finetuning_key(settings, inputs, precision="fp32"):
    return run_key(settings, precision, {name: name for name in inputs})


def test_distillation_does_not_count_where_there_is_none(settings):
    """A checkpoint fine-tuned once more because a setting changed that nothing read."""
    settings = of_finetuning(settings, "student")
    inputs = ["student", "task.mnli"]
    key = finetuning_key(settings, inputs)
    used = ("student", "task_training", "tasks", "recipe", "baseline", "seed")
    wrong = []
    for name, value in leaves(settings):
        if is_neutral(name):
            continue
        is_changed = finetuning_key(with_value(settings, name, changed(value)), inputs) != key
        if is_changed != name.startswith(used):
            wrong.append(name)
    assert wrong == []
    assert finetuning_key(settings, inputs, "bf16") != key


def test_fine_tuned_teacher_counts_and_the_corpus_where_it_is_read(settings):
    """One teacher's scores for another, or a task made from one corpus for that from another."""
    tasks = settings.tasks
    settings = of_finetuning(settings, "teacher")
    inputs = ["student", "teacher", "task.mnli"]
    key = finetuning_key(settings, inputs)
    other = with_value(settings, "teacher.initializer_range", 0.5)
    assert finetuning_key(other, inputs) != key
    other = with_value(settings, "corpus.block_length", 64)
    assert finetuning_key(other, inputs) == key
    both = [
        dataclasses.replace(one, tasks=one.tasks | {"next_passage": tasks["next_passage"]})
        for one in (settings, other)
    ]
    with_corpus = [*inputs, "corpus"]
    assert finetuning_key(both[0], with_corpus) != finetuning_key(both[1], with_corpus)


def test_student_does_not_count_where_the_teacher_alone_is_fine_tuned(settings):
    """A teacher scored once more because another student stood in the config beside it."""
    settings = of_finetuning(settings, "teacher")
    inputs = ["student", "teacher", "task.mnli"]
    other = with_value(settings, "student.num_layers", 3)
    assert finetuning_key(other, inputs) == finetuning_key(settings, inputs)


def test_content_of_a_tasks_data_counts(settings):
    """Scores of an earlier version of a data set, or of a file that was edited."""
    key = key_of(settings, **{"task.mnli": "m"})
    assert key != key_of(settings)
    assert key != key_of(settings, **{"task.mnli": "other"})


def test_test_split_counts(settings):
    """Scores of the test split asked for, and a finished run without them given."""
    assert key_of(with_value(settings, "task_training.test", True)) != key_of(settings)


# Names and content of inputs


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_names_of_inputs_do_not_count(name, settings):
    """A moved file or folder that starts a finished run again."""
    value = ["elsewhere"] if name == "corpus.files" else "elsewhere"
    assert key_of(with_value(settings, name, value)) == key_of(settings)


def test_resolved_precision_counts_and_not_the_asked_one(settings):
    """Asking for auto on two machines taken for one result, or auto and fp32 for two."""
    for asked in ("auto", "fp32", "bf16"):
        other = with_value(settings, "training.precision", asked)
        assert key_of(other) == key_of(settings)
    assert key_of(settings, "bf16") != key_of(settings, "fp32")


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_content_of_inputs_counts(name, settings):
    """A changed corpus or checkpoint answered with the result of the old one."""
    assert key_of(settings, **{name: "other"}) != key_of(settings)


def test_results_version_counts(settings, monkeypatch):
    """Results of code that computed something else."""
    key = key_of(settings)
    monkeypatch.setattr(provenance, "RESULTS_VERSION", provenance.RESULTS_VERSION + 1)
    assert key_of(settings) != key


def test_key_is_stable(settings, settings_for):
    """A key with a time, an address or the order of a dict in it."""
    assert key_of(settings) == key_of(settings)
    assert len(key_of(settings)) == 64
    assert key_of(settings_for("seed=2")) != key_of(settings_for("seed=3"))
    assert key_of(settings_for("relations=kk_vv")) != key_of(settings_for("relations=qk_vv"))


def test_spelling_of_a_number_does_not_count(settings_for):
    """1e-3 and 0.001 taken for two runs."""
    first, second = (settings_for(f"training.learning_rate={x}") for x in ("1e-3", "0.001"))
    assert key_of(first) == key_of(second)


# Content of files


def test_fingerprint_of_files(tmp_path):
    """A fingerprint of names or times, or one that misses the last byte."""
    first, second = tmp_path / "a", tmp_path / "b"
    for path in (first, second):
        path.write_bytes(b"content")
    assert fingerprint_files([first]) == fingerprint_files([second])
    assert fingerprint_files([first]) != fingerprint_files([first, second])
    second.write_bytes(b"contenu")
    assert fingerprint_files([first]) != fingerprint_files([second])
    assert fingerprint_files([first, second]) != fingerprint_files([second, first])
    with pytest.raises(ExperimentError, match="gone cannot be read"):
        fingerprint_files([tmp_path / "gone"])


def test_fingerprint_of_a_model_leaves_other_files_out(tmp_path):
    """A README or a log that makes a new teacher of the old one."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = fingerprint_model(tmp_path)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "onnx").mkdir()
    assert fingerprint_model(tmp_path) == before
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001.safetensors")
    assert fingerprint_model(tmp_path) != before


# Secrets


@pytest.mark.parametrize(
    "text, secret",
    [
        ("http://user:hunter2@host:5000/path", "hunter2"),
        ("tracking.uri=postgresql+psycopg://user:hunter2@host/db", "hunter2"),
        ("mysql://user:hun@ter2@host/db", "ter2"),
        ("HTTPS://USER:hunter2@HOST", "hunter2"),
        ("http://:hunter2@host", "hunter2"),
        ("see http://user:hunter2@host, and http://u:other@host", "other"),
        ("https://host/path?token=hunter2&x=1", "hunter2"),
        ("token: hunter2", "hunter2"),
        ("password = hunter2", "hunter2"),
        ('{"password": "hunter2"}', "hunter2"),
        ("{'api_key': 'hunter2'}", "hunter2"),
        ("apikey=hunter2", "hunter2"),
        ("MLFLOW_TRACKING_PASSWORD=hunter2", "hunter2"),
        ("got hf_AbCdEfGh12345678 back", "AbCdEfGh12345678"),
    ],
)
def test_secrets_are_redacted(text, secret):
    """A password in a log, a model card or the tracking database."""
    redacted = redact(text)
    assert secret not in redacted
    assert "***" in redacted
    assert redact(redacted) == redacted


def test_address_stays_readable():
    """A message that no longer says which server."""
    assert redact("at http://user:hunter2@host:5000/x now") == "at http://user:***@host:5000/x now"
    assert redact("https://host/p?token=hunter2&x=1") == "https://host/p?token=***&x=1"


def test_outputs_do_not_make_a_tree_dirty(tmp_path, monkeypatch):
    """Tables that refuse every run, as outputs/ was cleared; or a changed module that passes."""
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    for name in ("outputs/.gitkeep", "module.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "outputs" / ".gitkeep").unlink()
    state = provenance.git_state.__wrapped__()
    assert state["dirty"] == "false" and state["diff"] == "" and len(state["commit"]) == 40
    (tmp_path / "module.py").write_text("changed = True")
    state = provenance.git_state.__wrapped__()
    assert state["dirty"] == "true" and "changed" in state["diff"]
    git("checkout", "module.py")
    (tmp_path / "new.py").touch()
    assert provenance.git_state.__wrapped__()["dirty"] == "true"


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
    ],
)
def test_secrets_of_the_environment_are_redacted(name, monkeypatch):
    """A token that a library puts in its error message as it is."""
    monkeypatch.setenv(name, "correct-horse")
    assert redact("refused: correct-horse is wrong") == "refused: *** is wrong"
    monkeypatch.setenv(name, "")
    assert redact("refused") == "refused"


@pytest.mark.parametrize(
    "text",
    [
        "tokenizer: bert",
        "num_tokens=5",
        "tokens: 12 a second",
        "pad_token_id=0",
        "step 3: loss 0.5",
        "sqlite:////home/someone/mlflow.db",
        "http://localhost:5000/#/experiments/1",
        "see https://host:8080/a@b for more",
        "file:///data/a:b@c/text.txt",
        "the secret of good distillation",
        "hf_hub download",
        "2 tokens of the vocabulary, at most 30522",
        "12:30:01 a@b.c",
        "C:\\outputs\\runs",
    ],
)
def test_ordinary_text_survives(text):
    """Settings and messages with holes in them."""
    assert redact(text) == text
