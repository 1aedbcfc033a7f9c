"""Similarity of sentence embeddings, scored without any fine-tuning."""

from __future__ import annotations

from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError
from minilm_exp.task_settings import Task
from minilm_exp.tasks.encode import encode
from minilm_exp.tasks.examples import Examples, part_name
from minilm_exp.tasks.finetune import Finetuning, Scored, outputs_of
from minilm_exp.tasks.metrics import combine_parts, score_part
from minilm_exp.terms import pool


def score_similarity(
    encoder: nn.Module, tokenizer: PreTrainedTokenizerFast, job: Finetuning
) -> Scored:
    """Cosine similarities of the pooled last hidden states of both texts, beside the labels.

    Texts are cut at max_length; nothing else of the job's settings is used. Embeddings are pooled
    over real tokens, special ones included, as sentence-transformers does it.

    Args:
        encoder: Any encoder without a task head, or what is called like one.
        tokenizer: Its tokenizer.
        job: The task and its data.

    Raises:
        ExperimentError: An embedding is not finite, or a metric is not defined.
    """
    metrics: dict[str, float] = {}
    predictions: dict[str, list[Any]] = {}
    for prefix, parts in (("", job.data.validation), ("test", job.data.test)):
        scores = {}
        for part, all_examples in parts.items():
            examples = all_examples.at_most(job.settings.max_validation_examples)
            first, second = (
                _embeddings(encoder, tokenizer, job, examples, column)
                for column in ("first", "second")
            )
            similarities = nn.functional.cosine_similarity(first, second).tolist()
            scores[part] = (
                score_part(job.name, job.task, part, examples, similarities),
                len(examples),
            )
            predictions[part_name(prefix, part) if prefix else part] = similarities
        if scores:
            combined = combine_parts(scores)
            metrics |= {part_name(prefix, n) if prefix else n: v for n, v in combined.items()}
    return Scored(metrics, [], 0, predictions)


@torch.inference_mode()
def _embeddings(
    encoder: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    job: Finetuning,
    examples: Examples,
    column: str,
) -> Tensor:
    """Of one text of each example, (examples, hidden), in float32."""
    assert isinstance(job.task, Task)
    rows = Dataset.from_dict(
        {"first": examples.rows[column][:], "label": examples.rows["label"][:]}
    )
    encoded = encode(
        Examples(rows, f"{examples.fingerprint} {column}"),
        job.task.kind, False, tokenizer, job.settings, job.cache,
    )  # fmt: skip
    encoder.to(job.runtime.device)
    pooled = torch.empty(len(encoded), cast(Any, encoder).config.hidden_size)
    for indices, output, attention_mask in outputs_of(encoder, encoded, tokenizer, job.precision):
        states = output.last_hidden_state.float()
        pooled[indices] = pool(states, attention_mask, job.task.pooling).cpu()
    if not torch.isfinite(pooled).all():
        raise ExperimentError(f"{job.name}: the embeddings are not finite")
    return pooled
