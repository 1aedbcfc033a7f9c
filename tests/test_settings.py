"""The config: everything that composes, and everything that is refused before a run starts."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from minilm_exp.errors import ExperimentError
from minilm_exp.parsing import parse
from minilm_exp.settings import as_dict, flatten
from minilm_exp.task_settings import Task

CONF = REPOSITORY / "conf"
MANDATORY = {
    "experiment=compress": [
        "teacher.path={folder}", "corpus.files=[{text}]", "student=l3h384",
        "student.hidden_size=20", "student.num_attention_heads=4",
    ],
    "student=budget": [
        "student.num_layers=3", "student.hidden_size=384", "student.num_attention_heads=12",
    ],
    "task=teacher_labels": ["teacher.head=own"],
    "teacher=custom": ["teacher.path={folder}", "corpus.block_length=64",
                       "task_training.max_length=64", "student=tiny"],
    "layer_selection=explicit": ["layer_selection.teacher_layer=2"],
    "corpus=text_files": ["corpus.files=[{text}]"],
    "corpus=hf_dataset": ["corpus.datasets=[{{path: some/name}}]"],
    "corpus=pretokenized": ["corpus.files=[{text}]", "task=none"],
    "objective=intermediate_layers": [
        "objective.terms.modules.modules=[[encoder.layer.0,encoder.layer.0]]"
    ],
    "tracking=server": ["tracking.uri=http://localhost:5000"],
    "recipe=finetune": ["student.path={folder}"],
    "task=text_classification": ["tasks.text_classification.files.train={text}"],
    # The default teacher is narrower than the layers below need.
    "student=l6h768": ["teacher=bert_base"],
    "student=l12h768": ["teacher=bert_base"],
}  # fmt: skip
RELATION_SETS = {
    "qq": ["qq"],
    "kk": ["kk"],
    "vv": ["vv"],
    "qq_kk": ["qq", "kk"],
    "qq_vv": ["qq", "vv"],
    "kk_vv": ["kk", "vv"],
    "qk_vv": ["qk", "vv"],
    "qq_kk_vv": ["qq", "kk", "vv"],
    "all": ["qq", "kk", "vv", "qk", "kq", "qv", "vq", "kv", "vk"],
}


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


# What sweeps are made of is no group of a run's (tests/test_sweeping.py, tests/test_launchers.py).
OF_SWEEPS = {"hydra", "sweeping"}
GROUPS = sorted(
    path.name for path in CONF.iterdir() if path.is_dir() and path.name not in OF_SWEEPS
)
GLUE = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
CHOICES = [f"{group}={name}" for group in GROUPS for name in options(group)]
EXPERIMENTS = options("experiment")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One.\n\nTwo.\n")
    return path


def write_config(folder, **changes):
    facts = {
        "model_type": "bert",
        "vocab_size": 30522,
        "num_hidden_layers": 2,
        "hidden_size": 40,
        "num_attention_heads": 4,
        "intermediate_size": 72,
        "max_position_embeddings": 512,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: value for name, value in facts.items() if value is not None})
    (folder / "config.json").write_text(text)
    return folder


# What is accepted


# Experiments that are of no paper.
OURS = ("compress", "demo", "smoke")


@pytest.mark.parametrize("choice", CHOICES)
def test_every_option_of_every_group_parses(choice, settings_for, text_file, tmp_path):
    """An option with a key of its own, a missing key, or a value that its defaults forbid."""
    folder = write_config(tmp_path / "model")
    more = [text.format(folder=folder, text=text_file) for text in MANDATORY.get(choice, [])]
    settings = settings_for(choice, *more)
    assert settings.outputs == tmp_path / "outputs"


def test_option_names_agree_with_their_content(settings_for):
    """A copied option file whose content was not changed with its name."""
    for name in options("teacher"):
        if name != "custom":
            assert settings_for(f"teacher={name}").teacher.name == name
    for name in options("student"):
        choice = f"student={name}"
        settings = settings_for(choice, *MANDATORY.get(choice, []))
        assert settings.student.num_attention_heads == 12
        if name not in ("demo", "tiny", "budget"):
            assert settings.student_name == name
            assert settings.student.init == "random"


def test_changed_shape_changes_the_name_of_the_student(settings_for):
    """Runs of a changed student that are listed under the name of the option."""
    assert settings_for("student=l6h384", "student.num_layers=5").student_name == "l5h384"


@pytest.mark.parametrize(
    "overrides, init",
    [
        ([], "teacher_layers"),
        (["student.num_layers=6"], "teacher_layers"),
        (["student.num_layers=6", "layer_selection=upper_middle"], "random"),
        (
            ["student.num_layers=6", "layer_selection=upper_middle", "student.init_layers=whole"],
            "teacher_layers",
        ),
        (["teacher=bert_base", "student.init_layers=whole"], "random"),
        (["sweeps=teacher_layer", "experiment=minilmv2_bert_base_l6h384"], "random"),
        (["student.num_layers=7"], "random"),
        (["student.hidden_size=192"], "random"),
        (["student.num_attention_heads=6"], "random"),
        (["student.intermediate_size=384"], "random"),
        (["teacher=bert_base"], "random"),
        (["student.init=random"], "random"),
    ],
)
def test_auto_takes_teacher_layers_where_all_sizes_agree(overrides, init, settings_for):
    """Layers of other sizes copied, or a default that trains from nothing."""
    settings = settings_for("student=demo", *overrides)
    assert settings.student.init == init
    asked = "student.init=random" not in overrides
    assert any("student.init=auto" in note for note in settings.notes) == asked


@pytest.mark.parametrize("spelling", ["relations", "relation_set"])
@pytest.mark.parametrize("name", options("relation_set"))
def test_both_spellings_choose_the_relations(name, spelling, settings_for):
    """A short name that composes and changes nothing, so that a grid repeats one run."""
    settings = settings_for(f"{spelling}={name}")
    assert settings.relation_set.pairs == RELATION_SETS[name]
    assert settings.relation_set.name == name


@pytest.mark.parametrize("spelling", ["relations", "relation_set"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_command_line_beats_the_relations_of_an_experiment(
    experiment, spelling, settings_for, text_file, tmp_path
):
    """An experiment that keeps its own relations whatever is asked for."""
    choice, folder = f"experiment={experiment}", write_config(tmp_path / "model")
    more = [text.format(folder=folder, text=text_file) for text in MANDATORY.get(choice, [])]
    settings = settings_for(choice, *more, f"{spelling}=kk_vv")
    assert settings.relation_set.pairs == ["kk", "vv"]


def test_an_experiment_file_chooses_relations(compose_config, tmp_path):
    """`override /relations` in a file of one's own without effect."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /relations: vv\n"
    )
    config = compose_config(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert list(config.relation_set.pairs) == ["vv"]


def test_pairs_can_be_listed_on_the_command_line(settings_for):
    """A list that is kept as text, or merged with the default pairs."""
    settings = settings_for("relation_set.pairs=[qv,vk]")
    assert settings.relation_set.pairs == ["qv", "vk"]
    assert settings.relation_set.name == "qv_vk"
    assert settings.objective.terms["relations"].state_pairs == [
        ("query", "value"),
        ("value", "key"),
    ]


def test_default_relations_are_those_of_the_second_paper(settings_for):
    """A default that is not Q-Q, K-K and V-V."""
    assert settings_for().relation_set.pairs == ["qq", "kk", "vv"]


# The papers


@pytest.mark.parametrize(
    "teacher, layer, heads",
    [
        ("bert_base", 12, 48),
        ("roberta_base", 12, 48),
        ("xlmr_base", 12, 48),
        ("bert_large", 21, 64),
        ("bert_large_wwm", 21, 64),
        ("roberta_large", 19, 64),
        ("xlmr_large", 19, 64),
    ],
)
def test_layer_and_heads_of_published_teachers(teacher, layer, heads, settings_for):
    """A teacher that is distilled at another layer or granularity than in the paper."""
    settings = settings_for(f"teacher={teacher}")
    assert settings.layer_selection.teacher_layer == layer
    assert settings.relation_set.num_relation_heads == heads
    if teacher.endswith(("large", "wwm")):
        upper = settings_for(f"teacher={teacher}", "layer_selection=upper_middle")
        assert upper.layer_selection.teacher_layer == layer
    last = settings_for(f"teacher={teacher}", "layer_selection=last")
    assert last.layer_selection.teacher_layer == last.teacher.num_layers


COMMON_PAPER_VALUES = {
    "training.max_steps": 400_000,
    "training.warmup_steps": 4000,
    "training.adam_beta1": 0.9,
    "training.weight_decay": 0.01,
    "training.hidden_dropout": 0.1,
    "training.attention_dropout": 0.1,
    "corpus.block_length": 512,
    "student.num_attention_heads": 12,
    "student.init": "random",
    "teacher.weights": "pretrained",
    "recipe.models": ["student", "teacher"],
    "baseline.name": "bert_base",
    "task_training.num_seeds": 4,
    "task_training.search": "none",
}
# Of both papers' main tables.
PAPER_TASKS = {"squad_v2", "mnli", "qnli", "qqp", "rte", "sst2", "mrpc", "cola"}
V1_VALUES = {
    "training.batch_size": 1024,
    "training.learning_rate": 5e-4,
    "training.adam_beta2": 0.999,
    "relation_set.pairs": ["qk", "vv"],
    "relation_set.num_relation_heads": 12,
    "layer_selection.teacher_layer": 12,
    "task_training.families.glue.grid.epochs": [3, 4, 5],
}
V2_VALUES = {
    "training.batch_size": 256,
    "training.learning_rate": 6e-4,
    "training.adam_beta2": 0.999,
    "relation_set.pairs": ["qq", "kk", "vv"],
    "task_training.families.glue.grid.epochs": [3, 5, 10],
}
LARGE_BERT = {"layer_selection.teacher_layer": 21, "relation_set.num_relation_heads": 64}
PUBLISHED = {
    "minilmv1_bert_base_l6h768": V1_VALUES,
    "minilmv2_bert_base_l6h384": V2_VALUES
    | {"layer_selection.teacher_layer": 12, "relation_set.num_relation_heads": 48},
    "minilmv2_bert_large_l6h768": V2_VALUES | LARGE_BERT,
    "minilmv2_bert_large_l12h768": V2_VALUES | LARGE_BERT | {"training.adam_beta2": 0.98},
    "minilmv2_roberta_large_l12h384": V2_VALUES
    | {"layer_selection.teacher_layer": 19, "relation_set.num_relation_heads": 64},
}


@pytest.mark.parametrize("experiment", [e for e in EXPERIMENTS if e not in OURS])
def test_published_experiments_have_the_values_of_the_papers(experiment, settings_for):
    """A run that is called a published one and is not."""
    settings = settings_for(f"experiment={experiment}")
    flat = flatten(settings)
    expected = COMMON_PAPER_VALUES | PUBLISHED[experiment]
    assert {name: flat[name] for name in expected} == expected
    _, teacher, student = experiment.split("_", 1)[0], *experiment.split("_", 1)[1].rsplit("_", 1)
    assert (settings.teacher.name, settings.student_name) == (teacher, student)
    assert set(settings.tasks) == PAPER_TASKS


# Tasks


@pytest.mark.parametrize("name", options("task"))
def test_task_options_give_the_task_of_their_name(name, settings_for, text_file):
    """A copied option that trains under the name, or on the data, of the one it was copied from."""
    choice = f"task={name}"
    settings = settings_for(choice, *(m.format(text=text_file) for m in MANDATORY.get(choice, [])))
    together = {"none": [], "glue": GLUE, "next_passage_smoke": ["next_passage"]}
    assert list(settings.tasks) == together.get(name, [name])
    for one, task in settings.tasks.items():
        if isinstance(task, Task) and task.data is not None:
            folder = task.data.folder.replace("/{language}", "")
            # paws-x and squad_v2 are spelt as on the hub.
            parts = re.split(r"[-_/]", folder)
            own = re.sub("_similarity|_zhao|_", "", one)
            assert "".join(parts).endswith(own), (one, folder)
            assert ("{language}" in task.data.folder) == bool(task.all_languages)
            assert task.train_language in (task.all_languages or ["en"])


def test_glue_is_the_eight_tasks_of_the_papers(settings_for):
    """A mean with WNLI in it, which the papers leave out, or one without a task that is theirs."""
    settings = settings_for("task=glue")
    assert len(settings.tasks) == 8
    assert set(settings.tasks) == {
        "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"
    }  # fmt: skip
    scores = {name: task.score for name, task in settings.tasks.items()}
    assert scores == dict.fromkeys(GLUE, "accuracy") | {
        "cola": "matthews",
        "mnli": "accuracy_matched",
        "stsb": "pearson",
    }


def test_tasks_can_be_listed(settings_for):
    """A second task in place of the first, or next to the default one."""
    assert list(settings_for("task=[mrpc,rte]").tasks) == ["mrpc", "rte"]
    assert list(settings_for("task=[glue,squad_v2]").tasks) == [*GLUE, "squad_v2"]
    assert settings_for("task=none").tasks == {}


def test_unknown_task_is_refused(compose_config):
    """A misspelt task that runs as none."""
    with pytest.raises(MissingConfigException, match="nonsense"):
        compose_config("task=nonsense")


V2_RATES, V1_RATES = [1e-5, 1.5e-5, 2e-5, 3e-5, 5e-5], [2e-5, 3e-5, 4e-5, 5e-5]
CROSS_LINGUAL_RATES = [3e-5, 4e-5, 5e-5, 6e-5]
# MiniLMv2, appendix C; MiniLM, appendices B and C: learning rates, epochs, batch size.
PAPER_GRIDS = {
    "minilmv2": {
        **dict.fromkeys(GLUE, (V2_RATES, [3, 5, 10], 32)),
        "cola": (V2_RATES, [25], 32),
        "squad_v2": ([3e-5, 6e-5, 8e-5, 9e-5], [3], 32),
        "squad": ([3e-5, 6e-5, 8e-5, 9e-5], [3], 32),
        "xnli": (CROSS_LINGUAL_RATES, [10], 64),
        "mlqa": (CROSS_LINGUAL_RATES, [4], 32),
    },
    "minilmv1": {
        **dict.fromkeys(GLUE, (V1_RATES, [3, 4, 5], 32)),
        **dict.fromkeys(["cola", "rte", "mrpc"], (V1_RATES, [3, 4, 5, 10], 32)),
        "squad_v2": ([6e-5], [3], 32),
        "squad": ([6e-5], [3], 32),
        "xnli": (CROSS_LINGUAL_RATES, [5], 128),
        "mlqa": (CROSS_LINGUAL_RATES, [3], 32),
    },
}
NUM_CELLS = {
    "minilmv2": {"mnli": 15, "cola": 5, "squad": 4, "squad_v2": 4, "xnli": 4, "mlqa": 4},
    "minilmv1": {"mnli": 12, "cola": 16, "rte": 16, "mrpc": 16, "squad": 1, "xnli": 4, "mlqa": 4},
}


@pytest.mark.parametrize("paper", PAPER_GRIDS)
def test_grids_are_those_of_the_papers(paper, settings_for):
    """A search of other cells than the paper's, or of as many as another paper's."""
    tasks = ",".join(PAPER_GRIDS[paper])
    settings = settings_for(f"task=[{tasks}]", f"task_training={paper}")
    training = settings.task_training
    assert training.num_seeds == 4
    searched = dataclasses.replace(training, search="grid")
    for name, (rates, epochs, batch_size) in PAPER_GRIDS[paper].items():
        task = settings.tasks[name]
        cells = searched.cells(name, task)
        found = {(cell.learning_rate, cell.epochs) for cell in cells}
        assert found == {(rate, number) for rate in rates for number in epochs}, name
        assert {cell.batch_size for cell in cells} == {batch_size}, name
        assert len(cells) == len(found) == NUM_CELLS[paper].get(name, len(rates) * len(epochs))
        # The one that stands alone without a search is one of them.
        [alone] = training.cells(name, task)
        assert alone in cells, name


@pytest.mark.parametrize("paper", PAPER_GRIDS)
def test_lengths_are_those_of_the_papers(paper, settings_for):
    """Texts cut off earlier than in the paper."""
    settings = settings_for("task=[mnli,squad_v2,xnli,mlqa]", f"task_training={paper}")
    found = {}
    for name, task in settings.tasks.items():
        [cell] = settings.task_training.cells(name, task)
        found[name] = (cell.max_length, cell.doc_stride)
        assert (cell.max_train_examples, cell.max_validation_examples) == (None, None)
        assert (cell.warmup_ratio, cell.weight_decay, cell.hidden_dropout) == (0.1, 0.01, 0.1)
    xnli = {"minilmv2": 256, "minilmv1": 128}[paper]
    assert found == {
        "mnli": (128, None),
        "squad_v2": (384, 128),
        "xnli": (xnli, None),
        "mlqa": (512, 128),
    }


def test_what_is_given_is_not_searched(settings_for):
    """A learning rate that was asked for, and five others tried."""

    def cells(*overrides, name="rte"):
        choices = [f"task={name}", "task_training=minilmv2", "task_training.search=grid"]
        settings = settings_for(*choices, *overrides)
        found = settings.task_training.cells(name, settings.tasks[name])
        return [(cell.learning_rate, cell.epochs, cell.batch_size) for cell in found]

    given = "task_training.learning_rate=7e-5"
    assert cells(given) == [(7e-5, 3, 32), (7e-5, 5, 32), (7e-5, 10, 32)]
    assert cells(given, "task_training.epochs=2") == [(7e-5, 2, 32)]
    assert cells("task_training.epochs=2") == [(rate, 2, 32) for rate in V2_RATES]
    assert cells(given, name="cola") == [(7e-5, 25, 32)]
    batches = "task_training.families.glue.grid.batch_size=[8,16]"
    assert cells(given, "task_training.epochs=2", f"+{batches}") == [(7e-5, 2, 8), (7e-5, 2, 16)]


def test_values_of_the_command_line_beat_exceptions_and_families(settings_for):
    """A smoke run whose task keeps its own length, or all tasks that take that of one."""
    choices = ["task=[next_passage,mrpc]", "task_training=demo"]

    def lengths(*overrides):
        settings = settings_for(*choices, *overrides)
        return [
            settings.task_training.cells(name, task)[0].max_length
            for name, task in settings.tasks.items()
        ]

    assert lengths() == [64, 128]
    assert lengths("task_training.families.glue.max_length=100") == [64, 100]
    assert lengths("task_training.exceptions.next_passage.max_length=50") == [50, 128]
    assert lengths("task_training.max_length=32") == [32, 32]


def test_seeds_of_fine_tunings_are_their_own(settings_for):
    """Four times the same fine-tuning; or seed=2 that repeats three of seed=1."""
    training = settings_for("task=mrpc", "task_training=minilmv2").task_training
    seeds = [training.seeds(seed) for seed in range(1, 11)]
    assert [given[0] for given in seeds] == list(range(1, 11))
    assert len({seed for given in seeds for seed in given}) == 40


def test_data_root_becomes_absolute(settings_for, monkeypatch, tmp_path):
    """Data looked for below a folder named ~, or wherever the process stands later."""
    assert settings_for("task=mrpc").data_root is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings_for("task=mrpc", "data_root='~/glue'").data_root == str(tmp_path / "glue")
    monkeypatch.chdir(tmp_path)
    assert settings_for("task=mrpc", "data_root=glue").data_root == str(tmp_path / "glue")


# Only fine-tuning


def test_only_the_models_that_are_fine_tuned_must_fit(settings_for, tmp_path):
    """A checkpoint refused for a teacher, relations or a corpus that it never meets."""
    folder = write_config(
        tmp_path / "mine",
        model_type="roberta",
        vocab_size=31000,
        max_position_embeddings=514,
        hidden_size=20,
    )
    given = ["recipe=finetune", "task=mrpc", f"student.path={folder}"]
    settings = settings_for(*given, "corpus=pretokenized", "corpus.files=[]")
    assert settings.recipe.models == ["student"]
    assert (settings.student.num_layers, settings.student.hidden_size) == (2, 20)
    # The positions are the checkpoint's: 512 of 514, whatever teacher stands beside it.
    settings_for(*given, "teacher=tiny_random", "task_training.max_length=512")
    with pytest.raises(ExperimentError, match=r"task_training\.max_length=513 .*512 positions"):
        settings_for(*given, "teacher=modernbert_base", "task_training.max_length=513")


def test_teacher_alone_needs_no_student(settings_for):
    """recipe.models=[teacher] refused for want of a student.path."""
    settings = settings_for("recipe=finetune", "task=mrpc", "recipe.models=[teacher]")
    assert settings.student.path is None
    with pytest.raises(ExperimentError, match=r"task_training\.max_length=513 .*512 positions"):
        settings_for(
            "recipe=finetune", "task=mrpc", "recipe.models=[teacher]",
            "task_training.max_length=513",
        )  # fmt: skip


@pytest.mark.parametrize(
    "overrides, named",
    [
        (["task=none", "student.path={folder}"], ["needs a task", "task=NAME"]),
        (["task=mrpc"], ["student.path=FOLDER", "recipe.models=[teacher]"]),
        (["task=mrpc", "recipe.models=[student,teacher]"], ["student.path=FOLDER"]),
        (
            ["task=mrpc", "student.path={folder}", "recipe.models=[student,undistilled]"],
            ["recipe.models=[undistilled]"],
        ),
        (
            ["task=mrpc", "student.path={folder}", "recipe.models=[nonsense]"],
            ["recipe.models=nonsense", "student", "teacher"],
        ),
        (["task=mrpc", "student.path={folder}", "recipe.models=[]"], ["recipe.models"]),
        (["task=mrpc", "student.path={folder}/nowhere"], ["student.path", "nowhere"]),
        (
            ["task=next_passage", "student.path={folder}", "corpus=text_files", "corpus.files=[]"],
            ["corpus.files"],
        ),
    ],
    ids=["no task", "no checkpoint", "no checkpoint beside the teacher", "undistilled",
         "unknown model", "no model", "no folder", "no corpus"],
)  # fmt: skip
def test_finetuning_that_cannot_be_is_refused(overrides, named, settings_for, tmp_path):
    """A recipe that ends with a traceback once the models are loaded."""
    folder = write_config(tmp_path / "mine")
    with pytest.raises(ExperimentError) as caught:
        settings_for("recipe=finetune", *(text.format(folder=folder) for text in overrides))
    assert all(word in str(caught.value) for word in named), str(caught.value)


# What is refused

WRONG_VALUES = {
    "misspelt": (["+training.max_step=3"], "training.max_step"),
    "misspelt group": (["+trainning.max_steps=3"], "trainning"),
    "misspelt task": (["+tasks.next_pasage.version=1"], "tasks.next_pasage"),
    "text for a number": (["training.max_steps=many"], "training.max_steps"),
    "fraction of a step": (["training.max_steps=2.5"], "training.max_steps"),
    "list for a number": (["training.batch_size=[1,2]"], "training.batch_size"),
    "text for yes or no": (["corpus.packing=perhaps"], "corpus.packing"),
    "null for a number": (["training.batch_size=null"], "training.batch_size"),
    "teacher heads": (
        ["relation_set.num_relation_heads=5"],
        "relation_set.num_relation_heads=5 does not divide the teacher's hidden size 384",
    ),
    "student heads": (
        ["teacher=bert_large", "student=l6h384", "relation_set.num_relation_heads=512"],
        "relation_set.num_relation_heads=512 does not divide the student's hidden size 384",
    ),
    "layer 0": (
        ["layer_selection=explicit", "layer_selection.teacher_layer=0"],
        "layer_selection.teacher_layer=0",
    ),
    "layer from the end": (
        ["layer_selection=explicit", "layer_selection.teacher_layer=-1"],
        "layer_selection.teacher_layer=-1",
    ),
    "layer above the last": (
        ["layer_selection=explicit", "layer_selection.teacher_layer=7"],
        "layer_selection.teacher_layer=7 is outside 1..6",
    ),
    "no layer": (["layer_selection=explicit"], "layer_selection.teacher_layer"),
    "no teacher path": (["teacher=custom"], "teacher.path"),
    "no files": (["corpus=text_files"], "corpus.files"),
    "no data sets": (["corpus=hf_dataset"], "corpus.datasets"),
    "no server": (["tracking=server"], "tracking.uri"),
    "files that are not there": (["corpus.files=[/nowhere/*.txt]"], "/nowhere/*.txt"),
    "no such pair": (["relation_set.pairs=[qq,qx]"], "relation_set.pairs"),
    "start of random weights": (
        ["student=demo", "student.hidden_size=192", "student.init_layers=first"],
        "student.init_layers=first makes no difference",
    ),
    "no such start": (["student.init_layers=middle"], "student.init_layers=middle"),
    "start of other length": (["student.init_layers=[1,2]"], "names 2 layers"),
    "start above the teacher": (["student.init_layers=[1,2,9]"], "teacher has 1..6"),
    "layers of a random start": (
        ["student=l3h384", "student.init_layers=first"],
        "student.init_layers=first",
    ),
    "attention of other heads": (
        ["objective=minilmv1", "student.num_attention_heads=6"],
        "student.num_attention_heads=12",
    ),
    "total as a term": (
        ["+objective.terms.total={kind: attention_scores}"],
        "cannot have the name",
    ),
    "term that is no term": (["+objective.terms.x=foo"], "objective.terms.x.kind=None"),
    "state as a module": (
        ["objective=intermediate_layers", "objective.terms.modules.modules=[[value,value]]"],
        "value is no module",
    ),
    "no count": (
        ["student.vocabulary=prune_to_corpus", "student.min_token_count=0"],
        "min_token_count=0",
    ),
    "start of text": (["student.init_layers=[a,b,c]"], "student.init_layers="),
    "every second of too few": (
        ["student.num_layers=4", "student.init_layers=every_second"],
        "[2, 4, 6, 8]",
    ),
    "no such kind": (["objective.terms.relations.kind=x"], "objective.terms.relations.kind=x"),
    "setting of another kind": (["+objective.terms.relations.distance=mse"], "no such setting"),
    "no such layers": (
        ["objective.terms.relations.layers=all"],
        "objective.terms.relations.layers",
    ),
    "layers that are no pairs": (["objective.terms.relations.layers=[1,2]"], "pairs"),
    "layer above the student": (
        ["objective.terms.relations.layers=[[6,4]]"],
        "the student has layers 1..3, not 4",
    ),
    "relations of embeddings": (
        ["objective.terms.relations.layers=[[0,0]]"],
        "the teacher has layers 1..6, not 0",
    ),
    "weight below zero": (["objective.terms.relations.weight=-1"], "weight=-1"),
    "no such distance": (
        ["objective=tinybert", "objective.terms.hidden.distance=far"],
        "distance=far",
    ),
    "two poolings": (
        ["objective=sentence_embedding", "objective.terms.embedding.transforms=[mean,first_token]"],
        "not both",
    ),
    "skip of a single layer": (
        ["student.num_layers=1", "objective=tinybert", "objective.terms.hidden.layers=skip"],
        "is empty for a student of 1 layers",
    ),
    "pair twice": (["relation_set.pairs=[qq,qq]"], "relation_set.pairs"),
    "no pair": (["relation_set.pairs=[]"], "relation_set.pairs"),
    "block too long": (["corpus.block_length=513"], "corpus.block_length=513"),
    "block too long for RoBERTa": (
        ["teacher=roberta_base", "student=l6h768", "corpus.block_length=513"],
        "corpus.block_length=513",
    ),
    "block too short": (["corpus.block_length=2"], "corpus.block_length=2"),
    "task too long": (["task_training.max_length=513"], "task_training.max_length=513"),
    "warmup to the end": (["training.warmup_steps=200"], "training.warmup_steps=200"),
    "micro-batch": (["runtime.microbatch_size=5"], "runtime.microbatch_size=5"),
    "precision": (["training.precision=fp8"], "training.precision=fp8"),
    "init": (["student.init=zeros"], "student.init=zeros"),
    "split": (["corpus.split=word"], "corpus.split=word"),
    "weights": (["teacher.weights=none"], "teacher.weights=none"),
    "device": (["runtime.device=tpu"], "runtime.device=tpu"),
    "kernel": (["runtime.relation_kernel=cuda"], "runtime.relation_kernel=cuda"),
    "compile": (["runtime.compile=maybe"], "runtime.compile"),
    "profile": (["profile=maybe"], "profile"),
    "compiled albert": (
        ["runtime.compile=true", "teacher.model_type=albert"],
        "runtime.compile=false",
    ),
    "device with a typing error": (["runtime.device=cuda:x"], "runtime.device=cuda:x"),
    "recipe": (["recipe.name=evaluate"], "recipe"),
    "attention heads": (["student.num_attention_heads=5"], "student.num_attention_heads=5"),
    "layers copied from fewer": (
        ["student=l12h384", "student.init=teacher_layers"],
        "student.init=teacher_layers",
    ),
    "layers copied from wider": (
        ["teacher=bert_base", "student=l6h384", "student.init=teacher_layers"],
        "student.hidden_size",
    ),
    "seed": (["seed=4294967296"], "seed=4294967296"),
    "dropout of one": (["training.hidden_dropout=1"], "training.hidden_dropout=1"),
    "all held out": (["corpus.held_out_fraction=1"], "corpus.held_out_fraction=1"),
    "nothing held out": (["corpus.held_out_fraction=0"], "corpus.held_out_fraction=0"),
    "ids without files": (["corpus.pretokenized=true"], "corpus.pretokenized"),
    "models": (["recipe.models=[student,nonsense]"], "recipe.models=nonsense"),
    "kind of task": (["task=mrpc", "tasks.mrpc.kind=ranking"], "tasks.mrpc.kind=ranking"),
    "metric": (["task=mrpc", "tasks.mrpc.metrics=[bleu]"], "tasks.mrpc.metrics=['bleu']"),
    "metric of another kind": (
        ["task=stsb", "tasks.stsb.metrics=[pearson,accuracy]"],
        "regression has pearson, spearman",
    ),
    "no metric": (["task=squad", "tasks.squad.metrics=[]"], "tasks.squad.metrics=[]"),
    "misspelt setting of a task": (
        ["task=mrpc", "+tasks.mrpc.metric=accuracy"],
        "tasks.mrpc.metric",
    ),
    "no user file": (["task=text_classification"], "tasks.text_classification.files.train"),
    "no training file": (
        ["task=mrpc", "tasks.mrpc.data=null", "+tasks.mrpc.files={validation: mine.csv}"],
        "tasks.mrpc.files.train is missing",
    ),
    "nothing to compare": (
        ["task=stsb_similarity", "tasks.stsb_similarity.validation=[]"],
        "tasks.stsb_similarity.validation is missing",
    ),
    "no file to compare": (
        [
            "task=stsb_similarity",
            "tasks.stsb_similarity.data=null",
            "+tasks.stsb_similarity.files={test: mine.csv}",
        ],
        "tasks.stsb_similarity.files.validation is missing",
    ),
    "family": (
        ["task=mrpc", "tasks.mrpc.family=nothing"],
        "tasks.mrpc.family=nothing: the chosen task_training has settings for cnn_dailymail, glue,",
    ),
    "three columns": (
        ["task=mrpc", "tasks.mrpc.text_columns=[a,b,c]"],
        "tasks.mrpc.text_columns",
    ),
    "no column": (["task=mrpc", "tasks.mrpc.text_columns=[]"], "tasks.mrpc.text_columns"),
    "one class": (["task=mrpc", "tasks.mrpc.num_labels=1"], "tasks.mrpc.num_labels=1"),
    "nothing validates": (
        ["task=ag_news", "tasks.ag_news.held_out_fraction=0"],
        "tasks.ag_news.held_out_fraction=0",
    ),
    "everything validates": (
        ["task=ag_news", "tasks.ag_news.held_out_fraction=1"],
        "tasks.ag_news.held_out_fraction=1",
    ),
    "no language": (["task=xnli", "tasks.xnli.languages=[]"], "tasks.xnli.languages=[]"),
    "data and files": (
        ["task=mrpc", "+tasks.mrpc.files={train: mine.csv}"],
        "tasks.mrpc: give either data",
    ),
    "neither data nor files": (["task=mrpc", "tasks.mrpc.data=null"], "tasks.mrpc: give either"),
    "search": (["task_training.search=random"], "task_training.search=random"),
    "search without a grid": (
        ["task_training.search=grid"],
        "task_training.families.glue.grid.learning_rate",
    ),
    "exception with a typing error": (
        ["+task_training.exceptions.next_passage.max_lenght=3"],
        "task_training.exceptions.next_passage",
    ),
    "exception": (
        ["task_training.exceptions.next_passage.max_length=0"],
        "task_training.exceptions.next_passage.max_length=0",
    ),
    "family with a typing error": (
        ["+task_training.families.glue.learning_rat=3"],
        "task_training.families.glue.learning_rat",
    ),
    "rate in a grid": (
        ["+task_training.families.glue.grid.learning_rate=[1e-5,-1e-5]"],
        "task_training.families.glue.grid.learning_rate=-1e-05",
    ),
    "epochs in a grid": (
        ["+task_training.families.glue.grid.epochs=[0]"],
        "task_training.families.glue.grid.epochs=0",
    ),
    "batches in a grid": (
        ["+task_training.families.glue.grid.batch_size=[many]"],
        "task_training.families.glue.grid.batch_size",
    ),
    "task too long for RoBERTa": (
        ["teacher=roberta_base", "student=l6h768", "task_training.max_length=513"],
        "task_training.max_length=513",
    ),
    "family too long": (
        ["task=mlqa", "task_training=minilmv2", "teacher.max_position_embeddings=256"],
        "task_training.max_length=512 (for mlqa)",
    ),
    "windows that do not move on": (
        ["task=squad", "task_training.doc_stride=256"],
        "task_training.doc_stride=256 (for squad)",
    ),
    "windows without an overlap": (
        ["task=squad", "tasks.squad.family=glue"],
        "task_training.doc_stride=None (for squad)",
    ),
    "baseline without a shape": (["baseline.name=mine"], "baseline"),
    "heads of a baseline": (
        ["baseline=bert_base", "baseline.num_attention_heads=5"],
        "baseline.num_attention_heads=5",
    ),
}


@pytest.mark.parametrize("overrides, named", WRONG_VALUES.values(), ids=WRONG_VALUES.keys())
def test_wrong_values_are_named(overrides, named, settings_for):
    """A mistake that only shows hours later, or as an error that names no setting."""
    with pytest.raises(ExperimentError) as caught:
        settings_for(*overrides)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["relations", "relation_set", "relation_set.pairs"])
def test_relations_that_nothing_reads_are_refused(name, compose_config):
    """A grid over relation sets whose cells are all one run."""
    config = compose_config("objective=minilmv1", "relations=kk")
    with pytest.raises(
        ExperimentError, match=f"{name} makes no difference with objective=minilmv1"
    ):
        parse(config, typed={name})
    assert parse(config).unread_groups == ["relation_set"]


NUMBERS_FROM_ZERO = {"seed", "training.warmup_steps", "training.weight_decay",
                     "runtime.num_workers", "training.hidden_dropout",
                     "training.attention_dropout", "training.adam_beta1",
                     "training.adam_beta2", "tracking.retry_seconds"}  # fmt: skip
TASK_NUMBERS_FROM_ZERO = {"weight_decay", "doc_stride", "hidden_dropout", "attention_dropout",
                          "warmup_ratio", "min_target_length", "label_smoothing",
                          "no_repeat_ngram_size"}  # fmt: skip
# Facts of a teacher are compared with its checkpoint; these two are checked where they are used.
USED_AS = {"teacher.paper_layer": "layer_selection.teacher_layer",
           "teacher.num_relation_heads": "relation_set.num_relation_heads"}  # fmt: skip
OVERRIDES = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-4, "warmup_ratio": 0.1,
             "weight_decay": 0.1, "hidden_dropout": 0.1, "attention_dropout": 0.1,
             "max_length": 32, "doc_stride": 8, "max_train_examples": 9,
             "max_validation_examples": 9, "max_target_length": 8, "min_target_length": 1,
             "label_smoothing": 0.1, "num_beams": 2, "no_repeat_ngram_size": 2}  # fmt: skip


def may_be_zero(name):
    if name.startswith("task_training."):
        return name.rsplit(".", 1)[1] in TASK_NUMBERS_FROM_ZERO
    return name in NUMBERS_FROM_ZERO


def test_numbers_below_their_range_are_named(settings_for, compose_config):
    """A number that nobody checks: minus one step, a learning rate of nan, half a head."""
    given = ["runtime.microbatch_size=8", "runtime.num_threads=1", "student.intermediate_size=64",
             "student.embedding_size=384", "teacher=tiny_random", "student=tiny",
             "baseline=bert_base"]  # fmt: skip
    plain = compose_config(*given)
    # One family will do here, with every number in it; parsing several takes time.
    family = {**plain.task_training.families.squad, "max_train_examples": 9}
    plain.task_training.families = {"glue": family}
    # Exceptions give way to values for all tasks.
    plain.task_training = {**plain.task_training, **OVERRIDES, "exceptions": {}}
    unnoticed = []
    for name, value in flatten(parse(plain)).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if name.startswith("teacher.") and name not in {*USED_AS, "teacher.initializer_range"}:
            continue
        wrong = [-1] if may_be_zero(name) else [-1, 0]
        if isinstance(value, float):
            wrong += [float("nan"), float("inf"), -float("inf")]
        for number in wrong:
            OmegaConf.update(plain, name, number)
            try:
                parse(plain)
                unnoticed.append(f"{name}={number}: accepted")
            except ExperimentError as error:
                if USED_AS.get(name, name) not in str(error):
                    unnoticed.append(f"{name}={number}: {error}")
        OmegaConf.update(plain, name, value)
    assert unnoticed == []


@pytest.mark.parametrize(
    "family", ["glue", "squad", "xnli", "mlqa", "xsum", "cnn_dailymail", "squad_qg"]
)
def test_numbers_of_every_family_are_checked(family, settings_for):
    """A family that no chosen task has, wrong until a later run chooses one."""
    name = f"task_training.families.{family}.learning_rate"
    with pytest.raises(ExperimentError, match=re.escape(f"{name}=-1")):
        settings_for(f"{name}=-1")


@pytest.mark.parametrize("number", [-1, 0])
def test_numbers_of_the_made_task_are_checked(number, settings_for):
    """A task of no pairs, or of passages without letters."""
    for name in ("num_train", "num_validation", "passage_characters"):
        with pytest.raises(ExperimentError, match=rf"tasks\.next_passage\.{name}={number}"):
            settings_for(values={f"tasks.next_passage.{name}": number})


@pytest.mark.parametrize("name", ["hidden_dropout", "attention_dropout", "warmup_ratio"])
def test_fractions_of_a_task_are_below_one(name, settings_for):
    """Everything dropped, or a warmup that never ends."""
    with pytest.raises(ExperimentError, match=rf"task_training\.{name}=1\.0"):
        settings_for(values={f"task_training.{name}": 1.0})


def test_last_seed_of_several_is_a_seed(settings_for):
    """The last of four fine-tunings that ends in a traceback, hours after the first."""
    highest = 2**32 - 1 - 3000
    choices = ["task=mrpc", "task_training=minilmv2"]
    settings_for(*choices, f"seed={highest}")
    with pytest.raises(ExperimentError, match=f"seed={highest + 1}"):
        settings_for(*choices, f"seed={highest + 1}")


def test_files_and_data_sets_exclude_each_other(settings_for, text_file):
    """One of two sources that is silently left out."""
    with pytest.raises(ExperimentError, match=r"corpus\.files or corpus\.datasets"):
        settings_for(f"corpus.files=[{text_file}]", "corpus.datasets=[{path: some/name}]")


def test_pretokenized_input_has_no_text(settings_for, text_file):
    """A task or a sentence split that needs text, noticed only after distilling."""
    given = ["corpus=pretokenized", f"corpus.files=[{text_file}]"]
    with pytest.raises(ExperimentError, match="task=none"):
        settings_for(*given)
    with pytest.raises(ExperimentError, match=r"corpus\.split=sentence"):
        settings_for(*given, "task=none", "corpus.split=sentence")
    settings_for(*given, "recipe=prepare_corpus")


def test_batch_smaller_than_the_micro_batch_is_fine(settings_for):
    """A small run on a GPU that is refused because of the runtime group's value."""
    settings = settings_for("runtime=gpu", "training.batch_size=16")
    assert settings.runtime.microbatch_size == 64


def test_home_and_relative_outputs_become_absolute(settings_for, monkeypatch, tmp_path):
    """Outputs below a folder named ~, or wherever the process stands later."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings_for("outputs_dir='~/out'").outputs == tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    assert settings_for("outputs_dir=out").outputs == tmp_path / "out"


# Checkpoints that bring their own facts


def test_facts_of_a_teacher_path(settings_for, tmp_path):
    """teacher.path that runs with the facts of the default teacher."""
    folder = write_config(tmp_path / "mine", num_hidden_layers=10, hidden_size=96)
    settings = settings_for(f"teacher.path={folder}", "student=tiny", teacher_was_chosen=False)
    teacher = settings.teacher
    assert (teacher.name, teacher.model_type, teacher.package) == ("mine", "bert", None)
    assert (teacher.num_layers, teacher.hidden_size, teacher.num_attention_heads) == (10, 96, 4)
    assert (teacher.intermediate_size, teacher.max_position_embeddings) == (72, 512)
    assert teacher.paper_layer == settings.layer_selection.teacher_layer == 10
    assert teacher.upper_middle_layer == 8
    assert settings.relation_set.num_relation_heads == 48  # of 96 and 48
    assert any("teacher.path" in note for note in settings.notes)


@pytest.mark.parametrize(
    "teacher_size, student_size, heads",
    [(768, 384, 48), (1024, 384, 64), (1024, 768, 64), (40, 48, 8), (7, 48, 1), (1024, 320, 64)],
)
def test_relation_heads_of_a_teacher_path_divide_both_sizes(
    teacher_size, student_size, heads, settings_for, tmp_path
):
    """A teacher of one's own that is refused for a number of heads nobody asked for."""
    folder = write_config(tmp_path / "mine", hidden_size=teacher_size)
    settings = settings_for(
        f"teacher.path={folder}",
        f"student.hidden_size={student_size}",
        "student.num_attention_heads=1",
        teacher_was_chosen=False,
    )
    assert settings.relation_set.num_relation_heads == heads


def test_relation_heads_divide_the_size_of_a_student_config(settings_for, tmp_path):
    """Heads chosen for the student option's size although student.config brings another."""
    teacher = write_config(tmp_path / "teacher", hidden_size=64)
    student = write_config(tmp_path / "student", hidden_size=16)
    settings = settings_for(
        f"teacher.path={teacher}",
        f"student.config={student / 'config.json'}",
        teacher_was_chosen=False,
    )
    assert settings.student.hidden_size == 16
    assert settings.relation_set.num_relation_heads == 16


def test_path_of_a_chosen_teacher_keeps_the_facts(settings_for, tmp_path):
    """A local copy of a known teacher that is distilled at its last layer."""
    folder = write_config(tmp_path / "mine")
    settings = settings_for("teacher=bert_large", "student=l6h384", f"teacher.path={folder}")
    assert (settings.teacher.num_layers, settings.layer_selection.teacher_layer) == (24, 21)


def test_names_of_the_facts_in_other_architectures(settings_for, tmp_path):
    """DistilBERT's dim, n_layers and hidden_dim not found."""
    folder = tmp_path / "distil"
    folder.mkdir()
    facts = {"model_type": "distilbert", "vocab_size": 99, "n_layers": 3, "dim": 24, "n_heads": 2,
             "hidden_dim": 60, "max_position_embeddings": 128}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts))
    settings = settings_for("teacher=custom", f"teacher.path={folder}", "student=tiny")
    teacher = settings.teacher
    assert (teacher.num_layers, teacher.hidden_size, teacher.intermediate_size) == (3, 24, 60)
    assert settings.relation_set.num_relation_heads == 24


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "config.json"),
        ("{broken", "not valid JSON"),
        ("[1]", "model_type"),
        ('{"hidden_size": 4}', "model_type"),
        ('{"model_type": "bert"}', "num_hidden_layers"),
    ],
)
def test_unreadable_teacher_path_is_refused(content, message, settings_for, tmp_path):
    """A traceback of a JSON reader instead of a word about teacher.path."""
    folder = tmp_path / "mine"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ExperimentError, match=message):
        settings_for(f"teacher.path={folder}", teacher_was_chosen=False)


def test_wrong_type_beside_a_teacher_path_is_named(settings_for, tmp_path):
    """A ValueError, because a size is used before its type has been looked at."""
    folder = write_config(tmp_path / "mine")
    with pytest.raises(ExperimentError, match=r"student\.hidden_size"):
        settings_for(f"teacher.path={folder}", "student.hidden_size=wide", teacher_was_chosen=False)


def test_hub_teacher_without_network_is_explained(settings_for):
    """An unreachable hub that is told as a traceback of a client library."""
    with pytest.raises(ExperimentError, match=r"teacher\.path"):
        settings_for("teacher=custom", "teacher.path=no-such-organisation/no-such-model")


def test_student_config_gives_the_shape(settings_for, tmp_path):
    """A student.config that is read for building but not for checks and names."""
    folder = write_config(tmp_path / "student", hidden_size=48, num_hidden_layers=5)
    for source in (folder, folder / "config.json"):
        settings = settings_for(f"student.config={source}")
        student = settings.student
        assert (student.num_layers, student.hidden_size) == (5, 48)
        assert (student.num_attention_heads, student.intermediate_size) == (4, 72)
        assert settings.student_name == "l5h48"


@pytest.mark.parametrize("setting", ["student.config", "student.path"])
def test_student_with_other_tokens_or_architecture_is_refused(setting, settings_for, tmp_path):
    """Relations between different tokens, or states that mean something else."""
    folder = write_config(tmp_path / "other", vocab_size=31000)
    with pytest.raises(ExperimentError, match=r"vocabulary of 31000, the teacher of 30522"):
        settings_for(f"{setting}={folder}")
    folder = write_config(tmp_path / "other", model_type="roberta")
    with pytest.raises(ExperimentError, match=r"is a roberta, the teacher a bert"):
        settings_for(f"{setting}={folder}")


# The rest


def test_flatten_leaves_out_nulls_and_notes(settings_for, tmp_path):
    """Parameters in the tracking database that nobody set."""
    folder = write_config(tmp_path / "mine")
    settings = settings_for("teacher=custom", f"teacher.path={folder}", "student=tiny", "task=none")
    assert settings.notes
    flat = flatten(settings)
    assert flat["training.max_steps"] == 200
    assert "notes" not in as_dict(settings)
    assert not [name for name in flat if name.startswith(("notes", "tasks"))]
    assert None not in flat.values()


def test_settings_load_nothing_heavy():
    """A misspelt setting that is reported only after seconds of imports."""
    code = (
        "import sys, minilm_exp.settings\n"
        "sys.exit(str([n for n in ('torch', 'transformers', 'datasets') if n in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "[]"


def test_typed_settings_survive_a_teacher_path(compose_config, tmp_path):
    """A layer or revision that was asked for, replaced by a rule without a word."""
    folder = write_config(tmp_path / "mine")
    asked = ["teacher.paper_layer=1", "teacher.num_relation_heads=2", "teacher.revision=abc"]
    config = compose_config(f"teacher.path={folder}", "student=tiny", *asked)
    settings = parse(config, False, {override.split("=")[0] for override in asked})
    assert settings.layer_selection.teacher_layer == 1
    assert settings.relation_set.num_relation_heads == 2
    assert settings.teacher.revision == "abc"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["corpus=text_files", "corpus.files=[]"], "corpus.files"),
        (["corpus.files=a.txt"], "corpus.files=\\[...\\]"),
        (["runtime.device=cuda:1"], "CUDA_VISIBLE_DEVICES"),
        (["student.path=org/model"], "student.path"),
        (
            ["student=l3h384", "student.init=teacher_layers", "student.num_attention_heads=6"],
            "student.num_attention_heads",
        ),
    ],
    ids=["no files", "no list", "second card", "hub student", "other heads"],
)
def test_more_wrong_values_are_named(overrides, message, compose_config):
    """Settings that would be taken for another one, or found only hours later."""
    with pytest.raises(ExperimentError, match=message):
        parse(compose_config(*overrides))
