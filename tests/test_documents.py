"""Documents from every kind of file, and what is said of files that cannot be read."""

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pytest
from conftest import REPOSITORY
from pyarrow import parquet

from minilm_exp import documents as documents_module
from minilm_exp.documents import read_documents, read_token_ids, sentences
from minilm_exp.errors import ExperimentError
from minilm_exp.settings import Corpus, HubDataset

DATA = REPOSITORY.parent / "shared" / "data"


def make_corpus(*files, **changes):
    values = {
        "files": [str(file) for file in files],
        "datasets": [],
        "text_column": "text",
        "pretokenized": False,
        "split": "document",
        "packing": True,
        "block_length": 16,
        "held_out_fraction": 0.3,
    }
    return Corpus(**{**values, **changes})


def read(*files, **changes):
    return list(read_documents(make_corpus(*files, **changes)))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


# Text files


@pytest.mark.parametrize(
    "content, expected",
    [
        ("one\ntwo\n\nthree\n", ["one\ntwo", "three"]),
        ("one\n\n\n \t\n\ntwo\n", ["one", "two"]),
        ("\n\none\n\ntwo\n\n\n", ["one", "two"]),
        ("one\ntwo\nthree", ["one", "two", "three"]),
        ("one\ntwo\n\n\n", ["one", "two"]),
        ("\n\none\ntwo\n", ["one", "two"]),
        ("\ufeffone\n\ntwo\n", ["one", "two"]),
        ("\ufeffone\ntwo\n", ["one", "two"]),
        ("one\r\nmore\r\n\r\ntwo\r\n", ["one\nmore", "two"]),
        ("one\r\ntwo\r\n", ["one", "two"]),
        ("  one  \n  more\n\ntwo", ["one\nmore", "two"]),
        ("один\n\n二\n\nثلاثة\n", ["один", "二", "ثلاثة"]),
        ("", []),
        ("\n \n\t\n", []),
    ],
)
def test_text_files(content, expected, tmp_path):
    """Documents glued together, a mark or a carriage return left in, empty documents."""
    assert read(write(tmp_path / "a.txt", content)) == expected


def test_globs_are_read_in_a_fixed_order(tmp_path, monkeypatch):
    """An order that depends on the disk, files below folders missed, ~ taken literally."""
    for name in ("b", "a", "c/d"):
        path = tmp_path / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        write(path, name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/**/*.txt") == ["a", "b", "c/d"]
    assert read(tmp_path / "b.txt", tmp_path / "a.txt") == ["b", "a"]


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    """Mojibake in the corpus, or an error that does not say which of a thousand files."""
    path = write(tmp_path / "latin.txt", "eins\n\nzwei\nfünf\n".encode("latin-1"))
    with pytest.raises(ExperimentError, match=re.escape(f"{path}, line 4: not UTF-8")):
        read(path)


# Lines of JSON


def test_json_lines(tmp_path):
    """Blank lines counted as records, a byte order mark, another column read."""
    lines = "\ufeff" + json_lines({"text": "one\ntwo", "id": 1}) + "\n" + json_lines({"text": "三"})
    assert read(write(tmp_path / "a.jsonl", lines)) == ["one\ntwo", "三"]
    path = write(tmp_path / "b.jsonl", json_lines({"body": "one", "text": "no"}))
    assert read(path, text_column="body") == ["one"]


def test_compressed_json_lines(tmp_path):
    """A compressed file read as if it were plain."""
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines({"text": "one"}).encode()))
    assert read(path) == ["one"]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "one"}\n{"text": \n', "line 2: not valid JSON"),
        ('{"text": "one"}\n{"body": "two"}\n', "line 2: no text under 'text'"),
        ('{"text": 3}\n', "line 1: no text under 'text'"),
        ("[1, 2]\n", "corpus.pretokenized=true"),
        (b'{"text": "\xfc"}\n', "line 1: not UTF-8"),
    ],
)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_wrong_json_lines_are_named(content, message, is_compressed, tmp_path):
    """A record that is silently left out, or an error without file and line."""
    content = content if isinstance(content, bytes) else content.encode()
    name = "a.jsonl.gz" if is_compressed else "a.jsonl"
    path = write(tmp_path / name, gzip.compress(content) if is_compressed else content)
    with pytest.raises(ExperimentError, match=re.escape(message)) as caught:
        read(path)
    assert str(path) in str(caught.value)


def damaged_gzips():
    whole = gzip.compress(json_lines(*({"text": f"line {i * i}"} for i in range(200))).encode())
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    return {
        "cut off": whole[:middle],
        "cut off in the sum": whole[:-3],
        "byte changed": flipped,
        "sum changed": whole[:-6] + b"\0\0" + whole[-4:],
        "not gzip": b"plain",
        "no valid block": whole[:10] + b"\xff" * 20,
    }


@pytest.mark.parametrize("content", damaged_gzips().values(), ids=damaged_gzips().keys())
def test_damaged_gzip_is_refused(content, tmp_path):
    """A download that broke off and is taken for a whole corpus, or shown as a traceback."""
    path = write(tmp_path / "a.jsonl.gz", content)
    with pytest.raises(ExperimentError, match=re.escape(str(path))):
        read(path)


# Parquet


def write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet(tmp_path):
    """Rows without text that end the reading or become the word None."""
    path = write_parquet(tmp_path / "a.parquet", text=["one\ntwo", None, "", "three"], id=[1] * 4)
    assert read(path) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"body": ["one"]}, "no column 'text' but body"),
        ({"text": [1, 2]}, "is not text"),
        ({"text": [["one"]]}, "is not text"),
    ],
)
def test_parquet_without_text_is_named(columns, message, tmp_path):
    """Numbers or lists tokenised as text."""
    path = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(ExperimentError, match=message):
        read(path)


@pytest.mark.parametrize("damage", ["not parquet", "empty", "cut off", "data overwritten"])
def test_unreadable_parquet_is_refused(damage, tmp_path):
    """An exception of the parquet reader instead of a message."""
    path = write_parquet(tmp_path / "a.parquet", text=[f"text {i * i}" for i in range(500)])
    whole = path.read_bytes()
    contents = {
        "not parquet": b"plain text",
        "empty": b"",
        "cut off": whole[: len(whole) // 2],
        "data overwritten": whole[:4] + b"\xff" * 400 + whole[404:],
    }
    write(path, contents[damage])
    with pytest.raises(ExperimentError, match=re.escape(str(path))):
        read(path)


# Token ids


def test_token_ids(tmp_path):
    """Ids that are read as text, or in another order."""
    path = write(tmp_path / "a.jsonl", json_lines([1, 2], [], [3]))
    packed = write(tmp_path / "b.jsonl.gz", gzip.compress(json_lines([4]).encode()))
    corpus = make_corpus(path, packed, pretokenized=True)
    assert list(read_token_ids(corpus)) == [[1, 2], [], [3], [4]]


@pytest.mark.parametrize(
    "record", [{"text": "one"}, ["one"], [1.5], [True], [[1]], None, 3], ids=json.dumps
)
def test_wrong_token_ids_are_named(record, tmp_path):
    """Text, halves or truth values taken for ids."""
    path = write(tmp_path / "a.jsonl", json_lines([1], record))
    with pytest.raises(ExperimentError, match=re.escape(f"{path}, line 2: not a list of token")):
        list(read_token_ids(make_corpus(path, pretokenized=True)))


# Other sources


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a", "a.txt.gz", "a.bz2"])
def test_unknown_suffix_is_refused(name, tmp_path):
    """A table or an archive that is tokenised as if it were prose."""
    path = write(tmp_path / name, "one\n")
    with pytest.raises(ExperimentError, match=re.escape(f"{path} is none of .txt")):
        read(path)


def test_local_data_set_folder(tmp_path):
    """A folder laid out like a hub data set that is looked for on the network."""
    write_parquet(tmp_path / "train.parquet", text=["one", "two"])
    assert read(datasets=[HubDataset(path=str(tmp_path))]) == ["one", "two"]
    with pytest.raises(ExperimentError, match=r"no text column 'body' but text"):
        read(datasets=[HubDataset(path=str(tmp_path))], text_column="body")
    with pytest.raises(ExperimentError, match="split test"):
        read(datasets=[HubDataset(path=str(tmp_path), split="test")])


def test_data_set_without_network_is_explained():
    """A client library's traceback where the hub cannot be reached."""
    with pytest.raises(ExperimentError, match=r"no-such/data-set.*corpus\.files"):
        read(datasets=[HubDataset(path="no-such/data-set")])


def test_demo_text_is_prose():
    """Markup, lists or headings left in the packaged articles."""
    pytest.importorskip("gensim", reason="the demo corpus lies in the package gensim")
    demo = documents_module._read_demo()
    for _ in range(10):
        lines = next(demo).splitlines()
        assert all(len(line) >= 80 and "{{" not in line and "==" not in line for line in lines)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder shared/data beside the repository")
def test_real_text_files(monkeypatch):
    """Real files of several languages that lose text or are taken for one document."""
    files = sorted((DATA / "corpus").glob("*.txt"), key=lambda path: path.stat().st_size)[:4]
    if not files:
        pytest.skip("shared/data has no corpus of text files")
    for path in files:
        found = read(path)
        assert len(found) > 10
        assert "".join("".join(found).split()) == "".join(Path(path).read_text("utf-8").split())


# Sections and sentences


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_long_documents_are_cut_between_paragraphs_without_loss(form, tmp_path, monkeypatch):
    """A book that is one document, or one that loses the paragraph at each cut."""
    monkeypatch.setattr(documents_module, "SECTION_CHARACTERS", 5000)
    paragraphs = [f"Paragraph {i} has its own number, {i * i}." for i in range(3000)]
    book, tale = "\n".join(paragraphs), "A short tale."
    if form == "txt":
        path = write(tmp_path / "a.txt", f"{book}\n\n{tale}\n")
    else:
        path = write(tmp_path / "a.jsonl", json_lines({"text": book}, {"text": tale}))
    *sections, last = read(path)
    assert last == tale
    assert "\n".join(sections) == book
    assert len(sections) > 15
    assert max(map(len, sections)) < 2 * 5000


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Version 3.5 is out.\nNext", ["Version 3.5 is out.", "Next"]),
        ("No end\nof line", ["No end", "of line"]),
        ("今天很好。明天呢？走！", ["今天很好。", "明天呢？", "走！"]),
        ("今日は雨です。傘がありますか？はい", ["今日は雨です。", "傘がありますか？", "はい"]),
        ("ما هذا؟ هذا كتاب.", ["ما هذا؟", "هذا كتاب."]),
        ("यह क्या है। यह किताब है।", ["यह क्या है।", "यह किताब है।"]),
        ("Он ушёл. Почему?", ["Он ушёл.", "Почему?"]),
        ("  \n\n ", []),
    ],
)
def test_sentences_of_several_scripts(text, expected):
    """Scripts whose documents are one sentence each."""
    assert sentences(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        'He said "Go." Then he left.',
        "(It was late.) Nobody came.",
        "It read 'no entry.' We went in!",
        "[See note.] 「行く。」と言った。 What?! Yes...",
    ],
)
def test_sentences_keep_every_character(text):
    """Closing quotes and brackets lost at the end of sentences."""
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())
