"""Tokenised corpus: blocks of token ids on disk, under a key of everything that shaped them."""

from __future__ import annotations

import gc
import heapq
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import torch
import xxhash
from filelock import FileLock
from pyarrow import parquet
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from minilm_exp.documents import demo_file, read_documents, read_token_ids, sentences
from minilm_exp.errors import ExperimentError
from minilm_exp.hub import pinned_commit
from minilm_exp.provenance import fingerprint_files, fingerprint_text, fingerprint_tokenizer
from minilm_exp.settings import Corpus, Settings, matching_files

# Raised when the files below change their meaning, so that old caches are left alone.
CACHE_VERSION = 3

# Text that is tokenised at once.
_BATCH_BYTES = 2**20
# Held-out text that is kept for tasks made from it.
_HELD_OUT_CHARACTERS = 2**24
_PARTS = ("train", "validation")
_log = logging.getLogger(__name__)


class Blocks(torch.utils.data.Dataset):
    """Examples of one part of a corpus, read from disk as they are asked for.

    Args:
        ids: Token ids of all examples, one behind the other.
        starts: Where each example begins in `ids`.
        ends: Where it ends.
    """

    def __init__(self, ids: numpy.ndarray, starts: numpy.ndarray, ends: numpy.ndarray) -> None:
        self.ids = ids
        self.starts = starts
        self.ends = ends

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[self.starts[index] : self.ends[index]]
        return {
            "input_ids": torch.from_numpy(ids.astype(numpy.int64)),
            "index": torch.tensor(index),
        }

    @property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each example, special tokens included."""
        return numpy.asarray(self.ends - self.starts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples, summed in parts: there may be millions of examples."""
        return sum(
            int((self.ends[start : start + 2**20] - self.starts[start : start + 2**20]).sum())
            for start in range(0, len(self), 2**20)
        )

    def spread(self, number: int) -> Blocks:
        """The given number of examples at even distances, or all."""
        number = min(number, len(self))
        chosen = numpy.arange(number) * len(self) // number
        return Blocks(self.ids, self.starts[chosen], self.ends[chosen])


def _open_blocks(folder: Path, part: str, dtype: str) -> Blocks:
    offsets = numpy.memmap(folder / f"{part}.offsets", dtype=numpy.int64, mode="r")
    ids = numpy.memmap(folder / f"{part}.ids", dtype=dtype, mode="r")
    return Blocks(ids, offsets[:-1], offsets[1:])


@dataclass
class PreparedCorpus:
    """A corpus that is ready to train on."""

    folder: Path
    fingerprint: str
    train: Blocks
    validation: Blocks
    num_documents: int
    num_truncated: int

    def held_out_documents(self) -> list[str]:
        """Texts of documents that are not trained on, in order; of many a share, see `_HeldOut`."""
        with (self.folder / "held_out.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def prepare_corpus(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, fingerprint: str
) -> PreparedCorpus:
    """Tokenises and packs the corpus, or opens the cache of an earlier time.

    Documents are tokenised whole. With packing, the documents of a part, each closed by the
    separator token, form one stream that is cut into blocks; a block is the tokenizer's first
    special token, its share of the stream and the separator, exactly block_length tokens, and
    what does not fill the last block is left out. Attention reaches over document borders within
    a block, as in RoBERTa's FULL-SENTENCES; the MiniLM papers do not say what they do. Without
    packing each document is an example of its own, cut off at block_length tokens.

    A document belongs to the held-out part by a hash of its text, so equal documents never stand
    on both sides, and text that is added behind moves none of the old. The first document is always
    held out, so that there is one.

    Raises:
        ExperimentError: The corpus is unreadable, changed while it was read, or is too small for
            one block in each part.
    """
    key = _cache_key(settings.corpus, tokenizer, fingerprint)
    folder = settings.outputs / "cache" / "corpus" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{key}.lock")):
        meta = _read_cache(folder)
        if meta is None:
            _build_cache(settings, tokenizer, folder, fingerprint)
            meta = _read_cache(folder)
    if meta is None:
        raise ExperimentError(f"{folder} is damaged right after it was written: bad disk?")
    parts = {part: _open_blocks(folder, part, meta["dtype"]) for part in _PARTS}
    return PreparedCorpus(
        folder=folder,
        fingerprint=key,
        num_documents=meta["num_documents"],
        num_truncated=meta["num_truncated"],
        **parts,
    )


def _cache_key(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, fingerprint: str) -> str:
    return fingerprint_text(
        json.dumps(
            [
                CACHE_VERSION,
                fingerprint,
                fingerprint_tokenizer(tokenizer),
                corpus.block_length,
                corpus.packing,
                corpus.split,
                corpus.held_out_fraction,
            ],
        )
    )


def held_out_sentences(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, fingerprint: str
) -> Iterator[str]:
    """Sentences of the held-out documents of a corpus that was prepared, one after the other.

    Its cache is not looked through, which takes long for a large corpus.

    Args:
        settings: The run.
        tokenizer: That it was prepared with.
        fingerprint: Of its content.
    """
    key = _cache_key(settings.corpus, tokenizer, fingerprint)
    with suppress(FileNotFoundError):
        file = settings.outputs / "cache" / "corpus" / key / "held_out.jsonl"
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield from sentences(json.loads(line))


def fingerprint_corpus(corpus: Corpus) -> str:
    """Hash of the content of a corpus; of a hub data set, of its resolved revisions."""
    if corpus.files:
        files = [path for pattern in corpus.files for path in matching_files(pattern)]
        # The same bytes mean another thing as .txt and as .jsonl.
        kinds = [path.name.lower().split(".")[1:] for path in files]
        content = f"{fingerprint_files(files)} {kinds}"
    elif corpus.datasets:
        content = json.dumps(
            [asdict(source) | {"revision": _resolve(source)} for source in corpus.datasets]
        )
    else:
        content = fingerprint_files([demo_file()])
    return fingerprint_text(f"{content} {corpus.text_column} {corpus.pretokenized}")


def _resolve(source: Any) -> str:
    """The commit behind a data set's revision; of a local folder, its content."""
    folder = Path(source.path)
    if folder.is_dir():
        return fingerprint_files(sorted(path for path in folder.rglob("*") if path.is_file()))
    try:
        return str(pinned_commit(source.path, source.revision, "dataset"))
    except Exception as error:  # the hub client raises many kinds, all meaning the same here
        raise ExperimentError(
            f"the data set {source.path} cannot be had from the hub ({type(error).__name__}); give"
            " local text with corpus.files=[...] or a local folder as its path"
        ) from error


def _read_cache(folder: Path) -> dict[str, Any] | None:
    """The cache's facts, or None where it is absent, cut off or changed."""
    try:
        meta_file = folder / "meta.json"
        meta = json.loads(meta_file.read_text(encoding="utf-8"))
        if meta.pop("digest") != fingerprint_text(json.dumps(meta)):
            raise ValueError(f"{meta_file} was changed")
        for name, expected in meta["files"].items():
            if fingerprint_files([folder / name]) != expected:
                _log.warning("corpus cache %s: %s is damaged; it is built again", folder, name)
                return None
    except FileNotFoundError:
        return None
    except (ExperimentError, OSError, ValueError, KeyError, TypeError, AttributeError):
        _log.warning("corpus cache %s is damaged; it is built again", folder)
        return None
    return meta


def _build_cache(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, folder: Path, fingerprint: str
) -> None:
    corpus = settings.corpus
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    writers = {part: _Writer(partial, part, dtype, tokenizer, corpus) for part in _PARTS}
    collects_garbage = gc.isenabled()
    gc.disable()  # millions of lists without a cycle: looking for one takes a fifth of the time
    try:
        num_documents = 0
        first_hash = None
        held_out = _HeldOut()
        with tqdm(total=_total_bytes(corpus), desc="tokenise", unit="B", unit_scale=True) as bar:
            for documents in _batches(_documents(corpus, tokenizer)):
                examples: dict[str, list[list[int]]] = {part: [] for part in _PARTS}
                for document, parts in zip(documents, _tokenise(documents, tokenizer, corpus)):
                    digest = xxhash.xxh3_64_intdigest(document.content)
                    first_hash = digest if first_hash is None else first_hash
                    is_held_out = digest == first_hash or (
                        digest / 2**64 < corpus.held_out_fraction
                    )
                    if is_held_out and document.ids is None:
                        held_out.add(digest, document.content.decode())
                    examples["validation" if is_held_out else "train"] += parts
                for part, writer in writers.items():
                    writer.add(examples[part])
                gc.collect(1)  # what a reader of documents may leave
                bar.update(sum(map(len, documents)))
                num_documents += len(documents)
        held_out.write(partial / "held_out.jsonl")
        for writer in writers.values():
            writer.close()
        if num_documents == 0:
            raise ExperimentError(
                "the corpus is empty: no document with text in it; check corpus.files"
            )
        numbers = {part: writer.num_examples for part, writer in writers.items()}
        if not all(numbers.values()):
            raise ExperimentError(
                f"the corpus is too small: its {num_documents} documents give"
                f" {numbers['train']} blocks of {corpus.block_length} tokens to train on and"
                f" {numbers['validation']} held out; give more text or more documents"
                " (a blank line between them), change corpus.held_out_fraction, or lower"
                " corpus.block_length"
            )
        if fingerprint_corpus(corpus) != fingerprint:
            raise ExperimentError(
                "the corpus changed while it was read (corpus.files or corpus.datasets): start the"
                " run again when nothing writes to it"
            )
        meta = {
            "dtype": dtype,
            "num_documents": num_documents,
            "num_truncated": sum(writer.num_truncated for writer in writers.values()),
            "files": {path.name: fingerprint_files([path]) for path in sorted(partial.iterdir())},
        }
        signed = meta | {"digest": fingerprint_text(json.dumps(meta))}
        (partial / "meta.json").write_text(json.dumps(signed), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        if collects_garbage:
            gc.enable()
        for writer in writers.values():
            writer.close()
        shutil.rmtree(partial, ignore_errors=True)


@dataclass
class _Document:
    """One document: its text in UTF-8, or its token ids where it came without text."""

    content: bytes
    ids: list[int] | None = None

    def __len__(self) -> int:
        """About the bytes that it takes up in its file."""
        return len(self.content) if self.ids is None else len(str(self.ids))


def _documents(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Iterator[_Document]:
    if not corpus.pretokenized:
        for text in read_documents(corpus):
            # Lone surrogates, which JSON can hold, are no text.
            yield _Document(text.encode("utf-8", errors="replace"))
        return
    for ids in read_token_ids(corpus):
        wrong = [i for i in ids if not 0 <= i < len(tokenizer)]
        if wrong:
            raise ExperimentError(
                f"corpus.files: token id {wrong[0]} is outside the teacher's vocabulary of"
                f" {len(tokenizer)}; pretokenized input must come from the teacher's tokenizer"
            )
        if ids:
            yield _Document(numpy.asarray(ids, dtype=numpy.int64).tobytes(), ids=ids)


def _tokenise(
    documents: list[_Document], tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> list[list[list[int]]]:
    """Token ids of the examples of each document, without special tokens."""
    if corpus.pretokenized:
        return [[document.ids or []] for document in documents]
    texts = [document.content.decode() for document in documents]
    parts = [sentences(text) if corpus.split == "sentence" else [text] for text in texts]
    # The tokenizer's own call spends half of its time on offsets that nobody reads.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encoded = iter(
        backend.encode_batch_fast(
            [part for group in parts for part in group], add_special_tokens=False
        )
    )
    return [[next(encoded).ids for _ in group] for group in parts]


class _HeldOut:
    """Held-out documents: of many, those with the lowest hashes, whatever their order."""

    def __init__(self) -> None:
        self.heap: list[tuple[int, int, str]] = []
        self.num_seen = self.num_characters = 0

    def add(self, digest: int, text: str) -> None:
        heapq.heappush(self.heap, (-digest, self.num_seen, text))
        self.num_seen += 1
        self.num_characters += len(text)
        while self.num_characters > _HELD_OUT_CHARACTERS and len(self.heap) > 1:
            self.num_characters -= len(heapq.heappop(self.heap)[2])

    def write(self, path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for _, _, text in sorted(self.heap, key=lambda entry: entry[1]):
                file.write(json.dumps(text) + "\n")


class _Writer:
    """Appends examples of one part to disk; memory does not grow with the corpus."""

    def __init__(
        self,
        folder: Path,
        part: str,
        dtype: str,
        tokenizer: PreTrainedTokenizerFast,
        corpus: Corpus,
    ) -> None:
        self.ids_file = (folder / f"{part}.ids").open("wb")
        self.offsets_file = (folder / f"{part}.offsets").open("wb")
        self.dtype = dtype
        self.corpus = corpus
        self.first, self.separator = special_ids(tokenizer)
        self.content_length = corpus.block_length - 2
        self.stream: list[int] = []
        self.num_examples = self.num_tokens = self.num_truncated = 0
        self.offsets_file.write(numpy.int64(0).tobytes())

    def add(self, examples: list[list[int]]) -> None:
        if self.corpus.packing:
            for ids in filter(None, examples):
                self.stream += ids
                self.stream.append(self.separator)
            num_blocks = len(self.stream) // self.content_length
            content = numpy.array(self.stream[: num_blocks * self.content_length], self.dtype)
            del self.stream[: num_blocks * self.content_length]
            blocks = numpy.empty((num_blocks, self.corpus.block_length), self.dtype)
            blocks[:, 0], blocks[:, -1] = self.first, self.separator
            blocks[:, 1:-1] = content.reshape(num_blocks, self.content_length)
            self._write(blocks, numpy.full(num_blocks, self.corpus.block_length))
        else:
            rows = [
                [self.first, *ids[: self.content_length], self.separator]
                for ids in filter(None, examples)
            ]
            self.num_truncated += sum(len(ids) > self.content_length for ids in examples)
            flat = numpy.array(list(itertools.chain.from_iterable(rows)), self.dtype)
            self._write(flat, numpy.array([len(row) for row in rows], numpy.int64))

    def close(self) -> None:
        self.ids_file.close()
        self.offsets_file.close()

    def _write(self, ids: numpy.ndarray, lengths: numpy.ndarray) -> None:
        self.ids_file.write(ids.tobytes())
        self.offsets_file.write((self.num_tokens + numpy.cumsum(lengths, dtype="i8")).tobytes())
        self.num_examples += len(lengths)
        self.num_tokens += int(lengths.sum())


def special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Ids of the token that opens a sequence and of the one that separates and closes."""
    first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if first is None or last is None:
        raise ExperimentError(
            "the teacher's tokenizer has no token that opens or closes a sequence"
            " (cls or bos, sep or eos); choose a teacher whose tokenizer has them"
        )
    return first, last


def _batches(documents: Iterable[_Document]) -> Iterator[list[_Document]]:
    """Documents in groups of about as much text, so that memory is bounded."""
    batch: list[_Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _total_bytes(corpus: Corpus) -> int | None:
    """About how many bytes of text will be read; unknown for the hub and the demo."""
    paths = [path for pattern in corpus.files for path in matching_files(pattern)]
    if not paths:
        return None
    return sum(_text_size(path, corpus.text_column) for path in paths)


def _text_size(path: Path, text_column: str) -> int:
    try:
        if path.suffix == ".gz":
            with path.open("rb") as file:
                file.seek(-4, os.SEEK_END)  # gzip ends with the size of what it holds
                return int.from_bytes(file.read(4), "little")
        if path.suffix == ".parquet":
            metadata = parquet.ParquetFile(path).metadata
            chunks = [
                metadata.row_group(group).column(column)
                for group in range(metadata.num_row_groups)
                for column in range(metadata.num_columns)
            ]
            return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == text_column)
        return path.stat().st_size
    except (OSError, pyarrow.ArrowException):
        return 0  # reading it will say what is wrong
