"""python -m minilm_exp.generate: writes the targets of a file of sources, with a fine-tuned model.

    python -m minilm_exp.generate --model FOLDER --input articles.jsonl --output summaries.jsonl

The output has one JSON line for each good line of the input, in its order: {"line": N, "output":
TEXT}. A bad line is told on standard error and does not lose the others; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from minilm_exp.errors import ExperimentError
from minilm_exp.writer import Source, Writer, encode_sources


@dataclass(frozen=True)
class Lines:
    """The sources of a file, and what is wrong with its other lines, both by line number."""

    sources: dict[int, str]
    errors: dict[int, str]


def read_lines(content: bytes, column: str | None) -> Lines:
    """The sources of a file.

    Args:
        content: Of the file, in UTF-8.
        column: Where a JSON line has its source; None: each line is one.
    """
    lines = Lines({}, {})
    rows = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not rows[-1]:  # what ends with a line break has no line after it
        rows.pop()
    for number, row in enumerate(rows, start=1):
        try:
            text = row.decode("utf-8")
            if column is not None and text.strip():
                text = _source(json.loads(text), column)
            if not text.strip():
                raise ValueError("the source is empty")
            lines.sources[number] = text.strip()
        except UnicodeDecodeError:
            lines.errors[number] = "it is not UTF-8"
        except json.JSONDecodeError as error:
            lines.errors[number] = f"it is no JSON ({error.msg})"
        except RecursionError:
            lines.errors[number] = "its JSON is nested too deeply"
        except ValueError as error:
            lines.errors[number] = str(error)
    return lines


def _source(row: object, column: str) -> str:
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    if column not in row:
        there = ", ".join(map(str, row))[:200] or "nothing"
        raise ValueError(f"it has no {column} (--column), but {there}")
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"{column} is no text")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold half a character
        raise ValueError(f"{column} is no Unicode text") from None
    return text


def _write_whole(text: str, file: Path) -> None:
    """The file is there when all of it is."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=file.parent, prefix=f".{file.name}.", delete=False
    ) as partial:
        try:
            partial.write(text)
            partial.close()
            os.chmod(partial.name, 0o666 & ~_umask())
            os.replace(partial.name, file)
        except BaseException:
            os.unlink(partial.name)
            raise


def _umask() -> int:
    own = os.umask(0)
    os.umask(own)
    return own


def generate(arguments: argparse.Namespace) -> int:
    """Reads, writes, and returns the exit status.

    Raises:
        ExperimentError: Nothing can be done with these arguments.
    """
    writer = Writer.load(arguments.model)
    changes = {
        "num_beams": arguments.num_beams,
        "length_penalty": arguments.length_penalty,
        "no_repeat_ngram_size": arguments.no_repeat_ngram_size,
        "min_length": arguments.min_length,
        "max_length": arguments.max_length,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    writer = Writer(writer.model, writer.tokenizer, replace(writer.writing, **given))
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ExperimentError("--device cuda, but torch sees no CUDA device: use --device cpu")
    torch.nn.Module.to(writer.model, arguments.device)
    is_text = arguments.input.endswith(".txt")
    column = arguments.column or writer.writing.source_column
    try:
        is_piped = arguments.input == "-"
        content = sys.stdin.buffer.read() if is_piped else Path(arguments.input).read_bytes()
    except OSError as error:
        raise ExperimentError(
            f"--input {arguments.input} cannot be read: {error.strerror}"
        ) from error
    lines = read_lines(content, None if is_text else column)
    encoded = encode_sources(
        list(lines.sources.values()), writer.tokenizer, writer.writing.max_source_length
    )
    sources: dict[int, Source] = {}
    for number, source in zip(lines.sources, encoded):
        if source.ids:
            sources[number] = source
        else:
            lines.errors[number] = "the source has no token"
    for number in sorted(lines.errors):
        print(f"{arguments.input}, line {number}: {lines.errors[number]}", file=sys.stderr)
    with tqdm(total=len(sources), unit="text", disable=not sys.stderr.isatty()) as bar:
        texts = writer.write_encoded(
            [source.ids for source in sources.values()], arguments.batch_size, bar.update
        )
    output = "".join(
        json.dumps({"line": number, "output": text}, ensure_ascii=False) + "\n"
        for number, text in zip(sources, texts)
    )
    if arguments.output == "-":
        sys.stdout.write(output)
    else:
        try:
            _write_whole(output, Path(arguments.output))
        except OSError as error:
            raise ExperimentError(
                f"--output {arguments.output} cannot be written: {error.strerror}"
            ) from error
    num_cut = sum(source.is_cut for source in sources.values())
    told = f"{len(sources)} written"
    if num_cut:
        told += f", of {num_cut} the source was cut to {writer.writing.max_source_length} tokens"
    if lines.errors:
        told += f"; {len(lines.errors)} lines were bad and left out"
    print(told, file=sys.stderr)
    return 1 if lines.errors else 0


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return number


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{value} is not finite")
    return value


def main(given: list[str] | None = None) -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m minilm_exp.generate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", required=True, help="folder of a fine-tuned generator")
    add("--input", required=True, help=".jsonl, .txt with one source a line, or - for JSON lines")
    add("--output", required=True, help="file of JSON lines, or -")
    add("--column", help="where a JSON line has its source; default: as the task had it")
    own = "default: as it was fine-tuned"
    add("--num-beams", type=_at_least(1), help=f"1 is greedy; {own}")
    add("--length-penalty", type=_finite, help=f"above 0 favours longer targets; {own}")
    add("--no-repeat-ngram-size", type=_at_least(0), help=f"0 for no such rule; {own}")
    add("--min-length", type=_at_least(0), help=f"tokens of a target; {own}")
    add("--max-length", type=_at_least(2), help=f"tokens of a target with its last; {own}")
    add("--batch-size", type=_at_least(1), default=16, help="sources at once")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args(given)
    transformers_logging.disable_progress_bar()
    try:
        return generate(arguments)
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
