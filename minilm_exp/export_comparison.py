"""Exports beside the model that they were made of: what they give, score and cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerFast

from minilm_exp.corpus import Blocks
from minilm_exp.exported import Exported
from minilm_exp.sentence_modules import Pooling
from minilm_exp.speed import measure_seconds, speedup
from minilm_exp.tasks.encode import encode
from minilm_exp.tasks.finetune import Finetuning, outputs_of
from minilm_exp.terms import embed

# Texts that outputs are compared on, and how long they are in turn.
_NUM_TEXTS = 64
_LENGTHS = (8, 16, 32, 64, 128)


@dataclass
class Measured:
    """Of one model of a comparison.

    Attributes:
        megabytes: Of its weights (teacher and student) or of its file.
        milliseconds: Median time of a batch, by the number of sequences in it.
        speedup: Over the teacher, likewise; absent where there is none.
        differences: Of an export, by output: the largest from the student, absolute.
        scores: By task every metric, where the model can be scored as it is.
    """

    megabytes: float
    milliseconds: dict[str, float] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


def corpus_rows(blocks: Blocks, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Held-out text of several lengths, as `outputs_of` reads it."""
    chosen, ids = blocks.spread(_NUM_TEXTS), []
    for number in range(len(chosen)):
        whole = chosen[number]["input_ids"].tolist()
        length = _LENGTHS[number % len(_LENGTHS)]
        ids.append(whole if len(whole) <= length else [*whole[: length - 1], whole[-1]])
    columns: dict[str, Any] = {"input_ids": ids, "length": [len(one) for one in ids]}
    if "token_type_ids" in tokenizer.model_input_names:
        columns["token_type_ids"] = [[0] * len(one) for one in ids]
    return Dataset.from_dict(columns)


def task_rows(job: Finetuning, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Validation examples of a task, at even distances, likewise."""
    examples = next(iter(job.data.validation.values())).at_most(_NUM_TEXTS)
    rows = encode(examples, job.task.kind, False, tokenizer, job.settings, job.cache)
    return rows.select(range(min(_NUM_TEXTS, len(rows))))


def compare(
    measured: Mapping[str, Measured],
    models: Mapping[str, nn.Module],
    batch_sizes: list[int],
    num_batches: int,
) -> None:
    """Times models side by side, in one run and with the same number of threads.

    Args:
        measured: Of each model; takes the times.
        models: By name, on the CPU; the teacher is called teacher.
        batch_sizes: Sequences of a batch; the lengths are those of `measure_speedup`.
        num_batches: Of each size.
    """
    for size in batch_sizes:
        seconds = measure_seconds(models, num_batches, size, "cpu")
        for name, taken in seconds.items():
            measured[name].milliseconds[str(size)] = 1000 * statistics.median(taken)
            if "teacher" in seconds:
                measured[name].speedup[str(size)] = speedup(seconds["teacher"], taken)


@torch.inference_mode()
def largest_differences(
    model: nn.Module,
    exported: Exported,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    pooling: Pooling | None,
) -> dict[str, float]:
    """The largest absolute difference of each output, padding left out."""
    found: dict[str, float] = {}
    expected = outputs_of(model, rows, tokenizer, "fp32")
    others = outputs_of(exported, rows, tokenizer, "fp32")
    for (_, output, mask), (_, other, _) in zip(expected, others):
        if pooling is not None:
            embeddings = embed(output.last_hidden_state, mask, pooling)
            output = {**output, "sentence_embedding": embeddings}
        for name, value in other.items():
            difference = (value - output[name]).abs()
            if value.shape[:2] == mask.shape:
                difference = difference[mask.bool()]
            found[name] = max(found.get(name, 0.0), float(difference.max()))
    return found


def megabytes_of(model: nn.Module) -> float:
    """Of a model's weights as they are in memory."""
    return sum(one.numel() * one.element_size() for one in model.parameters()) / 1e6
