"""Fine-tuning of an encoder on a task, and its predictions."""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from minilm_exp.attention import use_training_attention
from minilm_exp.errors import ExperimentError
from minilm_exp.settings import Runtime
from minilm_exp.student import set_dropout
from minilm_exp.task_settings import AnyTask, Task, TaskSettings
from minilm_exp.tasks.encode import encode
from minilm_exp.tasks.examples import Examples, TaskData, part_name
from minilm_exp.tasks.metrics import combine_parts, score_part
from minilm_exp.tasks.spans import Answer, best_answers

# Tokens, padding included, that are evaluated at once.
_EVALUATION_TOKENS = 2**13


@dataclass(frozen=True)
class Scored:
    """What a fine-tuned model scores, with the weights of its best epoch.

    Attributes:
        metrics: Of the validation parts; those of test parts begin with `test_`.
        epochs: The validation metrics after each epoch.
        best_epoch: Counted from 1.
        predictions: For each part, of the test parts with `test_` before their name: classes,
            numbers or answers, in the order of the examples.
    """

    metrics: dict[str, float]
    epochs: list[dict[str, float]]
    best_epoch: int
    predictions: dict[str, list[Any]]


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
    """

    name: str
    task: AnyTask
    data: TaskData
    settings: TaskSettings
    seed: int
    precision: str
    runtime: Runtime
    cache: Path


def finetune(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    job: Finetuning,
    title: str,
    log_metrics: Callable[[dict[str, float], int], None],
    keep_in: Path | None = None,
) -> Scored:
    """Trains a copy of the encoder with a new head; keeps the epoch that validates best.

    The encoder itself is not changed. The head and the order of the examples depend on the seed
    alone, so encoders of one architecture are treated alike. Batches hold examples of like length.
    Of two epochs that validate alike the earlier one is kept.

    Args:
        encoder: Any encoder without a task head.
        tokenizer: Its tokenizer.
        job: The rest.
        title: Shown by the progress bar.
        log_metrics: Called with `loss` or validation metrics, and the step they belong to.
        keep_in: Folder for the fine-tuned model, or None.

    Raises:
        ExperimentError: The training loss is not finite, or a metric is not defined.
    """
    settings, data = job.settings, job.data
    kind = job.task.kind
    model = _with_head(encoder, job)
    train = encode(
        data.train.at_most(settings.max_train_examples),
        kind, True, tokenizer, settings, job.cache,
    )  # fmt: skip
    if not len(train):
        raise ExperimentError(f"none of the training examples of {job.name} can be learnt from")
    validation = _parts(job, data.validation, tokenizer)
    microbatch = math.gcd(settings.batch_size, job.runtime.microbatch_size or settings.batch_size)
    on_cpu = job.runtime.device == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        best = _BestEpoch(job, model, tokenizer, validation, title, log_metrics)
        trainer = _Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
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
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=train,
            callbacks=[best],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.load_state_dict(best.weights)
    metrics, predictions = dict(best.metrics), dict(best.predictions)
    if data.test:
        scores, found = _evaluate(job, model, tokenizer, _parts(job, data.test, tokenizer), title)
        metrics |= {f"test_{name}": value for name, value in scores.items()}
        predictions |= {part_name("test", part): values for part, values in found.items()}
    if keep_in is not None:
        model.save_pretrained(keep_in)
        tokenizer.save_pretrained(keep_in)
    return Scored(metrics, best.epochs, best.best_epoch, predictions)


def _with_head(encoder: PreTrainedModel, job: Finetuning) -> PreTrainedModel:
    settings, data, kind = job.settings, job.data, job.task.kind
    set_seed(job.seed)
    config = copy.deepcopy(encoder.config)
    set_dropout(config, settings.hidden_dropout, settings.attention_dropout)
    if kind != "spans":
        config.num_labels = data.num_labels
        config.problem_type = (
            "regression" if kind == "regression" else "single_label_classification"
        )
        if data.label_names is not None:
            config.id2label = dict(enumerate(data.label_names))
            config.label2id = {name: number for number, name in enumerate(data.label_names)}
    auto = AutoModelForQuestionAnswering if kind == "spans" else AutoModelForSequenceClassification
    try:
        model = auto.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ExperimentError(
            f"transformers has no {kind} head for {config.model_type}: leave {job.name} out of task"
        ) from error
    use_training_attention(model)
    _compute_heads_in_float32(model)
    loaded = model.base_model.load_state_dict(encoder.state_dict(), strict=False)
    # Some architectures classify without the encoder's pooler, or with one of their own.
    unmatched = [
        key for key in (*loaded.missing_keys, *loaded.unexpected_keys) if "pooler" not in key
    ]
    if unmatched:
        raise ExperimentError(
            f"{config.model_type} has another encoder under its {kind} head than the one that is"
            f" fine-tuned ({unmatched[0]}): leave {job.name} out of task"
        )
    return model


def _compute_heads_in_float32(model: PreTrainedModel) -> None:
    """In bf16 a score between 0 and 5 would be a multiple of 1/64, and spans would tie."""
    for name, module in model.named_children():
        if name != model.base_model_prefix:
            module.forward = functools.partial(_in_float32, module.forward)


def _in_float32(forward: Callable[..., Any], states: Tensor, *more: Any, **named: Any) -> Any:
    with torch.autocast(states.device.type, enabled=False):
        return forward(states.float(), *more, **named)


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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    parts: dict[str, _Part],
    title: str,
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Metrics over all parts, and the predictions for each."""
    predictions, scores = {}, {}
    for name, part in parts.items():
        logits = predict(model, part.encoded, tokenizer, job.precision)
        if not all(numpy.isfinite(row).all() for row in logits):
            raise ExperimentError(
                f"fine-tuning {title} gives logits that are not finite: lower"
                " task_training.learning_rate"
            )
        predictions[name] = _predictions(job, part, logits)
        scores[name] = (
            score_part(job.name, job.task, name, part.examples, predictions[name]),
            len(part.examples),
        )
    return combine_parts(scores), predictions


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
    model: PreTrainedModel, encoded: Dataset, tokenizer: PreTrainedTokenizerFast, precision: str
) -> Iterator[tuple[list[int], Any, Tensor]]:
    """The model's output for rows of like length, with their numbers and their attention mask."""
    was_training = model.training
    model.eval()
    collate = DataCollatorWithPadding(tokenizer)
    names = [name for name in tokenizer.model_input_names if name in encoded.column_names]
    inputs = encoded.select_columns(names)
    for rows in batches_of_like_length(encoded["length"][:]):
        fetched = inputs[rows]
        batch = collate([{name: fetched[name][i] for name in names} for i in range(len(rows))])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = model(**batch)
        yield rows, output, batch["attention_mask"]
    model.train(was_training)


def predict(
    model: PreTrainedModel, encoded: Dataset, tokenizer: PreTrainedTokenizerFast, precision: str
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


class _Trainer(Trainer):
    """The library's training loop; of micro-batches each counts by its number of examples.

    Transformers 5.23 adds up the mean losses of the micro-batches of a step.
    """

    def get_batch_samples(self, *given: Any, **named: Any) -> Any:
        batches, _ = super().get_batch_samples(*given, **named)
        num_examples = sum(len(batch["input_ids"]) for batch in batches)
        self._weight = len(batches) / max(1, num_examples)
        return batches, None

    def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        if "start_positions" in inputs:
            loss: Any = _span_loss(model, inputs)
        else:
            loss = super().compute_loss(model, inputs, *given, **named)
        # The library divides by the number of micro-batches.
        return loss * (self._weight * len(inputs["input_ids"]))

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        """The library's grouping by length, drawn from the seed alone."""
        assert self.train_dataset is not None
        return LengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            lengths=self.train_dataset["length"][:],
            generator=torch.Generator().manual_seed(self.args.seed),
        )


def _span_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of start and end over the real tokens.

    The library's lets an answer begin in the padding, so its loss depends on the batch.
    """
    positions = ("start_positions", "end_positions")
    output = model(**{name: value for name, value in inputs.items() if name not in positions})
    is_padding = inputs["attention_mask"] == 0
    losses = [
        nn.functional.cross_entropy(logits.float().masked_fill(is_padding, -math.inf), inputs[name])
        for name, logits in zip(positions, (output.start_logits, output.end_logits))
    ]
    return torch.stack(losses).mean()


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

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(desc=f"fine-tune {self.title}", total=state.max_steps, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if not numpy.isfinite(float(logs["loss"])):
            raise ExperimentError(
                f"fine-tuning {self.title}: the loss is {logs['loss']} at step"
                f" {state.global_step}; lower task_training.learning_rate"
            )
        self.log_metrics({"loss": float(logs["loss"])}, state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
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

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
