"""The composed config as one typed object, checked before any model is loaded.

`parse` is the only way in. What it accepts fits together: every later module takes values from
these classes and need not check them again. Nothing heavy is imported here, so that a mistake in
the config is reported at once.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Container
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minilm_exp.errors import ExperimentError
from minilm_exp.objective_settings import (
    STATE_LETTERS,
    LabelTerm,
    LogitTerm,
    Objective,
    RelationTerm,
    check_terms,
    parse_terms,
    trains_head,
)
from minilm_exp.task_settings import (
    TaskTraining,
    check_tasks,
    parse_changes,
    parse_tasks,
)
from minilm_exp.teacher_facts import read_facts

# The models that a run can fine-tune; the second is the student before it was distilled.
ROLES = ("student", "undistilled", "teacher")


@dataclass
class Teacher:
    """The model that is distilled, and the facts that its checkpoint must confirm."""

    name: str
    hub_id: Optional[str]
    revision: Optional[str]
    package: Optional[str]
    path: Optional[str]
    weights: str
    model_type: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    paper_layer: int
    upper_middle_layer: int
    num_relation_heads: int
    initializer_range: Optional[float]

    @property
    def max_tokens(self) -> int:
        """Longest sequence."""
        return max_tokens(self.model_type, self.max_position_embeddings)


def max_tokens(model_type: str, max_position_embeddings: int) -> int:
    """Longest sequence of an architecture with so many positions."""
    return max_position_embeddings - (2 if model_type in _POSITIONS_FROM_PADDING else 0)


# These number positions from their padding id + 1.
_POSITIONS_FROM_PADDING = {"roberta", "xlm-roberta", "camembert", "data2vec-text", "mpnet"}


@dataclass
class Student:
    """The shape and the start of the model that learns."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: Optional[int]
    embedding_size: Optional[int]
    init: str
    init_layers: Any
    vocabulary: str
    min_token_count: int
    path: Optional[str]
    config: Optional[str]


@dataclass
class RelationSet:
    """Which relations are distilled, written as two letters of q, k and v."""

    pairs: list[str]
    num_relation_heads: int

    @property
    def name(self) -> str:
        """The pairs joined, or "all" for all nine."""
        return "all" if len(self.pairs) == 9 else "_".join(self.pairs)


@dataclass
class LayerSelection:
    """The teacher layer whose relations are distilled, counted from 1."""

    teacher_layer: int


@dataclass
class HubDataset:
    """One data set of the hub, or a local folder laid out like one."""

    path: str
    name: Optional[str] = None
    split: str = "train"
    revision: Optional[str] = None


@dataclass
class Corpus:
    """Unlabelled text; with `packaged` and nothing else, the text of the demo."""

    files: list[str]
    datasets: list[HubDataset]
    text_column: str
    pretokenized: bool
    split: str
    packing: bool
    block_length: int
    held_out_fraction: float
    packaged: bool = False


@dataclass
class Recipe:
    """What the run does.

    Attributes:
        name: finetune and prepare_corpus distil nothing; every other name does.
        models: Which models are fine-tuned on the tasks.
        keep_models: Whether the fine-tuned model that validates best stays in the run folder.
        stages: By name, in their order, see `StageGiven`; none is one stage with the settings of
            the run.
    """

    name: str
    models: list[str]
    keep_models: bool
    stages: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageGiven:
    """A stage as a recipe gives it.

    Attributes:
        data: What it reads: corpus, or task, the training examples of each task of the run in turn.
            There, teacher and student have a head; a teacher that is no stage on a task itself is
            fine-tuned on it first.
        teacher: `teacher`, or the name of an earlier stage whose student it is.
        start: Name of an earlier stage whose student goes on learning; null builds one anew.
        student: Differences from the group student, and likewise the next three.
        objective: An objective instead of the run's.
        task_training: On a task, differences from its fine-tuning settings.
        head_only: On a task, whether only the head learns.
    """

    data: str = "corpus"
    teacher: str = "teacher"
    start: Optional[str] = None
    student: dict[str, Any] = field(default_factory=dict)
    layer_selection: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    objective: Optional[dict[str, Any]] = None
    task_training: dict[str, Any] = field(default_factory=dict)
    head_only: bool = False


@dataclass
class Baseline:
    """The model beside which the student's speed is measured; its weights do not matter.

    Attributes:
        name: `teacher`, or a name for the shape that follows.
        model_type: The architecture; this and the sizes are null for the teacher.
        num_batches: Batches that both models read in turn.
        batch_size: Sequences of a batch.
    """

    name: str
    num_batches: int
    batch_size: int
    model_type: Optional[str]
    vocab_size: Optional[int]
    num_layers: Optional[int]
    hidden_size: Optional[int]
    num_attention_heads: Optional[int]
    intermediate_size: Optional[int]
    max_position_embeddings: Optional[int]


@dataclass
class Training:
    """Distillation, counted in optimiser steps."""

    max_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: float
    max_grad_norm: float
    hidden_dropout: float
    attention_dropout: float
    precision: str
    logging_steps: int
    evaluation_steps: int
    evaluation_sequences: int
    checkpoint_steps: int
    keep_checkpoints: int


@dataclass
class Runtime:
    """What may change speed, never results beyond rounding."""

    device: str
    microbatch_size: Optional[int]
    num_threads: Optional[int]
    num_workers: int
    compile: bool
    relation_kernel: str
    teacher_cache: str
    teacher_cache_gb: float


@dataclass
class Tracking:
    """Where MLflow records the run."""

    uri: str
    experiment: str


@dataclass
class Settings:
    """Everything that a run needs to know."""

    teacher: Teacher
    student: Student
    relation_set: RelationSet
    layer_selection: LayerSelection
    objective: Objective
    corpus: Corpus
    task_training: TaskTraining
    recipe: Recipe
    training: Training
    runtime: Runtime
    tracking: Tracking
    baseline: Baseline
    seed: int
    data_root: Optional[str]
    outputs_dir: str
    resume: bool
    rerun: bool
    profile: bool
    tasks: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    # Of class Stage, which OmegaConf needs not know.
    stages: list[Any] = field(default_factory=list)
    # What a stage reads, of which these are the settings: corpus or task.
    data: str = "corpus"

    @property
    def chain(self) -> list[Stage]:
        """The stages, one at least."""
        return self.stages or [Stage("distil", "teacher", None, self)]

    @property
    def corpus_stages(self) -> list[Stage]:
        """Those that read the corpus; they come first."""
        return [stage for stage in self.chain if stage.settings.data == "corpus"]

    @property
    def task_stages(self) -> list[Stage]:
        """Those that read the tasks' data."""
        return [stage for stage in self.chain if stage.settings.data == "task"]

    @property
    def origin(self) -> Stage:
        """The stage that gives the run's student, or, on tasks alone, builds it."""
        stages = {stage.name: stage for stage in self.chain}
        stage = self.chain[-1]
        while stage.settings.data == "task" and stage.start is not None:
            stage = stages[stage.start]
        return stage

    @property
    def outputs(self) -> Path:
        """The folder of run folders, caches and the tracking database."""
        return Path(self.outputs_dir)

    @property
    def unread_groups(self) -> list[str]:
        """Groups whose values make no difference to what is computed."""
        if self.recipe.name != "finetune":
            unread = [] if self.objective.reads_relation_set else ["relation_set"]
            unread += [] if self.objective.is_read else ["objective"]
            if not self.corpus_stages:
                unread += ["training"]
                unread += [] if "next_passage" in self.tasks else ["corpus"]
            return unread
        unread = ["relation_set", "layer_selection", "objective", "training"]
        unread += [group for group in ("teacher", "student") if group not in self.recipe.models]
        if "next_passage" not in self.tasks:
            unread.append("corpus")
        return unread

    @property
    def objective_name(self) -> str:
        """As in the papers' tables: MiniLMv2 by its relations."""
        if self.objective.reads_relation_set and self.objective.name == "minilmv2":
            return self.relation_set.name
        return self.objective.name

    @property
    def student_name(self) -> str:
        """The shape of the run's student, the last stage's, as in the papers."""
        student = self.chain[-1].settings.student
        return f"l{student.num_layers}h{student.hidden_size}"


@dataclass
class Stage:
    """A stage of a recipe: `StageGiven` with the settings that it runs with.

    Attributes:
        task_training: Differences from the settings of a fine-tuning.
        head_only: Whether only the head learns.
        num_positions: Of its student.
        is_pruned: Whether its student reads fewer tokens than the teacher of the run.
    """

    name: str
    teacher: str
    start: str | None
    settings: Settings
    task_training: dict[str, Any] = field(default_factory=dict)
    head_only: bool = False
    num_positions: int = 0
    is_pruned: bool = False


def parse(
    config: DictConfig,
    teacher_was_chosen: bool = True,
    typed: Container[str] = frozenset(),
    data: str = "corpus",
) -> Settings:
    """The typed settings of one run.

    Args:
        config: The composed config.
        teacher_was_chosen: False where the teacher group is at its default. A teacher.path then
            brings its own facts; otherwise they must agree with the chosen teacher's.
        typed: Names of the settings that were given on the command line; a teacher.path does not
            replace those.
        data: What the stage reads, of which these are the settings.

    Raises:
        ExperimentError: A key or value is wrong, missing, or does not fit another one.
    """
    config = config.copy()
    OmegaConf.set_struct(config, False)
    for name in ("notes", "stages", "data"):
        if name in config:
            raise ExperimentError(
                f"there is no setting {name}: it is misspelt, or belongs elsewhere"
            )
    given = (config.recipe.get("stages") or {}).values()
    is_objective_read = not given or any(node.get("objective") is None for node in given)
    read = [config.recipe, *([config.objective] if is_objective_read else [])]
    config.objective.reads_relation_set = "${relation_set." in OmegaConf.to_yaml(read)
    config.objective.is_read = is_objective_read
    if "objective" in typed and not is_objective_read:
        raise ExperimentError(
            f"objective={config.objective.name} makes no difference with"
            f" recipe={config.recipe.name}, whose stages name their own: leave it out, or choose"
            " objective@recipe.stages.STAGE.objective=NAME"
        )
    config.outputs_dir = os.path.abspath(os.path.expanduser(str(config.outputs_dir)))
    student_facts = _complete_student(config)
    notes = _complete_teacher(config, teacher_was_chosen, typed)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Settings), config)
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ExperimentError(_explain(error)) from error
    assert isinstance(settings, Settings)
    settings.data = data
    settings.notes.extend(notes)
    settings.runtime.teacher_cache = settings.runtime.teacher_cache.lower()  # YAML's true and false
    settings.tasks = parse_tasks(settings.tasks)
    settings.objective.terms = parse_terms(settings.objective.terms)
    if settings.data_root is not None:
        settings.data_root = os.path.abspath(os.path.expanduser(settings.data_root))
    for name in ("relations", "relation_set", *(f"relation_set.{n}" for n in _RELATION_SETTINGS)):
        if name in typed and not settings.objective.reads_relation_set:
            named = f"objective={settings.objective.name}, which names"
            if not is_objective_read:
                named = f"recipe={settings.recipe.name}, whose objectives name"
            raise ExperimentError(
                f"{name} makes no difference with {named} their own relations: leave it out, or set"
                " those of the objective"
            )
    _check_values(settings)
    _check_baseline(settings.baseline)
    settings.stages = _parse_stages(config)
    if not settings.stages:
        _resolve_init(settings)
        if settings.recipe.name not in _WITHOUT_STAGES:
            raise ExperimentError(
                f"recipe={settings.recipe.name} has no stages: give recipe.stages, or choose one of"
                f" {', '.join(_WITHOUT_STAGES)}"
            )
    if settings.recipe.name == "teacher_assistant":
        settings.notes.append(_assistant_note(settings))
    if settings.recipe.name == "finetune":
        _check_finetune(settings)
    elif not settings.stages:
        _check_student(settings, student_facts)
        _check_objective(settings)
        _check_init(settings)
    if "corpus" not in settings.unread_groups:
        _check_corpus(settings)
    check_tasks(settings.tasks, settings.task_training, _max_tokens(settings, student_facts))
    return settings


def _parse_stages(config: DictConfig) -> list[Stage]:
    """Each stage's settings are those of the run with the stage's own merged over them."""
    stages: dict[str, Stage] = {}
    for name in config.recipe.get("stages") or {}:
        where = f"recipe.stages.{name}"
        if name == "teacher":
            raise ExperimentError(f"{where}: teacher is the name of the run's own; choose another")
        try:
            node = OmegaConf.merge(OmegaConf.structured(StageGiven), config.recipe.stages[name])
            assert isinstance(node, DictConfig)
            # ${teacher.num_layers} is that of the run, not of the stage's own teacher.
            node._set_parent(config)
            given = {
                group: OmegaConf.to_container(node[group], resolve=True)
                for group in ("student", "layer_selection", "corpus", "training", "task_training")
            }
        except OmegaConfBaseException as error:
            raise ExperimentError(f"{where}: {_explain(error)}") from error
        for key in ("teacher", "start"):
            earlier = [*stages, "teacher"] if key == "teacher" else [*stages, None]
            if node[key] not in earlier:
                raise ExperimentError(
                    f"{where}.{key}={node[key]} is not one of the stages before it"
                    f" ({', '.join(stages) or 'there is none'})"
                )
        if node.start is not None and given["student"]:
            raise ExperimentError(
                f"{where}.student={given['student']}: the stage goes on with the student of"
                f" {node.start}, which has its shape; leave out student or start"
            )
        _check_reads(where, node, given, stages)
        changes_of_task: Any = given.pop("task_training")
        own = config.copy()
        own.recipe.name, own.recipe.stages = "task_agnostic", {}
        for group, changes in given.items():
            own[group] = OmegaConf.merge(own[group], changes)
        if node.objective is not None:
            own.objective = config.recipe.stages[name].objective
        if node.teacher != "teacher":
            _become_teacher(own, stages[node.teacher])
        if node.start is not None:
            _continue(own, stages[node.start].settings.student)
        try:
            settings = parse(own, data=node.data)
            stage = Stage(
                name, node.teacher, node.start, settings, changes_of_task, bool(node.head_only)
            )
            _carry_facts(stage, stages)
            _check_head(stage, stages)
        except ExperimentError as error:
            raise ExperimentError(f"{where}: {error}") from error
        stages[name] = stage
    last = next(reversed(stages.values()), None)
    if last is not None and last.settings.data == "task":
        if "student" not in config.recipe.models:
            raise ExperimentError(
                f"recipe.models={[*config.recipe.models]} has no student, which the stages on a"
                " task train: add it, or use recipe=finetune"
            )
        if not trains_head(last.settings.objective.terms):
            raise ExperimentError(
                f"recipe.stages.{last.name}: the last stage on a task is scored as it is, and"
                f" objective={last.settings.objective.name} does not train the head: add a term"
                " logits or labels, or a stage after it"
            )
    return list(stages.values())


def _check_reads(
    where: str, node: DictConfig, given: dict[str, Any], earlier: dict[str, Stage]
) -> None:
    """Whether a stage's settings are of use with the data that it reads."""
    if node.data not in ("corpus", "task"):
        raise ExperimentError(f"{where}.data={node.data} is not corpus or task")
    on_task = node.data == "task"
    for key in ("corpus", "training") if on_task else ("task_training",):
        if given[key]:
            raise ExperimentError(
                f"{where}.{key}={given[key]} makes no difference with data={node.data}:"
                f" set {'task_training' if on_task else 'training'} instead"
            )
    if node.head_only and not on_task:
        raise ExperimentError(f"{where}.head_only=true needs data=task")
    before = [stage.name for stage in earlier.values() if stage.settings.data == "task"]
    if before and not on_task:
        raise ExperimentError(
            f"{where}: a stage on the corpus comes before those on a task ({', '.join(before)})"
        )


def _check_head(stage: Stage, earlier: dict[str, Stage]) -> None:
    """Whether both models have the head that the objective asks for."""
    settings = stage.settings
    needs_head = trains_head(settings.objective.terms)
    if settings.data == "corpus":
        if needs_head and stage.teacher != "teacher":
            raise ExperimentError(
                f"objective={settings.objective.name} needs a teacher with a head of masked"
                f" language modelling, which the student of stage {stage.teacher} has not"
            )
        soft = [n for n, term in settings.objective.terms.items() if isinstance(term, LogitTerm)]
        if soft and stage.is_pruned:
            raise ExperimentError(
                f"objective.terms.{soft[0]}: the teacher predicts tokens that the student has not;"
                " set student.vocabulary=full"
            )
        return
    fixed = [name for name, task in settings.tasks.items() if task.kind == "similarity"]
    if not settings.tasks or fixed:
        named = f"task={fixed[0]} trains nothing" if fixed else "there is no task"
        raise ExperimentError(f"data=task needs tasks to learn, but {named}: set task=NAME")
    if stage.start is None and settings.student.vocabulary != "full":
        raise ExperimentError(
            f"student.vocabulary={settings.student.vocabulary}: the corpus says what stays, and"
            " this stage reads a task; give a stage on the corpus as its start"
        )
    others = [
        name
        for name, term in settings.objective.terms.items()
        if not isinstance(term, (LogitTerm, LabelTerm))
    ]
    if stage.head_only and others:
        raise ExperimentError(
            f"head_only=true: the objective's terms {', '.join(others)} do not reach the head;"
            " leave them out"
        )
    positions = min(stage.num_positions, settings.teacher.max_position_embeddings)
    stage.task_training = parse_changes(
        stage.task_training,
        settings.tasks,
        settings.task_training,
        max_tokens(settings.teacher.model_type, positions),
    )


def _carry_facts(stage: Stage, earlier: dict[str, Stage]) -> None:
    """What a stage's student has from its checkpoint, teacher or start."""
    settings = stage.settings
    source = settings.student.config or settings.student.path
    if stage.start is not None:
        before = earlier[stage.start]
        stage.num_positions, stage.is_pruned = before.num_positions, before.is_pruned
    elif source is not None:
        facts = read_facts(str(source), None)
        stage.num_positions = facts["max_position_embeddings"]
        stage.is_pruned = facts["vocab_size"] < settings.teacher.vocab_size
    else:
        stage.num_positions = settings.teacher.max_position_embeddings
        stage.is_pruned = settings.student.vocabulary == "prune_to_corpus"
    if stage.teacher != "teacher":
        stage.is_pruned = stage.is_pruned or earlier[stage.teacher].is_pruned
    if settings.data == "task":
        return
    longest = max_tokens(settings.teacher.model_type, stage.num_positions)
    if settings.corpus.block_length > longest:
        raise ExperimentError(
            f"corpus.block_length={settings.corpus.block_length} is above the {longest} positions"
            " of the student"
        )
    if stage.is_pruned and settings.corpus.pretokenized:
        raise ExperimentError(_NO_TOKEN_IDS)


_NO_TOKEN_IDS = (
    "corpus.pretokenized=true has the teacher's token ids, which a student with fewer tokens cannot"
    " read: give text"
)


def _assistant_note(settings: Settings) -> str:
    """Whether MiniLM (section 3.3) would use an assistant here."""
    teacher, student = settings.teacher, settings.student
    holds = (
        2 * student.num_layers <= teacher.num_layers
        and 2 * student.hidden_size <= teacher.hidden_size
    )
    return (
        "recipe=teacher_assistant: MiniLM uses an assistant where the student has at most half of"
        f" the teacher's layers and half of its hidden size; {student.num_layers} of"
        f" {teacher.num_layers} and {student.hidden_size} of {teacher.hidden_size}"
        f" {'are' if holds else 'are not, so nothing is known of its use here'}"
    )


def _become_teacher(config: DictConfig, stage: Stage) -> None:
    """Gives the group teacher the facts of an earlier stage's student."""
    student, teacher = stage.settings.student, stage.settings.teacher
    wanted_heads = config.teacher.num_relation_heads
    config.teacher = asdict(teacher) | {
        "name": stage.name,
        "hub_id": None,
        "revision": None,
        "package": None,
        "path": None,
        "num_layers": student.num_layers,
        "hidden_size": student.hidden_size,
        "num_attention_heads": student.num_attention_heads,
        "intermediate_size": student.intermediate_size or 4 * student.hidden_size,
        "max_position_embeddings": stage.num_positions,
        "paper_layer": student.num_layers,
        "upper_middle_layer": round(5 * student.num_layers / 6),
        "num_relation_heads": _fitting_heads(
            wanted_heads, student.hidden_size, config.student.hidden_size
        ),
    }


def _continue(config: DictConfig, student: Student) -> None:
    """The shape of the student that goes on; its weights come from the stage's folder."""
    changes = {"init": "random", "vocabulary": "full", "path": None, "config": None}
    config.student = asdict(student) | changes


def _max_tokens(settings: Settings, student_facts: dict[str, Any] | None) -> int | None:
    """Positions of every model that is fine-tuned."""
    longest = []
    if "teacher" not in settings.unread_groups:
        longest.append(settings.teacher.max_tokens)
    if student_facts is not None:
        longest.append(
            max_tokens(student_facts["model_type"], student_facts["max_position_embeddings"])
        )
    return min(longest, default=None)


def _check_finetune(settings: Settings) -> None:
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


def _resolve_init(settings: Settings) -> None:
    student, teacher = settings.student, settings.teacher
    if student.init != "auto" or student.path is not None:
        return
    intermediate_size = student.intermediate_size or 4 * student.hidden_size
    agree = (
        student.hidden_size == teacher.hidden_size
        and student.num_attention_heads == teacher.num_attention_heads
        and intermediate_size == teacher.intermediate_size
        and student.num_layers <= settings.layer_selection.teacher_layer
        and student.embedding_size is None
        and student.config is None
    )
    student.init = "teacher_layers" if agree else "random"
    reason = "have the same sizes" if agree else "differ in size, or not 4 x wide inside"
    settings.notes.append(
        f"student.init=auto: {student.init}, because student and teacher layers {reason}"
    )


def _explain(error: OmegaConfBaseException) -> str:
    message = str(error).splitlines()[0]
    key = error.full_key or ""
    if "missing mandatory value" in message.lower():
        return f"{key} has no value and has no default: add {key}=VALUE"
    if "not in" in message and "Key" in message:
        return f"there is no setting {key}: it is misspelt, or belongs elsewhere"
    if "ListConfig" in message:
        return f"{key} takes a list: {key}=[...]"
    return f"{key}: {message}" if key else message


def _complete_teacher(
    config: DictConfig, teacher_was_chosen: bool, typed: Container[str]
) -> list[str]:
    """Facts of a teacher that is given by path and not by name, from its own config.json."""
    teacher = config.teacher
    if OmegaConf.is_missing(teacher, "path"):
        raise ExperimentError("teacher=custom needs teacher.path=FOLDER_OR_HUB_ID")
    if teacher.get("path") is None:
        return []
    is_custom = teacher.get("name") == "custom"
    if not is_custom and "teacher.revision" not in typed:
        teacher.revision = None  # the revision of another repository
    if teacher_was_chosen and not is_custom:
        return []
    facts = read_facts(str(teacher.path), teacher.get("revision"))
    num_layers = facts["num_layers"]
    upper_middle_layer = round(5 * num_layers / 6)
    wanted_heads = 48 if facts["hidden_size"] <= 768 else 64
    facts |= {
        "name": Path(str(teacher.path)).name,
        "hub_id": None,
        "package": None,
        "paper_layer": num_layers,
        "upper_middle_layer": upper_middle_layer,
        "num_relation_heads": _fitting_heads(
            wanted_heads, facts["hidden_size"], config.student.hidden_size
        ),
    }
    for name, value in facts.items():
        given = f"teacher.{name}" in typed or (is_custom and teacher.get(name) is not None)
        if name == "name" or not given:
            teacher[name] = value
    return [
        f"teacher.path: facts read from its config.json; layer {teacher.paper_layer},"
        f" {teacher.num_relation_heads} relation heads (by default the last layer, and the papers'"
        f" {wanted_heads} heads or the next lower number that divides both hidden sizes)"
    ]


def _fitting_heads(wanted: int, teacher_hidden_size: int, student_hidden_size: Any) -> int:
    if not isinstance(student_hidden_size, int) or student_hidden_size < 1:
        return wanted  # what is no size is refused with the other values
    common = math.gcd(teacher_hidden_size, student_hidden_size)
    return max(number for number in range(1, wanted + 1) if common % number == 0)


def _complete_student(config: DictConfig) -> dict[str, Any] | None:
    """The shape that student.config or student.path gives, instead of the group's numbers."""
    source = config.student.get("config") or config.student.get("path")
    if source is None:
        return None
    if config.student.get("config") and config.student.get("path"):
        raise ExperimentError("give student.config or student.path, not both")
    setting = "student.config" if config.student.get("config") else "student.path"
    if not Path(str(source)).expanduser().exists():
        raise ExperimentError(f"{setting}: {source} does not exist here")
    facts = read_facts(str(source), None)
    for name in ("num_layers", "hidden_size", "num_attention_heads", "intermediate_size"):
        config.student[name] = facts[name]
    return facts


def _check_student(settings: Settings, facts: dict[str, Any] | None) -> None:
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
        raise ExperimentError(_NO_TOKEN_IDS)
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


def _check_values(settings: Settings) -> None:
    training, student, runtime = settings.training, settings.student, settings.runtime
    for name, value, choices in (
        ("teacher.weights", settings.teacher.weights, ("pretrained", "random")),
        ("student.init", student.init, ("random", "teacher_layers", "auto")),
        ("student.vocabulary", student.vocabulary, ("full", "prune_to_corpus")),
        ("corpus.split", settings.corpus.split, ("document", "sentence")),
        *(("recipe.models", name, ROLES) for name in settings.recipe.models),
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
    positive: dict[str, float | None] = {
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


def _check_baseline(baseline: Baseline) -> None:
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


_WITHOUT_STAGES = ("task_agnostic", "finetune", "prepare_corpus")

_RELATION_SETTINGS = ("pairs", "num_relation_heads")

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


def _check_objective(settings: Settings) -> None:
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


def init_layers(student: Student, teacher_layer: int) -> list[int]:
    """The teacher's layers, counted from 1, that a student of teacher layers begins with.

    Args:
        student: Its num_layers (M) and init_layers.
        teacher_layer: The layer that is distilled (l); no layer above it is of use.

    Returns:
        evenly: round(m l / M) for m = 1..M. every_second: 2, 4, .. 2M. first: 1..M. last: the M
        layers up to l. Or the list that was given.
    """
    number = student.num_layers
    if isinstance(student.init_layers, list):
        return [int(layer) for layer in student.init_layers]
    return {
        "evenly": [round((m + 1) * teacher_layer / number) for m in range(number)],
        "every_second": [2 * (m + 1) for m in range(number)],
        "first": [m + 1 for m in range(number)],
        "last": [teacher_layer - number + m + 1 for m in range(number)],
    }[student.init_layers]


def _check_init_layers(settings: Settings) -> None:
    student, highest = settings.student, settings.teacher.num_layers
    given = student.init_layers
    is_list = isinstance(given, list) and all(type(layer) is int for layer in given)
    if not is_list and given not in ("evenly", "every_second", "first", "last"):
        raise ExperimentError(
            f"student.init_layers={given} is not evenly, every_second, first, last or a list of"
            " the teacher's layers"
        )
    layers = init_layers(student, settings.layer_selection.teacher_layer)
    if len(layers) != student.num_layers:
        raise ExperimentError(
            f"student.init_layers={given} names {len(layers)} layers, but"
            f" student.num_layers={student.num_layers}"
        )
    if min(layers) < 1 or max(layers) > highest:
        raise ExperimentError(
            f"student.init_layers={given} takes the layers {layers}; the teacher has 1..{highest}"
        )


def _check_init(settings: Settings) -> None:
    if settings.student.init != "teacher_layers" or settings.student.path is not None:
        if settings.student.init_layers != "evenly":
            raise ExperimentError(
                f"student.init_layers={settings.student.init_layers} makes no difference: set"
                " student.init=teacher_layers, without student.path"
            )
        return
    layer = settings.layer_selection.teacher_layer
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


def _check_corpus(settings: Settings) -> None:
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
        and "next_passage" in settings.tasks
        and settings.recipe.name != "prepare_corpus"
    ):
        raise ExperimentError(
            "task=next_passage is made from text; pretokenized input has none: set task=none"
        )
    for pattern in settings.corpus.files:
        if not matching_files(pattern):
            raise ExperimentError(
                f"corpus.files: no file matches {pattern} (seen from {os.getcwd()})"
            )


def matching_files(pattern: str) -> list[Path]:
    """Files that a glob names, in a fixed order; ~ is the home folder."""
    names = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    return [Path(name) for name in names if os.path.isfile(name)]


def flatten(settings: Settings) -> dict[str, Any]:
    """The settings as dotted names and plain values, without what is null."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                visit(f"{prefix}.{key}" if prefix else key, value)
        elif node is not None:
            flat[prefix] = node

    visit("", as_dict(settings))
    return flat


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings as plain nested data."""
    plain = asdict(replace(settings, stages=[]))
    del plain["notes"], plain["stages"], plain["data"]
    return plain
