"""What a setting may be, alone and beside others.

Every function raises an ExperimentError that names the value, the rule and the setting to change.
"""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

from minilm_exp.budget import check_budget
from minilm_exp.errors import ExperimentError
from minilm_exp.hub import COMMIT
from minilm_exp.objective_settings import STATE_LETTERS, RelationTerm, check_terms
from minilm_exp.settings import (
    EXPORTS,
    ROLES,
    TRIAL_VALUES,
    Baseline,
    Settings,
    flatten,
    init_layers,
    matching_files,
    max_tokens,
)

NO_TOKEN_IDS = (
    "corpus.pretokenized=true has the teacher's token ids, which a student with fewer tokens cannot"
    " read: give text"
)


def check_finetune(settings: Settings) -> None:
    """Refuses `recipe=finetune` without what it fine-tunes."""
    if not settings.recipe.models:
        raise ExperimentError("recipe.models=[] names no model: student, teacher, or both")
    if not settings.tasks:
        raise ExperimentError("recipe=finetune needs a task: add task=NAME (see --help)")
    if "student" in settings.recipe.models and settings.student.path is None:
        raise ExperimentError(
            "recipe=finetune needs the checkpoint: add student.path=FOLDER; for the teacher itself"
            " recipe.models=[teacher]"
        )
    if "undistilled" in settings.recipe.models:
        raise ExperimentError(
            "recipe.models=[undistilled]: a checkpoint has no start to compare with; give its"
            " folder as student.path"
        )


def check_student(settings: Settings, facts: dict[str, Any] | None) -> None:
    """Refuses a student of student.path or student.config that cannot learn from the teacher.

    Args:
        settings: The run.
        facts: Of its config.json; None for a student that is built from numbers.
    """
    if facts is None:
        return
    source, teacher = settings.student.config or settings.student.path, settings.teacher
    is_pruned = settings.student.path is not None and facts["vocab_size"] < teacher.vocab_size
    if facts["vocab_size"] != teacher.vocab_size and not is_pruned:
        raise ExperimentError(
            f"the student of {source} has a vocabulary of {facts['vocab_size']}, the teacher of"
            f" {teacher.vocab_size}: relations need the same tokens on both sides; choose a student"
            " or teacher with the same tokenizer"
        )
    if is_pruned and settings.corpus.pretokenized and settings.data == "corpus":
        raise ExperimentError(NO_TOKEN_IDS)
    if facts["model_type"] != teacher.model_type:
        raise ExperimentError(
            f"the student of {source} is a {facts['model_type']}, the teacher a"
            f" {teacher.model_type}; a student has its teacher's architecture"
        )
    longest = settings.corpus.block_length
    most = max_tokens(facts["model_type"], facts["max_position_embeddings"])
    if settings.data == "corpus" and most < longest:
        raise ExperimentError(
            f"the student of {source} has {facts['max_position_embeddings']} positions, too few"
            f" for {longest} tokens; lower corpus.block_length"
        )


def check_own_head(settings: Settings) -> None:
    """Refuses a teacher's own head where nothing uses it, and a task that cannot go without."""
    if settings.teacher.head == "new":
        if "teacher_labels" in settings.tasks:
            raise ExperimentError(
                "task=teacher_labels is labelled by the teacher's own head: set teacher.head=own"
            )
        return
    if settings.teacher.weights == "random":
        raise ExperimentError(
            "teacher.head=own: teacher.weights=random has drawn weights, none that predict; set"
            " teacher.head=new"
        )
    classes = ("classification", "regression")
    if "teacher" in settings.unread_groups:
        raise ExperimentError(
            f"teacher.head=own makes no difference with recipe={settings.recipe.name} and"
            f" recipe.models={settings.recipe.models}: leave it out"
        )
    others = [name for name, task in settings.tasks.items() if task.kind not in classes]
    if others or not settings.tasks or "next_passage" in settings.tasks:
        raise ExperimentError(
            f"teacher.head=own with task={','.join(settings.tasks) or 'none'}: the head predicts"
            " classes; choose task=teacher_labels or your own task=text_classification, or set"
            " teacher.head=new"
        )
    if "teacher_labels" in settings.tasks and settings.recipe.name == "finetune":
        raise ExperimentError(
            "task=teacher_labels with recipe=finetune: give data of its own with"
            " task=text_classification, or distil with recipe=task_specific"
        )


def check_trust(settings: Settings) -> None:
    """Refuses code of a checkpoint that nothing pins, that there is not, or that is not used."""
    teacher = settings.teacher
    if not teacher.trust_remote_code or "teacher" in settings.unread_groups:
        return
    fixed = settings.recipe.name == "prepare_corpus"
    trained = [name for name, task in settings.tasks.items() if task.is_trained and not fixed]
    if trained:
        raise ExperimentError(
            f"teacher.trust_remote_code=true: a task's head is built without code of a checkpoint,"
            f" so {trained[0]} cannot be fine-tuned: set task=none"
        )
    source = teacher.path or (None if teacher.package else teacher.hub_id)
    if teacher.weights == "random" or source is None:
        raise ExperimentError(
            "teacher.trust_remote_code=true makes no difference with teacher.weights=random or a"
            " teacher of a package, whose code is installed: leave it out"
        )
    is_here = Path(source).expanduser().is_dir()
    if not is_here and not COMMIT.fullmatch(teacher.revision or ""):
        raise ExperimentError(
            f"teacher.trust_remote_code=true runs code of {source}, so"
            f" teacher.revision={teacher.revision} must be a full commit of 40 digits, whose code"
            " you have read"
        )


_EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_export(settings: Settings) -> None:
    """Refuses exports and a push that there is nothing for, or no library."""
    asked = [f"export={settings.export}".replace("'", "")] if settings.export else []
    asked += [f"push_to={settings.push_to}"] if settings.push_to is not None else []
    if not asked:
        return
    if settings.recipe.name == "prepare_corpus":
        raise ExperimentError(f"{asked[0]}: recipe=prepare_corpus makes no student: leave it out")
    doubled = [name for name in EXPORTS if settings.export.count(name) > 1]
    if doubled:
        raise ExperimentError(f"{asked[0]} names {doubled[0]} twice: once is enough")
    trained = [task for task in settings.tasks.values() if task.is_trained]
    kept = trained if settings.recipe.keep_models and "student" in settings.recipe.models else []
    has_encoder = settings.recipe.name != "finetune" and settings.origin.settings.data == "corpus"
    if settings.export:
        if not has_encoder and all(task.kind == "generation" for task in kept):
            raise ExperimentError(
                f"{asked[0]}: recipe={settings.recipe.name} leaves no student that can be exported;"
                " set recipe.keep_models=true with the student in recipe.models and a task that is"
                " not generation, or leave it out"
            )
        if "student" in settings.tasks:
            raise ExperimentError(
                f"{asked[0]}: the exports of the task `student` would have the folder of the"
                " student's: give tasks.student another name"
            )
        needs_onnx = any(name.startswith("onnx") for name in settings.export)
        for package in _EXPORT_PACKAGES if needs_onnx else ():
            if importlib.util.find_spec(package) is None:
                raise ExperimentError(
                    f"{asked[0]} needs {package}, which is not installed: pip install"
                    " 'minilm_exp[export]', or leave it out"
                )
    if settings.push_to is not None and settings.pushes_task_model and len(kept) != 1:
        raise ExperimentError(
            f"{asked[-1]}: one student is pushed, but recipe={settings.recipe.name} keeps"
            f" {len(kept)}: choose one task, with recipe.keep_models=true and the student in"
            " recipe.models, or leave it out"
        )


# Above these a slip of the pen would end in an overflow, or in a loop that does not end.
_HIGHEST = {"student.num_layers": 10_000, "teacher.num_layers": 10_000, "runtime.num_threads": 4096,
            "runtime.num_workers": 4096, "student.budget.threads": 4096,
            "task_training.num_seeds": 10_000}  # fmt: skip


def _check_magnitudes(settings: Settings) -> None:
    for name, value in flatten(settings).items():
        highest = _HIGHEST.get(name, 2**32 if name == "seed" else 2**31 - 1)
        if type(value) is int and abs(value) > highest:
            raise ExperimentError(f"{name}={value} must not be above {highest}")


def check_values(settings: Settings) -> None:
    """Refuses values that are wrong by themselves, and a few pairs of them."""
    training, student, runtime = settings.training, settings.student, settings.runtime
    _check_magnitudes(settings)
    check_budget(student.budget)
    check_trust(settings)
    check_own_head(settings)
    for name, value, choices in (
        ("teacher.head", settings.teacher.head, ("new", "own")),
        ("teacher.pooling", settings.teacher.pooling, ("mean", "first_token")),
        ("teacher.weights", settings.teacher.weights, ("pretrained", "random")),
        ("student.init", student.init, ("random", "teacher_layers", "auto")),
        ("student.vocabulary", student.vocabulary, ("full", "prune_to_corpus")),
        ("corpus.split", settings.corpus.split, ("document", "sentence")),
        *(("recipe.models", name, ROLES) for name in settings.recipe.models),
        *(("trial_values", name, TRIAL_VALUES) for name in settings.trial_values),
        *(("export", name, EXPORTS) for name in settings.export),
        ("training.precision", training.precision, ("auto", "fp32", "bf16")),
        ("runtime.teacher_cache", runtime.teacher_cache, ("auto", "true", "false")),
        ("runtime.relation_kernel", runtime.relation_kernel, ("auto", "block", "triton")),
    ):
        if value not in choices:
            raise ExperimentError(f"{name}={value} is not one of {', '.join(choices)}")
    if runtime.device not in ("cpu", "cuda"):
        raise ExperimentError(
            f"runtime.device={runtime.device} is not cpu or cuda (choose one of several cards with"
            " CUDA_VISIBLE_DEVICES)"
        )
    if runtime.shard_teacher and (runtime.teacher_cache == "true" or runtime.compile):
        raise ExperimentError(
            "runtime.shard_teacher=true: the processes must compute the teacher equally often and"
            " uncompiled; set runtime.teacher_cache=auto and runtime.compile=false"
        )
    positive: dict[str, float | None] = {
        "num_trials": settings.num_trials,
        "teacher.initializer_range": settings.teacher.initializer_range,
        "student.num_layers": student.num_layers,
        "student.hidden_size": student.hidden_size,
        "student.num_attention_heads": student.num_attention_heads,
        "student.intermediate_size": student.intermediate_size,
        "student.embedding_size": student.embedding_size,
        "student.min_token_count": student.min_token_count,
        "runtime.microbatch_size": runtime.microbatch_size,
        "runtime.num_threads": runtime.num_threads,
        "runtime.teacher_cache_gb": runtime.teacher_cache_gb,
        **{
            f"{group}.{name}": getattr(getattr(settings, group), name)
            for group, names in _POSITIVE.items()
            for name in names
        },
    }
    for name, number in positive.items():
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise ExperimentError(f"{name}={number} must be a finite number above 0")
    fractions = {
        "training.hidden_dropout": training.hidden_dropout,
        "training.attention_dropout": training.attention_dropout,
        "training.adam_beta1": training.adam_beta1,
        "training.adam_beta2": training.adam_beta2,
    }
    for name, number in fractions.items():
        if not 0 <= number < 1:
            raise ExperimentError(f"{name}={number} must be at least 0 and below 1")
    not_negative = {
        "seed": settings.seed,
        "training.warmup_steps": training.warmup_steps,
        "training.weight_decay": training.weight_decay,
        "runtime.num_workers": runtime.num_workers,
        "tracking.retry_seconds": settings.tracking.retry_seconds,
    }
    for name, number in not_negative.items():
        if not (number >= 0 and math.isfinite(number)):
            raise ExperimentError(f"{name}={number} must not be negative")
    highest = max(settings.task_training.seeds(settings.seed), default=settings.seed)
    if highest >= 2**32:
        raise ExperimentError(
            f"seed={settings.seed} must be below 2**32, also with what is added to it for"
            f" task_training.num_seeds={settings.task_training.num_seeds}"
        )
    if training.warmup_steps >= training.max_steps:
        raise ExperimentError(
            f"training.warmup_steps={training.warmup_steps} must be below"
            f" training.max_steps={training.max_steps}"
        )
    if runtime.microbatch_size and training.batch_size % runtime.microbatch_size:
        if training.batch_size > runtime.microbatch_size:
            raise ExperimentError(
                f"runtime.microbatch_size={runtime.microbatch_size} does not divide"
                f" training.batch_size={training.batch_size}"
            )
    if runtime.compile and settings.teacher.model_type == "albert":
        raise ExperimentError(
            "runtime.compile=true needs layers with weights of their own, an albert's share theirs:"
            " set runtime.compile=false"
        )
    if student.path is not None and student.vocabulary != "full":
        raise ExperimentError(
            f"student.vocabulary={student.vocabulary}: the checkpoint of student.path has its"
            " vocabulary; set student.vocabulary=full"
        )
    if student.hidden_size % student.num_attention_heads:
        raise ExperimentError(
            f"student.num_attention_heads={student.num_attention_heads} does not divide"
            f" student.hidden_size={student.hidden_size}"
        )


def check_baseline_values(baseline: Baseline) -> None:
    """Refuses a baseline whose shape is not given in full, or twice."""
    shape = {
        name: value
        for name, value in vars(baseline).items()
        if name not in ("name", "num_batches", "batch_size")
    }
    if baseline.name == "teacher":
        given = [name for name, value in shape.items() if value is not None]
        if given:
            raise ExperimentError(
                f"baseline.{given[0]}={shape[given[0]]}: baseline=teacher has the teacher's shape;"
                " set baseline.name too, or choose another baseline"
            )
        return
    for name, value in shape.items():
        if value is None:
            raise ExperimentError(
                f"baseline.name={baseline.name} needs baseline.{name}; or use baseline=teacher"
            )
        if name != "model_type" and value < 1:
            raise ExperimentError(f"baseline.{name}={value} must be above 0")
    if shape["hidden_size"] % shape["num_attention_heads"]:
        raise ExperimentError(
            f"baseline.num_attention_heads={shape['num_attention_heads']} does not divide"
            f" baseline.hidden_size={shape['hidden_size']}"
        )


_POSITIVE = {
    "training": [
        "max_steps",
        "batch_size",
        "learning_rate",
        "adam_epsilon",
        "max_grad_norm",
        "logging_steps",
        "evaluation_steps",
        "evaluation_sequences",
        "checkpoint_steps",
        "keep_checkpoints",
    ],
    "baseline": ["num_batches", "batch_size"],
}


def check_objective(settings: Settings) -> None:
    """Refuses terms that do not fit the sizes of teacher and student."""
    layer = settings.layer_selection.teacher_layer
    if not 1 <= layer <= settings.teacher.num_layers:
        raise ExperimentError(
            f"layer_selection.teacher_layer={layer} is outside 1..{settings.teacher.num_layers},"
            " the teacher's layers counted from 1"
        )
    for name, term in settings.objective.terms.items():
        if isinstance(term, RelationTerm):
            group = settings.relation_set
            is_of_group = settings.objective.reads_relation_set and (
                (term.pairs, term.num_relation_heads) == (group.pairs, group.num_relation_heads)
            )
            where = "relation_set" if is_of_group else f"objective.terms.{name}"
            _check_relations(settings, where, term)
    check_terms(
        settings.objective.terms, settings.teacher.num_layers, settings.student.num_layers, layer
    )


def _check_relations(settings: Settings, where: str, term: RelationTerm) -> None:
    pairs = term.pairs
    wrong = [pair for pair in pairs if len(pair) != 2 or set(pair) - set(STATE_LETTERS)]
    if wrong or not pairs or len(set(pairs)) < len(pairs):
        raise ExperimentError(
            f"{where}.pairs={pairs} must name at least one relation, none twice, each as two"
            " letters of q, k and v, for example [qk,vv]"
        )
    heads = term.num_relation_heads
    if heads < 1:
        raise ExperimentError(f"{where}.num_relation_heads={heads} must be above 0")
    own = settings.student.num_attention_heads
    if term.is_attention and not heads == own == settings.teacher.num_attention_heads:
        raise ExperimentError(
            f"objective={settings.objective.name} compares attention distributions head by head:"
            f" set student.num_attention_heads={settings.teacher.num_attention_heads} (it is {own})"
            f" and {where}.num_relation_heads={settings.teacher.num_attention_heads} (it is"
            f" {heads}), or use objective=minilmv2 relations=qk_vv, whose relation heads are free"
        )
    teacher_size, student_size = settings.teacher.hidden_size, settings.student.hidden_size
    for owner, size in (("teacher", teacher_size), ("student", student_size)):
        if size % heads:
            common = math.gcd(teacher_size, student_size)
            fitting = [str(number) for number in range(1, 129) if common % number == 0]
            raise ExperimentError(
                f"{where}.num_relation_heads={heads} does not divide the {owner}'s hidden size"
                f" {size}; numbers that divide both sizes: {', '.join(fitting)}"
            )


_INIT_LAYERS = ("evenly", "whole", "every_second", "first", "last")


def _check_init_layers(settings: Settings) -> None:
    student, highest = settings.student, settings.teacher.num_layers
    given = student.init_layers
    is_list = isinstance(given, list) and all(type(layer) is int for layer in given)
    if not is_list and given not in _INIT_LAYERS:
        raise ExperimentError(
            f"student.init_layers={given} is not {', '.join(_INIT_LAYERS)} or a list of the"
            " teacher's layers"
        )
    layers = init_layers(student, settings.layer_selection.teacher_layer, highest)
    if len(layers) != student.num_layers:
        raise ExperimentError(
            f"student.init_layers={given} names {len(layers)} layers, but"
            f" student.num_layers={student.num_layers}"
        )
    if min(layers) < 1 or max(layers) > highest:
        raise ExperimentError(
            f"student.init_layers={given} takes the layers {layers}; the teacher has 1..{highest}"
        )


def highest_init_layer(settings: Settings) -> int:
    """Of the teacher, up to which a student of its layers is made by default."""
    if settings.student.init_layers == "evenly":
        return settings.layer_selection.teacher_layer
    return settings.teacher.num_layers


def check_init(settings: Settings) -> None:
    """Refuses first weights that cannot be taken from the teacher's layers."""
    if settings.student.init != "teacher_layers" or settings.student.path is not None:
        if settings.student.init_layers != "evenly":
            raise ExperimentError(
                f"student.init_layers={settings.student.init_layers} makes no difference: set"
                " student.init=teacher_layers, without student.path"
            )
        return
    layer = highest_init_layer(settings)
    if settings.teacher.hidden_size != settings.student.hidden_size:
        raise ExperimentError(
            "student.init=teacher_layers copies whole layers, so student.hidden_size"
            f" must be the teacher's {settings.teacher.hidden_size}; use student.init=random"
        )
    if settings.teacher.num_attention_heads != settings.student.num_attention_heads:
        raise ExperimentError(
            "student.init=teacher_layers copies whole layers, so student.num_attention_heads"
            f" must be the teacher's {settings.teacher.num_attention_heads}; use"
            " student.init=random"
        )
    if settings.student.num_layers > layer:
        raise ExperimentError(
            f"student.init=teacher_layers takes {settings.student.num_layers} of the teacher's"
            f" layers 1..{layer}; lower student.num_layers or use student.init=random"
        )
    _check_init_layers(settings)


def check_corpus(settings: Settings) -> None:
    """Refuses a corpus that is not there, or is not what its use needs."""
    corpus, teacher = settings.corpus, settings.teacher
    if not 8 <= corpus.block_length <= teacher.max_tokens:
        raise ExperimentError(
            f"corpus.block_length={corpus.block_length} must be from 8 to the teacher's"
            f" {teacher.max_tokens} positions"
        )
    if not 0 < corpus.held_out_fraction < 1:
        raise ExperimentError(
            f"corpus.held_out_fraction={corpus.held_out_fraction} must be between 0 and 1"
        )
    if corpus.files and corpus.datasets:
        raise ExperimentError("give corpus.files or corpus.datasets, not both")
    if not (corpus.files or corpus.datasets or corpus.packaged):
        raise ExperimentError(
            "the corpus is empty: give corpus.files=[...] or corpus.datasets=[...], or corpus=demo"
        )
    if corpus.pretokenized and not corpus.files:
        raise ExperimentError("corpus.pretokenized=true needs corpus.files=[...]")
    if corpus.pretokenized and settings.student.vocabulary == "prune_to_corpus":
        raise ExperimentError(
            "student.vocabulary=prune_to_corpus needs text, which it tokenises again; pretokenized"
            " input has none"
        )
    if corpus.pretokenized and corpus.split == "sentence":
        raise ExperimentError("corpus.split=sentence needs text; pretokenized input has none")
    if (
        corpus.pretokenized
        and settings.has_task_of_corpus
        and settings.recipe.name != "prepare_corpus"
    ):
        raise ExperimentError(
            "a task that is made from the corpus needs text, which pretokenized input has not: set"
            " task=none"
        )
    for pattern in settings.corpus.files:
        if not matching_files(pattern):
            raise ExperimentError(
                f"corpus.files: no file matches {pattern} (seen from {os.getcwd()})"
            )
