"""Fine-tuning of an encoder on a task, and its predictions."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from minilm_exp.attention import use_training_attention
from minilm_exp.checkpoint_code import check_folder
from minilm_exp.checkpoints import CheckpointedTrainer, take_up
from minilm_exp.distil import Distiller
from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.head_terms import NO_LABEL, label_loss
from minilm_exp.heads import compute_heads_in_float32, head_parameters, put_under_head
from minilm_exp.objective_settings import trains_head
from minilm_exp.objectives import Objective, build_objective
from minilm_exp.prefix_lm import PrefixLM, prefix_lm_class, target_loss
from minilm_exp.settings import Runtime, Settings
from minilm_exp.states import HEAD_STATES, State
from minilm_exp.student import set_dropout
from minilm_exp.task_settings import AnyTask, Task, TaskSettings
from minilm_exp.tasks.encode import encode
from minilm_exp.tasks.examples import Examples, TaskData, part_name
from minilm_exp.tasks.metrics import combine_parts, score_part
from minilm_exp.tasks.seq2seq import Seq2SeqCollator, writing_of
from minilm_exp.tasks.spans import Answer, best_answers
from minilm_exp.writer import Writer

_log = logging.getLogger(__name__)
# Tokens, padding included, that are evaluated at once.
_EVALUATION_TOKENS = 2**13

# In a checkpoint: the best epoch until then.
_BEST_WEIGHTS, _BEST = "best.safetensors", "best.json"


@dataclass(frozen=True)
class Scored:
    """What a fine-tuned model scores, with the weights of its best epoch.

    Attributes:
        metrics: Of the validation parts; those of test parts begin with `test_`.
        epochs: The validation metrics after each epoch.
        best_epoch: Counted from 1.
        predictions: For each part, of the test parts with `test_` before their name: classes,
            numbers, answers or texts, in the order of the examples.
    """

    metrics: dict[str, float]
    epochs: list[dict[str, float]]
    best_epoch: int
    predictions: dict[str, list[Any]]

    @classmethod
    def of(cls, stored: dict[str, Any], kind: str) -> Scored:
        """What `asdict` made of it, and JSON."""
        predictions = stored["predictions"]
        if kind == "spans":
            predictions = {
                part: [Answer(**answer) for answer in answers]
                for part, answers in predictions.items()
            }
        return cls(stored["metrics"], stored["epochs"], stored["best_epoch"], predictions)


@dataclass(frozen=True)
class Finetuning:
    """All that one fine-tuning hangs on but the model.

    Attributes:
        name: The task's name.
        task: The task.
        data: Its examples.
        settings: How it is trained.
        seed: Of the head, the order of the examples and dropout.
        precision: fp32 or bf16.
        runtime: Where it is computed.
        cache: Folder of encoded examples.
        checkpoint_steps: Steps between checkpoints, where there is a folder for them.
    """

    name: str
    task: AnyTask
    data: TaskData
    settings: TaskSettings
    seed: int
    precision: str
    runtime: Runtime
    cache: Path
    checkpoint_steps: int = 500


@dataclass(frozen=True)
class Guide:
    """A teacher beside a model that is fine-tuned.

    Attributes:
        teacher: With a head for the task, frozen and in evaluation mode.
        settings: Their objective is minimised, and their layer selection counts.
        head_only: Whether the encoder keeps its weights; it is then in evaluation mode and computed
            without gradients.
        teacher_ids: The teacher's id of each token of the student, where those differ.
    """

    teacher: PreTrainedModel
    settings: Settings
    head_only: bool = False
    teacher_ids: Tensor | None = None

    @property
    def trains_head(self) -> bool:
        """Whether what the model predicts means anything afterwards."""
        return trains_head(self.settings.objective.terms)


def finetune(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    job: Finetuning,
    title: str,
    log_metrics: Callable[[dict[str, float], int], None],
    keep_in: Path | None = None,
    guide: Guide | None = None,
    checkpoints: Path | None = None,
    lm_head: dict[str, Tensor] | None = None,
) -> Scored:
    """Trains a copy of the encoder with a new head; keeps the epoch that validates best.

    The encoder itself is not changed. The head and the order of the examples depend on the seed
    alone, so encoders of one architecture are treated alike. Batches hold examples of like length.
    Of two epochs that validate alike the earlier one is kept; where a guide's objective does not
    train the head, the last, without metrics.

    Args:
        encoder: Any encoder without a task head; or with the task's head, which learns on.
        tokenizer: Its tokenizer.
        job: The rest.
        title: Shown by the progress bar.
        log_metrics: Called with `loss` or validation metrics, and the step they belong to.
        keep_in: Folder for the fine-tuned model, or None.
        guide: What is minimised instead of the loss on the labels.
        checkpoints: Folder for checkpoints; the last whole one that lies there is gone on from.
        lm_head: What a model that writes begins with.

    Raises:
        ExperimentError: The training loss is not finite, or a metric is not defined.
    """
    settings, data = job.settings, job.data
    model = with_head(encoder, job, lm_head)
    train = encode(
        data.train.at_most(settings.max_train_examples),
        job.task.kind, True, tokenizer, settings, job.cache,
    )  # fmt: skip
    if not len(train):
        raise ExperimentError(f"none of the training examples of {job.name} can be learnt from")
    validation = _parts(job, data.validation, tokenizer)
    best = _BestEpoch(job, model, tokenizer, validation, title, log_metrics)
    best.scores = guide is None or guide.trains_head
    distiller = None if guide is None else _guided(model, guide, job)
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoints or Path(temporary)
        trainer = _Trainer(
            job=job,
            log_metrics=log_metrics,
            model=model if distiller is None else distiller,
            args=_training_arguments(job, folder, checkpoints is not None),
            data_collator=Seq2SeqCollator(tokenizer)
            if job.task.kind == "generation"
            else Collator(tokenizer, train.column_names),
            train_dataset=_Numbered(train),
            best=best,
            keep_checkpoints=2,
            subject=f"fine-tuning {title}",
            remedy="lower task_training.learning_rate",
        )
        trainer.remove_callback(PrinterCallback)
        start = take_up(folder)
        if start is not None:
            best.load(start)
        try:
            trainer.train_whole(start)
        finally:
            if distiller is not None:
                distiller.close()
    if best.weights:
        model.load_state_dict(best.weights)
    metrics, predictions = dict(best.metrics), dict(best.predictions)
    if data.test and best.scores:
        scores, found = _evaluate(job, model, tokenizer, _parts(job, data.test, tokenizer), title)
        metrics |= {f"test_{name}": value for name, value in scores.items()}
        predictions |= {part_name("test", part): values for part, values in found.items()}
    if job.task.kind == "generation":
        _tell_what_is_cut(job, train, validation)
    if keep_in is not None and isinstance(model, PrefixLM):
        assert isinstance(job.task, Task)
        Writer(model, tokenizer, writing_of(settings, job.task.text_columns[0])).save(keep_in)
    elif keep_in is not None:
        model.save_pretrained(keep_in)
        tokenizer.save_pretrained(keep_in)
    return Scored(metrics, best.epochs, best.best_epoch, predictions)


def score_as_it_is(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    job: Finetuning,
    title: str,
    keep_in: Path | None = None,
) -> Scored:
    """What a model scores with the head that it has, without any training.

    Args:
        model: With a head for the task.
        tokenizer: Its tokenizer.
        job: The task and its data.
        title: What an error calls it.
        keep_in: Folder for the model, or None.

    Raises:
        ExperimentError: A metric is not defined.
    """
    nn.Module.to(model, job.runtime.device)
    parts = _parts(job, job.data.validation, tokenizer)
    metrics, predictions = _evaluate(job, model, tokenizer, parts, title)
    if job.data.test:
        parts = _parts(job, job.data.test, tokenizer)
        scores, found = _evaluate(job, model, tokenizer, parts, title)
        metrics |= {f"test_{name}": value for name, value in scores.items()}
        predictions |= {part_name("test", part): values for part, values in found.items()}
    if keep_in is not None:
        model.save_pretrained(keep_in)
        tokenizer.save_pretrained(keep_in)
    return Scored(metrics, [], 0, predictions)


def _tell_what_is_cut(job: Finetuning, train: Dataset, validation: dict[str, _Part]) -> None:
    writing = writing_of(job.settings)
    encoded = [train, *(part.encoded for part in validation.values())]
    num_sources = sum(sum(one["source_is_cut"][:]) for one in encoded)
    num_targets = sum(train["target_is_cut"][:])
    if num_sources or num_targets:
        _log.warning(
            "%s: %d of %d sources were cut to %d tokens, %d of %d targets to %d"
            " (task_training.max_length, .max_target_length)",
            job.name, num_sources, sum(map(len, encoded)), writing.max_source_length,
            num_targets, len(train), writing.max_length,
        )  # fmt: skip


def _training_arguments(job: Finetuning, folder: Path, saves: bool) -> TrainingArguments:
    settings = job.settings
    microbatch = math.gcd(settings.batch_size, job.runtime.microbatch_size or settings.batch_size)
    on_cpu = job.runtime.device == "cpu"
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=settings.batch_size // microbatch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        bf16=job.precision == "bf16",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        dataloader_num_workers=job.runtime.num_workers,
        seed=job.seed,
        data_seed=job.seed,
        logging_steps=10,
        logging_nan_inf_filter=False,
        save_strategy="steps" if saves else "no",
        save_steps=job.checkpoint_steps,
        remove_unused_columns=False,
        label_names=[],
        report_to="none",
        disable_tqdm=True,
    )


def _guided(model: PreTrainedModel, guide: Guide, job: Finetuning) -> Distiller:
    """Model and teacher side by side, with what must not learn fixed."""
    objective = build_guide_objective(model, guide, job)
    if guide.head_only:
        head = head_parameters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head)
        encoder = model.base_model.eval()
        # Each step switches the whole model back.
        vars(encoder)["train"] = lambda mode=True: encoder
    nn.Module.to(guide.teacher, job.runtime.device)
    compute_heads_in_float32(guide.teacher)
    return Distiller(guide.teacher, model, objective, teacher_ids=guide.teacher_ids)


def build_guide_objective(model: PreTrainedModel, guide: Guide, job: Finetuning) -> Objective:
    """The guide's objective for a model with a head.

    Raises:
        ExperimentError: A term needs what a model lacks, or sizes do not fit.
    """
    settings = replace(guide.settings, seed=job.seed)
    return build_objective(settings, guide.teacher, model, job.task.kind)


def with_head(
    encoder: PreTrainedModel, job: Finetuning, lm_head: dict[str, Tensor] | None = None
) -> PreTrainedModel:
    """A copy under a head for the task, drawn from the seed; with its own, if it has that already.

    Args:
        encoder: The model.
        job: The task.
        lm_head: Of generation: weights instead of drawn ones.

    Raises:
        ExperimentError: The architecture has no such head.
    """
    settings, data, kind = job.settings, job.data, job.task.kind
    set_seed(job.seed)
    config = copy.deepcopy(encoder.config)
    set_dropout(config, settings.hidden_dropout, settings.attention_dropout)
    if kind in ("classification", "regression"):
        config.num_labels = data.num_labels
        config.problem_type = (
            "regression" if kind == "regression" else "single_label_classification"
        )
        if data.label_names is not None:
            config.id2label = dict(enumerate(data.label_names))
            config.label2id = {name: number for number, name in enumerate(data.label_names)}
    try:
        if kind == "generation":
            model: PreTrainedModel = prefix_lm_class(config.model_type)(config)
            model.load_state_dict(lm_head or {}, strict=False)
        else:
            model = _class_of(kind).from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
    except ExperimentError as error:
        raise ExperimentError(f"{error}: leave {job.name} out of task") from error
    except ValueError as error:
        raise ExperimentError(
            f"transformers has no {kind} head for {config.model_type}: leave {job.name} out of task"
        ) from error
    use_training_attention(model)
    compute_heads_in_float32(model)
    if encoder.base_model is not encoder:
        model.load_state_dict(encoder.state_dict())
        return model
    try:
        put_under_head(model, encoder, kind)
    except ExperimentError as error:
        raise ExperimentError(f"{error}: leave {job.name} out of task") from error
    return model


def score_finetuned(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, job: Finetuning
) -> dict[str, float]:
    """Metrics on the validation examples of a model that is not trained any more.

    Args:
        model: Fine-tuned on the task, on any device; or what is called like one.
        tokenizer: Its tokenizer.
        job: The task and its data.

    Raises:
        ExperimentError: Logits are not finite, or a metric is not defined.
    """
    parts = _parts(job, job.data.validation, tokenizer)
    return _evaluate(job, model, tokenizer, parts, job.name)[0]


def load_finetuned(folder: Path, kind: str) -> PreTrainedModel:
    """A fine-tuned model as `finetune` saved it, with its head; of generation see `Writer`.

    Raises:
        ExperimentError: It cannot be loaded.
    """
    check_folder(folder, "the fine-tuned model")
    try:
        model: PreTrainedModel = _class_of(kind).from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # files can be wrong in as many ways as there are loaders
        raise ExperimentError(
            f"the fine-tuned model {folder} cannot be loaded (remove it, and it is trained again):"
            f" {reason_of(error)}"
        ) from error
    return model


def _class_of(kind: str) -> Any:
    return AutoModelForQuestionAnswering if kind == "spans" else AutoModelForSequenceClassification


@dataclass(frozen=True)
class _Part:
    examples: Examples
    encoded: Dataset


def _parts(
    job: Finetuning, parts: dict[str, Examples], tokenizer: PreTrainedTokenizerFast
) -> dict[str, _Part]:
    chosen = {
        part: examples.at_most(job.settings.max_validation_examples)
        for part, examples in parts.items()
    }
    return {
        part: _Part(
            examples,
            encode(examples, job.task.kind, False, tokenizer, job.settings, job.cache),
        )
        for part, examples in chosen.items()
    }


def _evaluate(
    job: Finetuning,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    parts: dict[str, _Part],
    title: str,
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Metrics over all parts, and the predictions for each."""
    predictions: dict[str, list[Any]] = {}
    scores = {}
    for name, part in parts.items():
        if isinstance(model, PrefixLM):
            writer = Writer(model, tokenizer, writing_of(job.settings))
            with _in_float32(model):
                predictions[name] = writer.write_encoded(part.encoded["input_ids"][:])
            scores[name] = (_score(job, name, part, predictions[name]), len(part.examples))
            continue
        logits = predict(model, part.encoded, tokenizer, job.precision)
        if not all(numpy.isfinite(row).all() for row in logits):
            raise ExperimentError(
                f"fine-tuning {title} gives logits that are not finite: lower"
                " task_training.learning_rate"
            )
        predictions[name] = _predictions(job, part, logits)
        scores[name] = (_score(job, name, part, predictions[name]), len(part.examples))
    return combine_parts(scores), predictions


@contextlib.contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Without the autocast that training puts around a model: the saved one writes the same."""
    wrapped = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            vars(model)["forward"] = wrapped


def _score(job: Finetuning, name: str, part: _Part, predictions: list[Any]) -> dict[str, float]:
    return score_part(job.name, job.task, name, part.examples, predictions)


def _predictions(job: Finetuning, part: _Part, logits: list[numpy.ndarray]) -> list[Any]:
    if job.task.kind == "regression":
        return [float(row[0]) for row in logits]
    if job.task.kind == "classification":
        return [int(row.argmax()) for row in logits]
    answers: list[Answer] = best_answers(
        part.examples.rows["context"][:],
        part.encoded["example"][:],
        part.encoded["offsets"][:],
        [window[:, 0] for window in logits],
        [window[:, 1] for window in logits],
        may_be_empty=isinstance(job.task, Task) and "squad_v2" in job.task.metrics,
        null_threshold=job.task.null_threshold if isinstance(job.task, Task) else 0.0,
    )
    return answers


@torch.inference_mode()
def outputs_of(
    model: nn.Module, encoded: Dataset, tokenizer: PreTrainedTokenizerFast, precision: str
) -> Iterator[tuple[list[int], Any, Tensor]]:
    """The model's output for rows of like length, with their numbers and their attention mask."""
    was_training = model.training
    device = cast(PreTrainedModel, model).device
    model.eval()
    collate = DataCollatorWithPadding(tokenizer)
    names = [name for name in tokenizer.model_input_names if name in encoded.column_names]
    inputs = encoded.select_columns(names)
    for rows in batches_of_like_length(encoded["length"][:]):
        fetched = inputs[rows]
        batch = collate([{name: fetched[name][i] for name in names} for i in range(len(rows))])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = model(**batch)
        yield rows, output, batch["attention_mask"]
    model.train(was_training)


def predict(
    model: nn.Module, encoded: Dataset, tokenizer: PreTrainedTokenizerFast, precision: str
) -> list[numpy.ndarray]:
    """Logits of each row, in the order of the rows.

    Rows of like length are computed together. Of spans, an array (tokens, 2) of start and end
    logits without padding; else one value for each class.
    """
    logits: list[Any] = [None] * len(encoded)
    for rows, output, attention_mask in outputs_of(model, encoded, tokenizer, precision):
        if "logits" in output:
            values = output.logits.float().cpu().numpy()
            for row, value in zip(rows, values):
                logits[row] = value
        else:
            both = torch.stack([output.start_logits, output.end_logits], dim=-1)
            values = both.float().cpu().numpy()
            for row, value, is_real in zip(rows, values, attention_mask.bool().cpu()):
                logits[row] = value[is_real.numpy()]
    return logits


def batches_of_like_length(lengths: list[int]) -> Iterator[list[int]]:
    """Rows of like length, the longest first, so that memory is taken once."""
    batch: list[int] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batch and (len(batch) + 1) * longest > _EVALUATION_TOKENS:
            yield batch
            batch = []
        longest = longest if batch else lengths[row]
        batch.append(row)
    if batch:
        yield batch


class Collator:
    """Pads what the model reads; labels become one tensor, of spans (windows, 2)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, columns: list[str]) -> None:
        self._pad = DataCollatorWithPadding(tokenizer)
        self._names = [name for name in tokenizer.model_input_names if name in columns]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self._pad([{name: row[name] for name in self._names} for row in rows])
        labels = [
            row["labels"] if "labels" in row else [row["start_positions"], row["end_positions"]]
            for row in rows
        ]
        numbers = torch.tensor([row["index"] for row in rows])
        return {**batch, "labels": torch.tensor(labels), "index": numbers}


class _Numbered(torch.utils.data.Dataset):
    """Encoded examples with their numbers."""

    def __init__(self, encoded: Dataset) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        rows = self.encoded.__getitems__(numbers)
        return [{**row, "index": number} for row, number in zip(rows, numbers)]


class _Trainer(CheckpointedTrainer):
    """The library's training loop; of micro-batches each counts by its number of examples.

    Transformers 5.23 adds up the mean losses of the micro-batches of a step.
    """

    def __init__(
        self,
        job: Finetuning,
        log_metrics: Callable[[dict[str, float], int], None],
        best: _BestEpoch,
        **arguments: Any,
    ) -> None:
        super().__init__(callbacks=[best], **arguments)
        self._job, self._log_metrics, self._best = job, log_metrics, best

    def get_batch_samples(self, *given: Any, **named: Any) -> Any:
        batches, _ = super().get_batch_samples(*given, **named)
        self._num_batches = len(batches)
        self._size = max(1, sum(map(self._size_of, batches)))
        self._num_summed += 1
        return batches, None

    def _size_of(self, batch: dict[str, Tensor]) -> int:
        """What a mean is taken over: examples, or tokens of targets."""
        if self._job.task.kind == "generation":
            return int((batch["labels"] != NO_LABEL).sum())
        return len(batch["input_ids"])

    def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        numbers = inputs.pop("index").tolist()
        share = self._size_of(inputs) / self._size
        # The library divides by the number of micro-batches.
        weight = share * self._num_batches
        if isinstance(model, Distiller):
            output = model(**inputs)
            terms_T = output["terms"] * share
            self._sums = terms_T if self._sums is None else self._sums + terms_T
            loss = output["loss"]
        elif isinstance(model, PrefixLM):
            smoothing = self._job.settings.label_smoothing or 0.0
            loss = target_loss(model(**inputs).logits, inputs["labels"], smoothing)
        else:
            labels = inputs.pop("labels")
            output = model(**inputs)
            logits = {State(name): output[name] for name in HEAD_STATES if name in output}
            loss = label_loss(self._job.task.kind, logits, inputs["attention_mask"], labels)
        self.note_loss(loss, numbers)
        return loss * weight

    def save_more(self, folder: Path) -> None:
        self._best.save(folder)

    def may_save(self) -> bool:
        return not self._best.is_epoch_end(self.state)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also the terms of an objective, each by itself, as means since the last time."""
        if "loss" in logs and self._sums is not None:
            means = (self._sums / self._num_summed).tolist()
            assert isinstance(self.model, Distiller)
            names = self.model.objective.names
            self._log_metrics(
                {f"loss/{name}": mean for name, mean in zip(names, means)}, self.state.global_step
            )
            self._sums, self._num_summed = None, 0
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        assert isinstance(self.train_dataset, _Numbered)
        return _LikeLength(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            lengths=self.train_dataset.encoded["length"][:],
            seed=self.args.seed,
        )


class _LikeLength(LengthGroupedSampler):
    """The library's grouping by length, drawn from the seed alone, also when it resumes."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop; one generator draws all epochs one after the other."""
        self.generator.manual_seed(self._seed)
        for _ in range(epoch):
            list(iter(self))


class _BestEpoch(TrainerCallback):
    """Scores each epoch, keeps the best one, and shows how far it is."""

    def __init__(
        self,
        job: Finetuning,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        validation: dict[str, _Part],
        title: str,
        log_metrics: Callable[[dict[str, float], int], None],
    ) -> None:
        self.job = job
        self.model = model
        self.tokenizer = tokenizer
        self.validation = validation
        self.title = title
        self.log_metrics = log_metrics
        self.epochs: list[dict[str, float]] = []
        self.best_epoch = 0
        self.metrics: dict[str, float] = {}
        self.predictions: dict[str, list[Any]] = {}
        self.weights: dict[str, Tensor] = {}
        self.bar: tqdm[Any] | None = None
        # False where the head is not trained.
        self.scores = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            desc=f"fine-tune {self.title}",
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update()
        # What ends an epoch is saved when it has been scored.
        if self.is_epoch_end(state):
            control.should_save = False

    def is_epoch_end(self, state: Any) -> bool:
        """Whether the last step was the last of an epoch."""
        return bool(state.global_step % (state.max_steps // self.job.settings.epochs) == 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.log_metrics({"loss": float(logs["loss"])}, state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.is_epoch_end(state):  # a signal ended the training
            return
        control.should_save = control.should_log = args.save_strategy != "no"
        if not self.scores:
            return
        metrics, predictions = _evaluate(
            self.job, self.model, self.tokenizer, self.validation, self.title
        )
        self.log_metrics(metrics, state.global_step)
        self.epochs.append(metrics)
        name = self.job.task.selected_by
        if not self.metrics or metrics[name] > self.metrics[name]:
            self.best_epoch = len(self.epochs)
            self.metrics, self.predictions = metrics, predictions
            self.weights = _copy(self.model)

    def save(self, folder: Path) -> None:
        """Writes what is known of the epochs into a checkpoint."""
        if self.weights:
            save_file(self.weights, folder / _BEST_WEIGHTS)
            known = Scored(self.metrics, self.epochs, self.best_epoch, self.predictions)
            (folder / _BEST).write_text(json.dumps(asdict(known)), "utf-8")

    def load(self, checkpoint: Path) -> None:
        """Takes up what was known at a checkpoint."""
        if (checkpoint / _BEST).is_file():
            self.weights = load_file(checkpoint / _BEST_WEIGHTS)
            known = Scored.of(
                json.loads((checkpoint / _BEST).read_text("utf-8")), self.job.task.kind
            )
            self.epochs, self.best_epoch = known.epochs, known.best_epoch
            self.metrics, self.predictions = known.metrics, known.predictions

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
