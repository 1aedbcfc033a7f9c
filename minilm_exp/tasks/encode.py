"""Examples as token ids, kept on disk for other models and runs with the same tokenizer."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from minilm_exp.provenance import fingerprint_text
from minilm_exp.task_settings import TaskSettings
from minilm_exp.tasks.examples import Examples
from minilm_exp.tasks.spans import encode_evaluation_windows, encode_training_windows

# Raised when what is written below, or in spans.py, changes.
ENCODING_VERSION = 1

_BATCH_EXAMPLES = 1000


def encode(
    examples: Examples,
    kind: str,
    for_training: bool,
    tokenizer: PreTrainedTokenizerFast,
    settings: TaskSettings,
    cache: Path,
) -> Dataset:
    """Rows with input_ids, token_type_ids where the model has them, `length`, and what is learnt.

    Of pairs the longer text is cut first. Spans become one row a window.

    Args:
        examples: To be encoded.
        kind: classification, regression or spans.
        for_training: Whether windows are labelled or carry what answers are cut out by.
        tokenizer: Of the model.
        settings: max_length and doc_stride.
        cache: Folder of earlier encodings.
    """
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "max_length": settings.max_length}
    if kind != "spans":
        function: Any = _encode_texts
    else:
        function = encode_training_windows if for_training else encode_evaluation_windows
        arguments["stride"] = settings.doc_stride
    key = fingerprint_text(
        json.dumps(
            [
                ENCODING_VERSION,
                examples.fingerprint,
                fingerprint_tokenizer(tokenizer),
                kind,
                for_training,
                settings.max_length,
                settings.doc_stride,
            ]
        )
    )
    cache.mkdir(parents=True, exist_ok=True)
    return examples.rows.map(
        functools.partial(_with_lengths, function, arguments),
        batched=True,
        batch_size=_BATCH_EXAMPLES,
        with_indices=kind == "spans" and not for_training,
        remove_columns=examples.rows.column_names,
        cache_file_name=str(cache / f"{key}.arrow"),
        new_fingerprint=key,
        desc="tokenise",
    )


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Names what a tokenizer does, not the truncation and padding that a call has left in it."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {name: part for name, part in content.items() if name not in ("truncation", "padding")}
    return fingerprint_text(json.dumps([kept, tokenizer.model_input_names]))


def _with_lengths(
    function: Any, arguments: dict[str, Any], batch: dict[str, list[Any]], *indices: list[int]
) -> dict[str, list[Any]]:
    encoded: dict[str, list[Any]] = function(batch, *indices, **arguments)
    return encoded | {"length": [len(ids) for ids in encoded["input_ids"]]}


def _encode_texts(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> dict[str, list[Any]]:
    encoded = tokenizer(
        batch["first"],
        batch.get("second"),
        truncation="longest_first",
        max_length=max_length,
        return_attention_mask=False,
    )
    return {**encoded, "labels": batch["label"]}
