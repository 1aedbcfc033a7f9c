"""Downstream tasks and how they are fine-tuned, as the config states them."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Optional

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minilm_exp.errors import ExperimentError, key_of

KINDS = ("classification", "regression", "spans", "similarity", "generation")
METRICS = {
    "classification": ("accuracy", "f1", "macro_f1", "macro_recall", "matthews"),
    "regression": ("pearson", "spearman"),
    "spans": ("squad", "squad_v2", "mlqa"),
    "similarity": ("pearson", "spearman"),
    "generation": ("rouge1", "rouge2", "rougeL", "bleu4", "meteor"),
}
# Architectures that can write.
WRITERS = ("bert", "roberta", "xlm-roberta")
# What the span metrics are made of.
SPAN_VALUES = ("exact_match", "f1")


@dataclass
class NextPassage:
    """The task that is made from the corpus itself."""

    version: int
    num_train: int
    num_validation: int
    passage_characters: int

    kind: ClassVar[str] = "classification"
    family: ClassVar[str] = "glue"
    metrics: ClassVar[list[str]] = ["accuracy"]
    score: ClassVar[str] = "accuracy"
    selected_by: ClassVar[str] = "accuracy"
    num_labels: ClassVar[int] = 2
    is_trained: ClassVar[bool] = True


@dataclass
class TeacherLabels:
    """The corpus, labelled by the teacher: a classifier without labelled data.

    Attributes:
        num_train: Texts to train on, at most.
        num_validation: Held-out texts to score on, at most.
    """

    version: int
    num_train: int
    num_validation: int

    kind: ClassVar[str] = "classification"
    family: ClassVar[str] = "glue"
    metrics: ClassVar[list[str]] = ["accuracy", "macro_f1"]
    score: ClassVar[str] = "accuracy"
    selected_by: ClassVar[str] = "accuracy"
    num_labels: ClassVar[Optional[int]] = None
    is_trained: ClassVar[bool] = True


@dataclass
class HubData:
    """A data set of the hub, and its folder where tasks.data_root holds a copy.

    `{language}` stands for each language in turn. `hub_folder` names a folder of the data set whose
    files are read, for one that has no configs.
    """

    hub_id: str
    hub_config: Optional[str]
    revision: Optional[str]
    folder: str
    hub_folder: Optional[str] = None


@dataclass
class Files:
    """The user's own data, a file (or several that a glob names) for each split."""

    train: Optional[str] = None
    validation: Optional[str] = None
    test: Optional[str] = None


@dataclass
class Task:
    """A task with labelled data.

    Attributes:
        version: Raised when the task's definition changes.
        kind: classification, regression, spans (answers cut from a text), similarity (of sentence
            embeddings, which are scored as they are), or generation (a text is written).
        family: Which of the option's settings train it.
        data: Where its data are; `files` instead for the user's own.
        train_data: Where the training split is, if elsewhere.
        train: Name of the training split; similarity needs none.
        validation: Names of the validation splits; none: a share of the training split.
        test: Names of the test splits, which are scored with task_training.test=true only.
        held_out_fraction: The share of the training split that validates where no split does.
        languages: Of a cross-lingual task, those that are scored; null: all that there are.
        all_languages: Languages of the data set.
        train_language: The language that is trained on.
        text_columns: One or two, of classification and regression; of generation the source.
        label_column: Whole numbers from 0 for classification (or names, in files).
        target_column: Of generation: what is to be written.
        null_threshold: Of questions that may have no answer: the answer is empty where the null
            score is above that of the best span by more.
        pooling: How a sentence is embedded for similarity: mean, or first_token.
        num_labels: Classes; null in files: those of the training file.
        metrics: Computed on each validation split.
        score: The value that stands for the task, such as accuracy_matched or f1_mean.
        select: The value by which the best epoch is chosen; null: the score.
    """

    version: int
    kind: str
    family: str
    metrics: list[str]
    score: str
    select: Optional[str] = None
    data: Optional[HubData] = None
    train_data: Optional[HubData] = None
    files: Optional[Files] = None
    train: str = "train"
    validation: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    held_out_fraction: float = 0.1
    languages: Optional[list[str]] = None
    all_languages: list[str] = field(default_factory=list)
    train_language: str = "en"
    text_columns: list[str] = field(default_factory=list)
    label_column: str = "label"
    num_labels: Optional[int] = None
    null_threshold: float = 0.0
    pooling: str = "mean"
    target_column: Optional[str] = None

    @property
    def is_trained(self) -> bool:
        """Whether a model is fine-tuned on it before it is scored."""
        return self.kind != "similarity"

    @property
    def selected_by(self) -> str:
        """The value that chooses the best epoch."""
        return self.select or self.score


# Tasks that are made from the corpus, by their names.
MADE_FROM_CORPUS: dict[str, Any] = {"next_passage": NextPassage, "teacher_labels": TeacherLabels}
AnyTask = NextPassage | TeacherLabels | Task


@dataclass
class TaskSettings:
    """How one task is fine-tuned.

    Attributes:
        epochs: Passes over the training examples.
        batch_size: Examples (windows, for spans) of an optimiser step.
        learning_rate: Peak of a linear warmup and decay.
        warmup_ratio: Share of the steps that warm up.
        weight_decay: Of AdamW.
        hidden_dropout: While fine-tuning.
        attention_dropout: While fine-tuning.
        max_length: Tokens; longer texts are cut, longer contexts become several windows.
        doc_stride: Tokens by which windows overlap.
        max_train_examples: At most so many, at even distances; null: all.
        max_validation_examples: The same for each validation and test split.
        max_target_length: Of generation, and so are the next: tokens of the target with its closing
            one. The source has the rest of max_length.
        min_target_length: As many are written at least.
        label_smoothing: Share of each target that all tokens have alike.
        num_beams: Of the search; 1 is greedy.
        length_penalty: Power of the length by which beam search divides a target's log probability.
        no_repeat_ngram_size: n-grams of so many tokens are written once, but for those with a full
            stop; 0 for no such rule.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    hidden_dropout: float
    attention_dropout: float
    max_length: int
    doc_stride: Optional[int] = None
    max_train_examples: Optional[int] = None
    max_validation_examples: Optional[int] = None
    max_target_length: Optional[int] = None
    min_target_length: Optional[int] = None
    label_smoothing: Optional[float] = None
    num_beams: Optional[int] = None
    length_penalty: Optional[float] = None
    no_repeat_ngram_size: Optional[int] = None

    def as_dict(self) -> dict[str, Any]:
        """By name; those of generation only where there is a value."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in GENERATION_SETTINGS or value is not None
        }


# What only the kind generation has.
GENERATION_SETTINGS = (
    "max_target_length", "min_target_length", "label_smoothing", "num_beams", "length_penalty",
    "no_repeat_ngram_size",
)  # fmt: skip
# They show in what is read: one above the size of the data changes nothing.
LIMITS = ("max_train_examples", "max_validation_examples")


@dataclass
class Grid:
    """Values that task_training.search=grid tries; empty: the one of the family."""

    learning_rate: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    batch_size: list[int] = field(default_factory=list)


@dataclass
class Family(TaskSettings):
    """Settings of a family of tasks, and the grid that the paper searched."""

    grid: Grid = field(default_factory=Grid)


@dataclass
class TaskTraining:
    """Fine-tuning on downstream tasks.

    Attributes:
        families: Settings for each family of tasks.
        exceptions: What one task of a family has otherwise.
        search: none, or grid: every cell of the grid is trained and the best one reported.
        num_seeds: Fine-tunings of each model on each task, with seeds of their own.
        test: Scores the test splits too, with the checkpoint that the validation split chose.
        checkpoint_steps: Steps after which an interrupted fine-tuning can go on; it can after each
            epoch too.
        overrides: The other attributes; a value replaces that of every family.
    """

    families: dict[str, Family]
    exceptions: dict[str, Any] = field(default_factory=dict)
    search: str = "none"
    num_seeds: int = 1
    test: bool = False
    checkpoint_steps: int = 500
    epochs: Optional[int] = None
    batch_size: Optional[int] = None
    learning_rate: Optional[float] = None
    warmup_ratio: Optional[float] = None
    weight_decay: Optional[float] = None
    hidden_dropout: Optional[float] = None
    attention_dropout: Optional[float] = None
    max_length: Optional[int] = None
    doc_stride: Optional[int] = None
    max_train_examples: Optional[int] = None
    max_validation_examples: Optional[int] = None
    max_target_length: Optional[int] = None
    min_target_length: Optional[int] = None
    label_smoothing: Optional[float] = None
    num_beams: Optional[int] = None
    length_penalty: Optional[float] = None
    no_repeat_ngram_size: Optional[int] = None

    def cells(self, name: str, task: AnyTask) -> list[TaskSettings]:
        """The settings that a task is trained with: one, or every cell of the search."""
        family = self._family(name, task)
        given = {f.name: getattr(self, f.name) for f in fields(TaskSettings)}
        given = {
            key: value
            for key, value in given.items()
            if value is not None and (task.kind == "generation" or key not in GENERATION_SETTINGS)
        }
        plain = {f.name: getattr(family, f.name) for f in fields(TaskSettings)} | given
        single = TaskSettings(**plain)
        if self.search == "none":
            return [single]
        tried = {key: values for key, values in asdict(family.grid).items() if values}
        if not tried:
            raise ExperimentError(
                f"task_training.search=grid: the chosen task_training has no grid for {name}; use"
                " task_training=minilmv2, or set"
                f" task_training.families.{task.family}.grid.learning_rate=[...]"
            )
        names = [key for key in tried if key not in given]
        return [
            replace(single, **dict(zip(names, values)))
            for values in itertools.product(*(tried[key] for key in names))
        ]

    def _family(self, name: str, task: AnyTask) -> Family:
        if task.family not in self.families:
            raise ExperimentError(
                f"tasks.{name}.family={task.family}: the chosen task_training has settings for"
                f" {', '.join(sorted(self.families))} only"
            )
        family = OmegaConf.structured(self.families[task.family])
        try:
            changed = OmegaConf.to_object(OmegaConf.merge(family, self.exceptions.get(name, {})))
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise ExperimentError(
                f"task_training.exceptions.{name}: {str(error).splitlines()[0]}"
            ) from error
        assert isinstance(changed, Family)
        return changed

    def seeds(self, seed: int) -> list[int]:
        """Seeds of the fine-tunings of a run: its own, then further ones far from it."""
        return [seed + 1000 * number for number in range(self.num_seeds)]


def parse_tasks(tasks: dict[str, Any]) -> dict[str, AnyTask]:
    """The typed tasks of the composed config's `tasks`.

    Raises:
        ExperimentError: A key or value is wrong or missing.
    """
    parsed: dict[str, AnyTask] = {}
    for name, node in tasks.items():
        schema = MADE_FROM_CORPUS.get(str(name), Task)
        try:
            typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            key = ".".join(filter(None, ("tasks", str(name), key_of(error))))
            message = str(error).splitlines()[0]
            if "missing mandatory value" in message.lower():
                message = f"no value is given: add {key}=VALUE, or choose a task with task=NAME"
            elif "not in" in message:
                message = "there is no such setting, or no such task: see --help"
            raise ExperimentError(f"{key}: {message}") from error
        assert isinstance(typed, (NextPassage, TeacherLabels, Task))
        parsed[name] = typed
    return parsed


def check_tasks(
    tasks: dict[str, AnyTask],
    training: TaskTraining,
    max_tokens: int | None,
    model_types: set[str],
) -> None:
    """Refuses tasks and fine-tuning settings that cannot work.

    Args:
        tasks: By name.
        training: The fine-tuning.
        max_tokens: Positions of the models that are fine-tuned; None where not known yet.
        model_types: Their architectures.

    Raises:
        ExperimentError: Names the value, the rule and the setting.
    """
    if training.search not in ("none", "grid"):
        raise ExperimentError(f"task_training.search={training.search} is not none or grid")
    _check_positive("task_training.num_seeds", training.num_seeds)
    _check_positive("task_training.checkpoint_steps", training.checkpoint_steps)
    _check_values("task_training", training)
    for family_name, family in training.families.items():
        where = f"task_training.families.{family_name}"
        _check_values(where, family)
        for key, values in vars(family.grid).items():
            for value in values:
                _check_positive(f"{where}.grid.{key}", value)
    for name, task in tasks.items():
        if not isinstance(task, Task):
            for key, value in vars(task).items():
                _check_positive(f"tasks.{name}.{key}", value)
        else:
            _check_task(name, task)
        silent = sorted(model_types - {*WRITERS})
        if task.kind == "generation" and silent:
            raise ExperimentError(
                f"task={name}: {silent[0]} cannot write; generation has {', '.join(WRITERS)}"
            )
        for cell in training.cells(name, task):
            _check_cell(name, task, cell, max_tokens)


def parse_changes(
    changes: dict[str, Any],
    tasks: dict[str, AnyTask],
    training: TaskTraining,
    max_tokens: int,
) -> dict[str, Any]:
    """What a stage has otherwise than the fine-tuning settings of its tasks.

    Args:
        changes: As given.
        tasks: By name.
        training: The fine-tuning.
        max_tokens: Positions of the stage's models.

    Raises:
        ExperimentError: A name or value is wrong.
    """
    limits = [name for name in LIMITS if name in changes]
    if limits:
        raise ExperimentError(f"task_training.{limits[0]} is the same in all stages: set the run's")
    typed: dict[str, Any] = {}
    for name, task in tasks.items():
        for cell in training.cells(name, task):
            plain = OmegaConf.structured(cell)
            try:
                changed = OmegaConf.to_object(OmegaConf.merge(plain, changes))
            except (OmegaConfBaseException, TypeError, ValueError) as error:
                message = str(error).splitlines()[0]
                if "not in" in message:
                    names = [f.name for f in fields(TaskSettings) if f.name not in LIMITS]
                    message = f"a stage can change {', '.join(names)}"
                raise ExperimentError(f"task_training.{key_of(error)}: {message}") from error
            assert isinstance(changed, TaskSettings)
            _check_cell(name, task, changed, max_tokens)
            typed = {key: getattr(changed, key) for key in changes}
        family = training.families[task.family].grid
        searched = [key for key in changes if training.search == "grid" and vars(family).get(key)]
        if searched:
            raise ExperimentError(
                f"task_training.{searched[0]}={changes[searched[0]]}: task_training.search=grid"
                " varies it; leave it out, or search nothing"
            )
    return typed


def _check_task(name: str, task: Task) -> None:
    where = f"tasks.{name}"
    if task.kind not in KINDS:
        raise ExperimentError(f"{where}.kind={task.kind} is not one of {', '.join(KINDS)}")
    unknown = [metric for metric in task.metrics if metric not in METRICS[task.kind]]
    if unknown or not task.metrics:
        raise ExperimentError(
            f"{where}.metrics={task.metrics}: {task.kind} has {', '.join(METRICS[task.kind])}"
        )
    if (task.data is None) == (task.files is None):
        raise ExperimentError(f"{where}: give either data (hub, data_root) or files")
    if task.kind == "generation" and (len(task.text_columns) != 1 or task.target_column is None):
        raise ExperimentError(
            f"{where}.text_columns={task.text_columns} and .target_column={task.target_column} must"
            " name one column each: generation reads the first and writes the second"
        )
    if task.kind != "spans" and len(task.text_columns) not in (1, 2):
        raise ExperimentError(
            f"{where}.text_columns={task.text_columns} must name one or two columns"
        )
    if task.files is not None and task.is_trained and task.files.train is None:
        raise ExperimentError(f"{where}.files.train is missing: a file, or a glob of several")
    if task.kind == "similarity":
        if len(task.text_columns) != 2:
            raise ExperimentError(f"{where}.text_columns={task.text_columns}: similarity needs two")
        if not (task.validation if task.files is None else task.files.validation):
            setting = "validation" if task.files is None else "files.validation"
            raise ExperimentError(f"{where}.{setting} is missing: similarity is scored on it")
    if task.pooling not in ("mean", "first_token"):
        raise ExperimentError(f"{where}.pooling={task.pooling} is not mean or first_token")
    if task.kind == "classification" and task.num_labels is not None and task.num_labels < 2:
        raise ExperimentError(f"{where}.num_labels={task.num_labels} must be at least 2")
    if not 0 < task.held_out_fraction < 1:
        raise ExperimentError(
            f"{where}.held_out_fraction={task.held_out_fraction} must be between 0 and 1"
        )
    if task.languages == []:
        raise ExperimentError(
            f"{where}.languages=[] names none; null means all of {', '.join(task.all_languages)}"
        )


def _check_cell(name: str, task: AnyTask, cell: TaskSettings, max_tokens: int | None) -> None:
    _check_values(f"task_training.exceptions.{name}", cell)
    if max_tokens is not None and cell.max_length > max_tokens:
        raise ExperimentError(
            f"task_training.max_length={cell.max_length} (for {name}) is above the {max_tokens}"
            " positions of the model"
        )
    if task.kind == "spans":
        if cell.doc_stride is None or not 0 <= cell.doc_stride < cell.max_length:
            raise ExperimentError(
                f"task_training.doc_stride={cell.doc_stride} (for {name}) must be at least 0 and"
                f" below max_length={cell.max_length}"
            )
    if task.kind == "generation":
        _check_generation(name, cell)


def _check_generation(name: str, cell: TaskSettings) -> None:
    missing = [key for key in GENERATION_SETTINGS if getattr(cell, key) is None]
    if missing:
        raise ExperimentError(
            f"task_training.{missing[0]} (for {name}) is null, but generation needs a number"
        )
    assert cell.max_target_length is not None and cell.min_target_length is not None
    if cell.max_target_length >= cell.max_length:
        raise ExperimentError(
            f"task_training.max_target_length={cell.max_target_length} (for {name}) leaves no room"
            f" for the source: it must be below max_length={cell.max_length}, which both share"
        )
    if cell.min_target_length >= cell.max_target_length:
        raise ExperimentError(
            f"task_training.min_target_length={cell.min_target_length} (for {name}) must be below"
            f" max_target_length={cell.max_target_length}"
        )


def _check_values(where: str, given: TaskSettings | TaskTraining) -> None:
    """The values that are not null."""
    for setting in fields(TaskSettings):
        name, value = f"{where}.{setting.name}", getattr(given, setting.name)
        if value is None:
            continue
        if setting.name == "length_penalty":
            if not math.isfinite(value):
                raise ExperimentError(f"{name}={value} must be a finite number")
        elif setting.name in ("hidden_dropout", "attention_dropout", "warmup_ratio",
                              "label_smoothing"):  # fmt: skip
            if not 0 <= value < 1:
                raise ExperimentError(f"{name}={value} must be at least 0 and below 1")
        elif setting.name in ("weight_decay", "doc_stride", "min_target_length",
                              "no_repeat_ngram_size"):  # fmt: skip
            if not (value >= 0 and math.isfinite(value)):
                raise ExperimentError(f"{name}={value} must not be negative")
        else:
            _check_positive(name, value)


def _check_positive(name: str, number: float) -> None:
    if not (number > 0 and math.isfinite(number)):
        raise ExperimentError(f"{name}={number} must be a finite number above 0")
