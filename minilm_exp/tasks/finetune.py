"""Fine-tuning of an encoder on a classification task, and its score."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from tqdm import tqdm
from transformers import (
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

from minilm_exp.attention import use_training_attention
from minilm_exp.errors import ExperimentError
from minilm_exp.settings import Settings
from minilm_exp.student import set_dropout
from minilm_exp.tasks.examples import Example, TaskData


@dataclass(frozen=True)
class Scored:
    """Accuracy on the validation examples and what was predicted for each of them."""

    accuracy: float
    predictions: list[int]


def finetune(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: TaskData,
    settings: Settings,
    precision: str,
    title: str,
    log_metrics: Callable[[dict[str, float], int], None],
) -> Scored:
    """Trains a copy of the encoder with a new classification head and scores it once, at the end.

    The encoder itself is not changed. The head and the order of the examples depend on the seed
    alone, so encoders of one architecture are treated alike.

    Args:
        encoder: Any encoder without a task head.
        tokenizer: Its tokenizer.
        data: Examples with labels 0..n-1.
        settings: The run; task_training, runtime.device and seed are used.
        precision: fp32 or bf16.
        title: Shown by the progress bar.
        log_metrics: Called with the training loss and the step it belongs to.

    Raises:
        ExperimentError: The training loss is not finite.
    """
    training = settings.task_training
    set_seed(settings.seed)
    config = copy.deepcopy(encoder.config)
    config.num_labels = 1 + max(example.label for example in data.train)
    set_dropout(config, training.hidden_dropout, training.attention_dropout)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    use_training_attention(model)
    loaded = model.base_model.load_state_dict(encoder.state_dict(), strict=False)
    # Some architectures classify without the encoder's pooler, or with one of their own.
    unmatched = [
        key for key in (*loaded.missing_keys, *loaded.unexpected_keys) if "pooler" not in key
    ]
    if unmatched:
        raise ExperimentError(
            f"{config.model_type} classifies with another encoder than the one that was distilled"
            f" ({unmatched[0]}): set task=none"
        )
    on_cpu = settings.runtime.device == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=training.epochs,
                per_device_train_batch_size=training.batch_size,
                per_device_eval_batch_size=64,
                learning_rate=training.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=training.warmup_ratio,
                weight_decay=training.weight_decay,
                bf16=precision == "bf16",
                use_cpu=on_cpu,
                dataloader_pin_memory=not on_cpu,
                seed=settings.seed,
                data_seed=settings.seed,
                logging_steps=10,
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=_Encoded(data.train, tokenizer, training.max_length),
            callbacks=[_Progress(title, log_metrics)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logits = trainer.predict(
            _Encoded(data.validation, tokenizer, training.max_length)
        ).predictions
    if not numpy.isfinite(logits).all():
        raise ExperimentError(
            f"fine-tuning {title} gives logits that are not finite: lower"
            " task_training.learning_rate"
        )
    predictions = numpy.argmax(logits, axis=-1).tolist()
    labels = [example.label for example in data.validation]
    right = sum(p == label for p, label in zip(predictions, labels))
    return Scored(accuracy=right / len(labels), predictions=predictions)


class _Encoded(torch.utils.data.Dataset):
    """Examples as token ids, cut off at the longer text first."""

    def __init__(
        self, examples: list[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> None:
        self.labels = [example.label for example in examples]
        self.encoded = tokenizer(
            [example.first for example in examples],
            [example.second for example in examples],
            truncation="longest_first",
            max_length=max_length,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs = {name: values[index] for name, values in self.encoded.items()}
        return inputs | {"labels": self.labels[index]}


class _Progress(TrainerCallback):
    def __init__(self, title: str, log_metrics: Callable[[dict[str, float], int], None]) -> None:
        self.title = title
        self.log_metrics = log_metrics
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

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
