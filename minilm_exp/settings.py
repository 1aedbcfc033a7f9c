"""The settings of a run as one typed object.

`parse` in parsing.py makes it of the composed config. What it accepts fits together: every later
module takes values from these classes and need not check them again. Nothing heavy is imported
here, so that a mistake in the config is reported at once.
"""

from __future__ import annotations

import glob
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from minilm_exp.objective_settings import Objective
from minilm_exp.task_settings import MADE_FROM_CORPUS, TaskTraining

# The models that a run can fine-tune; the second is the student before it was distilled.
ROLES = ("student", "undistilled", "teacher")
# Settings that change no result, only where, how fast and how often it is computed.
NEUTRAL = ("runtime", "tracking", "outputs_dir", "data_root", "resume", "rerun", "profile",
           "trial_values", "num_trials", "export", "push_to", "report")  # fmt: skip
# Copies of a model for use elsewhere, see `export_model`.
EXPORTS = ("onnx", "onnx_int8", "torch_int8")
# What a trial of a sweep can return.
TRIAL_VALUES = ("score", "speedup", "parameters")


@dataclass
class Teacher:
    """The model that is distilled, and the facts that its checkpoint must confirm.

    Attributes:
        head: On tasks, new: it is fine-tuned on each; own: it predicts with the head of sequence
            classification that its checkpoint has, and is not trained.
        pooling: mean or first_token, by which a sentence encoder makes embeddings of its states.
    """

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
    # Whether code that its checkpoint brings along is run.
    trust_remote_code: bool = False
    head: str = "new"
    pooling: Optional[str] = None

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
class Budget:
    """What the student may cost; its shape is then the largest of those that were measured.

    Attributes:
        speedup: At least so many times faster than the teacher.
        params: At most so many parameters, embeddings included and the pooler not: 20M, 500k.
        latency_ms: At most so many milliseconds for a batch.
        batch_size: Sequences of the batch that is timed; null: those of the baseline, whose lengths
            are QNLI's, or 1 with latency_ms.
        sequence_length: Tokens of each; null: QNLI's lengths, or 128 with latency_ms.
        threads: Of the timing, if not those of the run.
        num_layers: Numbers of layers that are tried, instead of shares of the teacher's.
        hidden_sizes: Hidden sizes that are tried, instead of shares of the teacher's.
        search: none, or quick: a few settings are compared first, by short runs.
        search_share: Of training.max_steps, which all the short runs have together.
        remeasure: Measures although this machine has done so before.
    """

    speedup: Optional[float] = None
    params: Any = None
    latency_ms: Optional[float] = None
    batch_size: Optional[int] = None
    sequence_length: Optional[int] = None
    threads: Optional[int] = None
    num_layers: Optional[list[int]] = None
    hidden_sizes: Optional[list[int]] = None
    search: str = "none"
    search_share: float = 0.3
    remeasure: bool = False


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
    budget: Budget = field(default_factory=Budget)


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
    shard_teacher: bool


@dataclass
class Tracking:
    """Where MLflow records the run, and Optuna the studies of sweeps.

    Attributes:
        uri: MLflow's server or database.
        experiment: Name of the experiment there.
        studies: Database of the studies.
        retry_seconds: How long one that stops answering is asked again.
    """

    uri: str
    experiment: str
    studies: str
    retry_seconds: float = 300


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
    trial_values: list[str] = field(default_factory=lambda: ["score"])
    num_trials: int = 30
    export: list[str] = field(default_factory=list)
    push_to: Optional[str] = None
    report: bool = True
    # Of class Stage, which OmegaConf needs not know.
    stages: list[Any] = field(default_factory=list)
    # The shapes among which a budget chose.
    candidates: list[Any] = field(default_factory=list)
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
    def pushes_task_model(self) -> bool:
        """Whether what the run is for is a model of a task, not an encoder."""
        return self.recipe.name == "finetune" or bool(self.task_stages)

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
                unread += [] if self.has_task_of_corpus else ["corpus"]
            return unread
        unread = ["relation_set", "layer_selection", "objective", "training"]
        unread += [group for group in ("teacher", "student") if group not in self.recipe.models]
        if not self.has_task_of_corpus:
            unread.append("corpus")
        return unread

    @property
    def has_task_of_corpus(self) -> bool:
        """Whether a task is made from the corpus."""
        return any(name in MADE_FROM_CORPUS for name in self.tasks)

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


def init_layers(student: Student, teacher_layer: int, num_teacher_layers: int) -> list[int]:
    """The teacher's layers, counted from 1, that a student of teacher layers begins with.

    Args:
        student: Its num_layers (M) and init_layers.
        teacher_layer: The layer that is distilled (l).
        num_teacher_layers: Of the teacher (L).

    Returns:
        evenly: round(m l / M) for m = 1..M. whole: round(m L / M), whichever layer is distilled.
        every_second: 2, 4, .. 2M. first: 1..M. last: the M layers up to l. Or the list that was
        given.
    """
    number = student.num_layers
    if isinstance(student.init_layers, list):
        return [int(layer) for layer in student.init_layers]
    return {
        "evenly": [round((m + 1) * teacher_layer / number) for m in range(number)],
        "whole": [round((m + 1) * num_teacher_layers / number) for m in range(number)],
        "every_second": [2 * (m + 1) for m in range(number)],
        "first": [m + 1 for m in range(number)],
        "last": [teacher_layer - number + m + 1 for m in range(number)],
    }[student.init_layers]


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
    for name in ("notes", "stages", "data", "candidates"):
        del plain[name]
    return plain
