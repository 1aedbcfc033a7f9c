"""Similarity of sentence embeddings, scored without any fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError
from minilm_exp.task_settings import Task
from minilm_exp.tasks.encode import encode
from minilm_exp.tasks.examples import Examples, part_name
from minilm_exp.tasks.finetune import Finetuning, Scored, batches_of_like_length
from minilm_exp.tasks.metrics import combine_parts, score_part


def score_similarity(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, job: Finetuning
) -> Scored:
    """Cosine similarities of the pooled last hidden states of both texts, beside the labels.

    Texts are cut at max_length; nothing else of the job's settings is used. Embeddings are pooled
    over real tokens, special ones included, as sentence-transformers does it.

    Args:
        encoder: Any encoder without a task head.
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
    encoder: PreTrainedModel,
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
    names = [name for name in tokenizer.model_input_names if name in encoded.column_names]
    inputs = encoded.select_columns(names)
    collate = DataCollatorWithPadding(tokenizer)
    was_training = encoder.training
    nn.Module.to(encoder.eval(), job.runtime.device)
    pooled = torch.empty(len(encoded), encoder.config.hidden_size)
    for indices in batches_of_like_length(encoded["length"][:]):
        fetched = inputs[indices]
        batch = collate([{n: fetched[n][i] for n in names} for i in range(len(indices))])
        batch = {name: tensor.to(encoder.device) for name, tensor in batch.items()}
        with torch.autocast(
            encoder.device.type, dtype=torch.bfloat16, enabled=job.precision == "bf16"
        ):
            states = encoder(**batch).last_hidden_state
        pooled[indices] = _pool(states.float(), batch["attention_mask"], job.task.pooling).cpu()
    encoder.train(was_training)
    if not torch.isfinite(pooled).all():
        raise ExperimentError(f"{job.name}: the embeddings are not finite")
    return pooled


def _pool(states: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    if pooling == "first_token":
        first = attention_mask.argmax(dim=1)
        return states[torch.arange(len(states), device=states.device), first]
    is_real = attention_mask[..., None].to(states.dtype)
    return (states * is_real).sum(dim=1) / is_real.sum(dim=1)
