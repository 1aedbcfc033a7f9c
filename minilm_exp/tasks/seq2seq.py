"""Sources and targets as token ids, and batches of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError
from minilm_exp.head_terms import NO_LABEL
from minilm_exp.task_settings import TaskSettings
from minilm_exp.writer import Writing, encode_sources, end_token


def writing_of(settings: TaskSettings, source_column: str = "source") -> Writing:
    """How a task's settings read and write; source and target share max_length."""
    assert settings.max_target_length is not None and settings.min_target_length is not None
    assert settings.num_beams is not None and settings.length_penalty is not None
    assert settings.no_repeat_ngram_size is not None
    return Writing(
        max_source_length=settings.max_length - settings.max_target_length,
        max_length=settings.max_target_length,
        source_column=source_column,
        min_length=settings.min_target_length,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
    )


def encode_seq2seq(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerFast,
    max_source_length: int,
    max_target_length: int,
    for_training: bool,
) -> dict[str, list[Any]]:
    """Rows with `input_ids`, of which `num_source` are the source, and what was cut.

    Only training reads targets; one that is too long is cut before its closing token.

    Raises:
        ExperimentError: The tokenizer has no closing token, or a text has no token.
    """
    end = end_token(tokenizer)
    sources = encode_sources(batch["source"], tokenizer, max_source_length)
    for text, source in zip(batch["source"], sources):
        if not source.ids:
            raise ExperimentError(f"the source {text!r:.100} is empty: it has no token")
    columns: dict[str, list[Any]] = {
        "input_ids": [source.ids for source in sources],
        "num_source": [len(source.ids) for source in sources],
        "source_is_cut": [source.is_cut for source in sources],
    }
    if not for_training:
        return columns
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(
        batch["target"], add_special_tokens=False
    )
    for text, one in zip(batch["target"], encoded):
        if not one.ids:
            raise ExperimentError(f"the target {text!r:.100} is empty: it has no token")
    room = max_target_length - 1
    columns["input_ids"] = [
        [*source.ids, *one.ids[:room], end] for source, one in zip(sources, encoded)
    ]
    columns["target_is_cut"] = [len(one.ids) > room for one in encoded]
    return columns


class Seq2SeqCollator:
    """Pads on the right; each token of the target is the label of the token before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._pad = int(tokenizer.pad_token_id)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids, real, source, labels = [], [], [], []
        for row in rows:
            own, num_source = row["input_ids"], row["num_source"]
            num_target, num_padding = len(own) - num_source, longest - len(own)
            ids.append(own + [self._pad] * num_padding)
            real.append([1] * len(own) + [0] * num_padding)
            source.append([1] * num_source + [0] * (num_target + num_padding))
            before = [NO_LABEL] * (num_source - 1)
            labels.append(before + own[num_source:] + [NO_LABEL] * (num_padding + 1))
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(real),
            "source_mask": torch.tensor(source),
            "labels": torch.tensor(labels),
            "index": torch.tensor([row["index"] for row in rows]),
        }
