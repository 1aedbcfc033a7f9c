"""Documents of a corpus, one at a time, from wherever they lie."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.hub import pinned_commit
from minilm_exp.settings import Corpus, matching_files

# A longer document (a book) is cut at a paragraph's end, so that the held-out share of a corpus of
# few books is still a share, and memory stays bounded.
SECTION_CHARACTERS = 200_000

_SENTENCE_END = re.compile(r"[.!?]+[\"')\]”’»]*\s+|[。！？]+[」』”’）]*\s*|[؟।]+[\"')\]”’»]*\s*")


def read_documents(corpus: Corpus) -> Iterator[str]:
    """Texts of the corpus in a fixed order, each with its paragraphs on lines of their own.

    Raises:
        ExperimentError: A file cannot be read, or a record lacks its text.
    """
    documents: Iterator[str]
    if corpus.files:
        documents = itertools.chain.from_iterable(
            _read_file(path, corpus.text_column)
            for pattern in corpus.files
            for path in matching_files(pattern)
        )
    elif corpus.datasets:
        documents = _read_datasets(corpus)
    else:
        documents = _read_demo()
    for document in documents:
        yield from _sections(document)


def read_token_ids(corpus: Corpus) -> Iterator[list[int]]:
    """Lists of token ids of a pretokenized corpus, one a document."""
    for pattern in corpus.files:
        for path in matching_files(pattern):
            for number, record in _read_json_lines(path):
                ids = record
                if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                    raise ExperimentError(
                        f"{path}, line {number}: not a list of token ids; corpus.pretokenized=true"
                        " reads one JSON list of whole numbers a line"
                    )
                yield ids


def sentences(document: str) -> list[str]:
    """Sentences of a document, none across paragraphs, by their closing punctuation.

    A plain rule that serves Latin, Chinese, Japanese, Arabic and Devanagari punctuation; it also
    cuts after abbreviations, which neither packing nor the embedded task minds.
    """
    parts = (part.strip() for paragraph in document.splitlines() for part in _split(paragraph))
    return [part for part in parts if part]


def _split(paragraph: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(paragraph):
        yield paragraph[start : end.end()]
        start = end.end()
    yield paragraph[start:]


def demo_file() -> Path:
    """The file of Wikipedia articles in the installed gensim package."""
    try:
        import gensim
    except ImportError as error:
        raise ExperimentError(
            "the demo corpus lies in the package gensim, which is not installed: run `make"
            " install`, or pip install gensim==4.4.0, or give your own text with corpus.files=[...]"
        ) from error
    found = sorted(
        (Path(gensim.__file__).parent / "test" / "test_data").glob("enwiki-*-articles1*.bz2")
    )
    if not found:
        raise ExperimentError(
            f"gensim {gensim.__version__} ships no Wikipedia articles: install gensim==4.4.0, or"
            " give your own text with corpus.files=[...]"
        )
    return found[0]


def _read_demo() -> Iterator[str]:
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    with bz2.open(demo_file()) as file:
        for _, markup, _ in extract_pages(file, ("0",)):
            text = re.sub(r"'{2,}|={2,}", "", filter_wiki(markup))
            paragraphs = (line.strip() for line in text.splitlines())
            # Headings, list items and what is left of tables are no prose.
            prose = [
                line
                for line in paragraphs
                if len(line) >= 80 and line[-1] in '.!?"' and line[0] not in "*#:;|!{"
            ]
            if prose:
                yield "\n".join(prose)


def _read_file(path: Path, text_column: str) -> Iterator[str]:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
        for number, record in _read_json_lines(path):
            text = record.get(text_column) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise ExperimentError(
                    f"{path}, line {number}: no text under {text_column!r};"
                    " set corpus.text_column, or corpus.pretokenized=true for lists of token ids"
                )
            yield text
    elif name.endswith(".parquet"):
        yield from _read_parquet(path, text_column)
    elif name.endswith(".txt"):
        yield from _read_text(path)
    else:
        raise ExperimentError(
            f"corpus.files: {path} is none of .txt, .jsonl, .jsonl.gz and .parquet"
        )


def _read_text(path: Path) -> Iterator[str]:
    """Runs of lines between blank lines; lines, where the file has no blank line."""
    with path.open("rb") as file:
        is_text = (bool(line.strip()) for line in file)
        runs_of_text = (has_text for has_text, _ in itertools.groupby(is_text) if has_text)
        has_blank_line = len(list(itertools.islice(runs_of_text, 2))) == 2
    lines: list[str] = []
    with path.open("rb") as file:
        for line in _decoded(path, file):
            if has_blank_line and line.strip():
                lines.append(line.strip())
                if len(lines) % 1000 == 0 and sum(map(len, lines)) > SECTION_CHARACTERS:
                    yield "\n".join(lines)
                    lines = []
            elif has_blank_line:
                yield "\n".join(lines)
                lines = []
            else:
                yield line.strip()
        yield "\n".join(lines)


def _decoded(path: Path, file: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ExperimentError(
                f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file, for example"
                " with iconv"
            ) from error


def _read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(_decoded(path, file), start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        raise ExperimentError(
                            f"{path}, line {number}: not valid JSON ({error})"
                        ) from error
    except (EOFError, zlib.error, OSError) as error:
        raise ExperimentError(f"{path} cannot be read: {error}") from error


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if text_column not in file.schema_arrow.names:
            raise ExperimentError(
                f"{path} has no column {text_column!r} but {', '.join(file.schema_arrow.names)};"
                " set corpus.text_column"
            )
        for batch in file.iter_batches(columns=[text_column]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise ExperimentError(
                        f"{path}: column {text_column!r} is not text; set corpus.text_column"
                    )
                yield text or ""
    except (pyarrow.ArrowException, OSError) as error:
        raise ExperimentError(
            f"{path} is not a readable parquet file: {reason_of(error)}"
        ) from error


def _read_datasets(corpus: Corpus) -> Iterator[str]:
    import datasets

    for source in corpus.datasets:
        try:
            rows = datasets.load_dataset(
                source.path,
                source.name,
                split=source.split,
                # The commit by which the corpus is known, also where a branch has moved since.
                revision=pinned_commit(source.path, source.revision, "dataset"),
                streaming=True,
            )
            for row in rows:
                if not isinstance(row.get(corpus.text_column), str):
                    raise ExperimentError(
                        f"{source.path} has no text column {corpus.text_column!r} but"
                        f" {', '.join(row)}; set corpus.text_column"
                    )
                yield row[corpus.text_column]
        except (OSError, ValueError) as error:
            raise ExperimentError(
                f"the data set {source.path} (split {source.split}) cannot be had:"
                f" {reason_of(error)}; give local text with corpus.files=[...] or a local"
                " folder as its path"
            ) from error


def _sections(document: str) -> Iterator[str]:
    if len(document) < SECTION_CHARACTERS:
        if document and not document.isspace():
            yield "\n".join(document.splitlines())
        return
    lines: list[str] = []
    size = 0
    for line in document.splitlines():
        lines.append(line)
        size += len(line)
        if size >= SECTION_CHARACTERS:
            yield "\n".join(lines)
            lines, size = [], 0
    if any(line.strip() for line in lines):
        yield "\n".join(lines)
