"""python -m minilm_exp.generate on good and hostile input."""

import io
import json
import os
import sys

import pytest
from test_writer import make_writer

from minilm_exp import generate as module
from minilm_exp.generate import main, read_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved generator, and the same one here."""
    writer = make_writer()
    writer.model.float()
    folder = tmp_path_factory.mktemp("generator")
    writer.save(folder)
    return folder, writer


@pytest.fixture
def run(model, tmp_path, capsys):
    """Writes the input, runs the command, and gives status, output lines and what was told."""

    def ran(content, *arguments, name="in.jsonl", output="out.jsonl"):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        given = ["--model", str(model[0]), "--input", str(file)]
        status = main([*given, "--output", str(tmp_path / output), *arguments])
        written = tmp_path / output
        lines = written.read_text("utf-8").splitlines() if written.exists() else None
        told = capsys.readouterr().err
        return status, None if lines is None else [json.loads(line) for line in lines], told

    return ran


def jsonl(*sources):
    return "".join(json.dumps({"source": source}) + "\n" for source in sources)


def test_outputs_stand_in_the_order_of_the_input(run, model):
    """Batches of like length whose texts get the numbers of others."""
    sources = ["w1", "w2 w3 w4 w5 w6 w7", "w8 w9", "w1 w2 w3"]
    status, lines, told = run(jsonl(*sources), "--batch-size", "2")
    expected = [model[1].write([source])[0] for source in sources]
    assert status == 0
    assert lines == [{"line": n, "output": text} for n, text in enumerate(expected, start=1)]
    assert "4 written\n" in told


def test_bad_lines_do_not_lose_the_good_ones(run):
    """A file of a thousand articles that is given up at its third line."""
    content = b"\n".join(
        [
            b'{"source": "w1"}',
            b"{not json",
            b'["w1"]',
            b'{"text": "w1"}',
            b'{"source": 7}',
            b'{"source": " "}',
            b"",
            b'{"source": "\xff"}',
            b'{"source": "\\ud800"}',
            b'{"source": ' + b"[" * 100_000,
            b'{"source": "w2"}',
        ]
    )
    status, lines, told = run(content)
    assert status == 1
    assert [line["line"] for line in lines] == [1, 11]
    for number, word in {
        2: "no JSON",
        3: "no JSON object",
        4: "no source (--column), but text",
        5: "source is no text",
        6: "the source is empty",
        7: "the source is empty",
        8: "not UTF-8",
        9: "no Unicode text",
        10: "",
    }.items():
        [line] = [one for one in told.splitlines() if f"line {number}:" in one]
        assert word in line
    assert "2 written; 9 lines were bad and left out" in told


def test_long_sources_are_cut_and_counted(run, model):
    """An article whose end nobody read, without a word; or one that breaks the model."""
    status, lines, told = run(jsonl("w1 " * 11, "w2", "w3 " * 100_000))
    assert status == 0
    assert len(lines) == 3
    assert "3 written, of 2 the source was cut to 12 tokens" in told


def test_text_files_have_a_source_a_line(run, model):
    """A text that is taken for JSON, or an empty line that shifts the numbers."""
    status, lines, _ = run("w1\r\n\r\n\ufeff w2 w3\n".encode("utf-8-sig"), name="in.txt")
    assert status == 1
    assert [line["line"] for line in lines] == [1, 3]
    assert lines[0]["output"] == model[1].write(["w1"])[0]


def test_column_can_be_named(run, model):
    """A column that is looked for under one name only."""
    status, lines, _ = run(json.dumps({"article": "w1 w2"}), "--column", "article")
    assert (status, lines[0]["output"]) == (0, model[1].write(["w1 w2"])[0])


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_input_without_a_good_line(content, run):
    """A traceback from a batch of nothing."""
    status, lines, told = run(content)
    assert lines == []
    assert status == (1 if content else 0)
    assert "0 written" in told


def test_standard_input_and_output(model, monkeypatch, capsys):
    """A pipe that is taken for a file of the name -."""
    stream = io.TextIOWrapper(io.BytesIO(jsonl("w1").encode()))
    monkeypatch.setattr(sys, "stdin", stream)
    assert main(["--model", str(model[0]), "--input", "-", "--output", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == {"line": 1, "output": model[1].write(["w1"])[0]}


def test_options_reach_the_search(run, model):
    """A flag that is parsed and forgotten."""
    plain = run(jsonl("w1 w2"))[1][0]["output"].split()
    short = run(jsonl("w1 w2"), "--max-length", "2")[1][0]["output"].split()
    assert len(short) <= 2 < len(plain)
    _, lines, _ = run(
        jsonl("w1 w2"), "--num-beams", "3", "--length-penalty", "0.5", "--no-repeat-ngram-size",
        "1", "--min-length", "5", "--max-length", "7",
    )  # fmt: skip
    words = [word for word in lines[0]["output"].split() if word != "."]
    assert 5 <= len(lines[0]["output"].split()) <= 7
    assert len(words) == len(set(words))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "/nowhere"], "no fine-tuned generator"),
        (["--input", "/nowhere.jsonl"], "cannot be read"),
        (["--output", "/nowhere/out.jsonl"], "cannot be written"),
        (["--max-length", "1000"], "more than the 40 positions"),
        (["--min-length", "8"], "min_length=8 must be below"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, message, run):
    """A traceback for a wrong path."""
    status, _, told = run(jsonl("w1"), *arguments)
    assert status == 2
    [line] = [one for one in told.splitlines() if one.startswith("error")]
    assert message in line


@pytest.mark.parametrize(
    "arguments", [["--num-beams", "0"], ["--length-penalty", "nan"], ["--batch-size", "-1"]]
)
def test_numbers_out_of_range_are_refused(arguments, run):
    """A beam search of no beams."""
    with pytest.raises(SystemExit) as ended:
        run(jsonl("w1"), *arguments)
    assert ended.value.code == 2


def test_output_is_whole_or_as_it_was(run, model, tmp_path, monkeypatch):
    """Half a file that a script takes for all of it."""
    run(jsonl("w1"))
    before = (tmp_path / "out.jsonl").read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    status, _, told = run(jsonl("w1", "w2"))
    assert status == 2
    assert "No space left" in told
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_lines_keep_their_numbers():
    """Numbers that count good lines only, or another line break."""
    lines = read_lines(b"\xef\xbb\xbfa\n\n b \x85 c\nd", None)
    assert lines.sources == {1: "a", 4: "d"}
    assert sorted(lines.errors) == [2, 3]
