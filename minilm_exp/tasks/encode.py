"""Examples as token ids, kept on disk for other models and runs with the same tokenizer."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError
from minilm_exp.provenance import fingerprint_files, fingerprint_text, fingerprint_tokenizer
from minilm_exp.task_settings import TaskSettings
from minilm_exp.tasks.examples import Examples
from minilm_exp.tasks.seq2seq import encode_seq2seq, writing_of
from minilm_exp.tasks.spans import encode_evaluation_windows, encode_training_windows

# Raised when what is written below, or in spans.py, changes.
ENCODING_VERSION = 1

_BATCH_EXAMPLES = 1000
_log = logging.getLogger(__name__)


def encode(
    examples: Examples,
    kind: str,
    for_training: bool,
    tokenizer: PreTrainedTokenizerFast,
    settings: TaskSettings,
    cache: Path,
) -> Dataset:
    """Rows with input_ids, token_type_ids where the model has them, `length`, and what is learnt.

    Of pairs the longer text is cut first. Spans become one row a window. Sources and targets of
    generation are in seq2seq.py. Of several processes that
    need the same rows one makes them; a file that is not what was written is made again.

    Args:
        examples: To be encoded.
        kind: classification, regression, spans or generation.
        for_training: Whether windows are labelled or carry what answers are cut out by; whether
            targets follow their sources.
        tokenizer: Of the model.
        settings: max_length, doc_stride and max_target_length.
        cache: Folder of earlier encodings.

    Raises:
        ExperimentError: max_length has no room for the texts.
    """
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "max_length": settings.max_length}
    more: list[Any] = []
    function: Any
    if kind == "generation":
        function = encode_seq2seq
        writing = writing_of(settings)
        _check_room(examples, tokenizer, writing.max_source_length)
        arguments = {
            "tokenizer": tokenizer,
            "max_source_length": writing.max_source_length,
            "max_target_length": writing.max_length,
            "for_training": for_training,
        }
        more = [writing.max_length]
    elif kind != "spans":
        function = _encode_texts
        _check_room(examples, tokenizer, settings.max_length)
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
                *more,
            ]
        )
    )
    cache.mkdir(parents=True, exist_ok=True)
    file, digest = cache / f"{key}.arrow", cache / f"{key}.digest"
    with FileLock(cache / f"{key}.lock"):
        if not _is_whole(file, digest):
            examples.rows.map(
                functools.partial(_with_lengths, function, arguments),
                batched=True,
                batch_size=_BATCH_EXAMPLES,
                with_indices=kind == "spans" and not for_training,
                remove_columns=examples.rows.column_names,
                cache_file_name=str(file),
                load_from_cache_file=False,
                new_fingerprint=key,
                desc="tokenise",
            )
            digest.write_text(fingerprint_files([file]), "utf-8")
        return Dataset.from_file(str(file))


def _check_room(examples: Examples, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    """A tokenizer that has no room for a token does not cut at all."""
    is_pair = "second" in examples.rows.column_names
    is_source = "source" in examples.rows.column_names
    least = tokenizer.num_special_tokens_to_add(is_pair) + 1 + is_pair
    if max_length < least:
        raise ExperimentError(
            f"task_training.max_length={max_length} {'without the target ' * is_source}has no room"
            f" for the {'texts' if is_pair else 'text'} between the special tokens: {least} at"
            " least"
        )


def _is_whole(file: Path, digest: Path) -> bool:
    if not file.exists():
        return False
    if digest.exists() and digest.read_bytes() == fingerprint_files([file]).encode():
        return True
    _log.warning("%s is damaged; it is made again", file)
    return False


def _with_lengths(
    function: Any, arguments: dict[str, Any], batch: dict[str, list[Any]], *indices: list[int]
) -> dict[str, list[Any]]:
    encoded: dict[str, list[Any]] = function(batch, *indices, **arguments)
    return encoded | {"length": [len(ids) for ids in encoded["input_ids"]]}


def _encode_texts(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> dict[str, list[Any]]:
    """As the tokenizer's own call, which spends half of its time on offsets that nobody reads."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(
        max_length, strategy="longest_first", direction=tokenizer.truncation_side
    )
    backend.encode_special_tokens = tokenizer.split_special_tokens
    texts = list(zip(batch["first"], batch["second"])) if "second" in batch else batch["first"]
    encoded = backend.encode_batch_fast(texts)
    columns = {"input_ids": [one.ids for one in encoded], "labels": batch["label"]}
    if "token_type_ids" in tokenizer.model_input_names:
        columns["token_type_ids"] = [one.type_ids for one in encoded]
    return columns
