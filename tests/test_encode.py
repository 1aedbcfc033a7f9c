"""Examples as token ids, and a cache of them that is right whatever happened to its files."""

import contextlib
import copy
import functools
import multiprocessing
import threading

import numpy
import pyarrow
import pytest
from datasets import Dataset

from minilm_exp.errors import ExperimentError
from minilm_exp.provenance import fingerprint_tokenizer
from minilm_exp.task_settings import TaskSettings
from minilm_exp.tasks import encode as encode_module
from minilm_exp.tasks.encode import encode
from minilm_exp.tasks.examples import Examples
from minilm_exp.tasks.spans import encode_evaluation_windows, encode_training_windows

WAIT = 20  # seconds, for what should take a fraction of one
TEXTS = ["the model", "a", "students and teachers of the model", "", "x " * 40, "it's 12.5 %"]


def settings_of(max_length=24, doc_stride=4):
    return TaskSettings(1, 1, 1e-3, 0.0, 0.0, 0.0, 0.0, max_length, doc_stride)


def make_examples(second=True, fingerprint="a name", number=30, labels=None):
    """Short and long texts in every combination."""
    columns = {"first": [TEXTS[n % 6] for n in range(number)]}
    if second:
        columns["second"] = [TEXTS[n // 6 % 6] for n in range(number)]
    columns["label"] = labels or [n % 3 for n in range(number)]
    return Examples(Dataset.from_dict(columns), fingerprint)


def make_questions(number=5, context="the teacher " * 12):
    columns = {
        "id": [str(n) for n in range(number)],
        "question": [f"who {n}?" for n in range(number)],
        "context": [f"{context}{n}" for n in range(number)],
        "answers": [{"text": ["teacher"], "answer_start": [4]}] * number,
    }
    return Examples(Dataset.from_dict(columns), "questions")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """A copy, which a test may change, with token types."""
    copied = copy.deepcopy(tiny_tokenizer)
    copied.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return copied


@pytest.fixture
def calls(monkeypatch):
    """Number of rows of each batch that is tokenised."""
    made = []

    def counted(function, batch, *arguments, **named):
        made.append(len(next(iter(batch.values()))))
        return function(batch, *arguments, **named)

    for name in ("_encode_texts", "encode_training_windows", "encode_evaluation_windows"):
        function = getattr(encode_module, name)
        monkeypatch.setattr(encode_module, name, functools.partial(counted, function))
    return made


@pytest.fixture
def encoded(tokenizer, cache):
    """Encodes with this test's cache."""

    def made(examples, kind="classification", for_training=True, tokenizer=tokenizer, **settings):
        return encode(examples, kind, for_training, tokenizer, settings_of(**settings), cache)

    return made


def without_token_types(tokenizer):
    """As tokenizers of DistilBERT and RoBERTa are."""
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


# Rows


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("max_length", [24, 6, 128])
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_those_of_the_tokenizers_own_call(second, max_length, side, encoded, tokenizer):
    """A text that is cut elsewhere, padded, or joined without its special tokens."""
    tokenizer.truncation_side = side
    examples = make_examples(second)
    rows = encoded(examples, max_length=max_length)
    columns = examples.rows.to_dict()
    expected = tokenizer(
        columns["first"],
        columns.get("second"),
        truncation="longest_first",
        max_length=max_length,
    )
    assert rows["input_ids"][:] == expected["input_ids"]
    assert rows["token_type_ids"][:] == expected["token_type_ids"]
    assert rows["labels"][:] == columns["label"]
    assert rows["length"][:] == [sum(mask) for mask in expected["attention_mask"]]
    assert set(rows.column_names) == {"input_ids", "token_type_ids", "labels", "length"}
    assert max(rows["length"][:]) == min(max_length, 83 if second else 42)


def test_longer_text_is_cut_first(encoded, tokenizer):
    """The second text is lost behind a long first one."""
    long, short = "a b c d e f g h i j k l", "x y z"
    for first, second in ((long, short), (short, long), (long, long)):
        columns = {"first": [first], "second": [second], "label": [0]}
        rows = encoded(Examples(Dataset.from_dict(columns), first + second), max_length=13)
        texts = tokenizer.decode(rows[0]["input_ids"]).split(" [SEP]")[:2]
        expected = {
            (long, short): ["[CLS] a b c d e f g", " x y z"],
            (short, long): ["[CLS] x y z", " a b c d e f g"],
            (long, long): ["[CLS] a b c d e", " a b c d e"],
        }[first, second]
        assert texts == expected


def test_token_types_only_where_the_model_has_them(encoded, tokenizer):
    """A model gets an argument that it does not take, or pairs without their types."""
    assert "token_type_ids" in encoded(make_examples()).column_names
    names = encoded(make_examples(), tokenizer=without_token_types(tokenizer)).column_names
    assert set(names) == {"input_ids", "labels", "length"}


def test_regression_keeps_its_numbers(encoded):
    """Scores that are cut to whole numbers."""
    labels = [0.0, 2.5, 3.2, 5.0]
    rows = encoded(make_examples(number=4, labels=labels), "regression")
    assert rows["labels"][:] == labels


@pytest.mark.parametrize("for_training", [True, False])
def test_windows_are_those_of_spans(for_training, encoded, tokenizer, monkeypatch):
    """Windows numbered within a batch in place of the whole data, or labels without a window."""
    monkeypatch.setattr(encode_module, "_BATCH_EXAMPLES", 2)
    examples = make_questions()
    rows = encoded(examples, "spans", for_training)
    batch = examples.rows[:]
    if for_training:
        expected = encode_training_windows(batch, tokenizer, 24, 4)
    else:
        expected = encode_evaluation_windows(batch, list(range(5)), tokenizer, 24, 4)
    lengths = [len(ids) for ids in expected["input_ids"]]
    assert rows.to_dict() == dict(expected) | {"length": lengths}
    assert len(rows) > 5


def test_questions_without_windows_come_first(encoded, monkeypatch):
    """The types of the columns are taken from a batch that has no rows."""
    monkeypatch.setattr(encode_module, "_BATCH_EXAMPLES", 2)
    columns = make_questions().rows.to_dict()
    columns["answers"][:4] = [{"text": ["nowhere"], "answer_start": [4]}] * 4
    rows = encoded(Examples(Dataset.from_dict(columns), "x"), "spans")
    assert len(rows) > 0 and all(type(row["start_positions"]) is int for row in rows)
    columns["answers"][4] = columns["answers"][0]
    for _ in range(2):
        assert len(encoded(Examples(Dataset.from_dict(columns), "y"), "spans")) == 0


@pytest.mark.parametrize(
    ("second", "max_length", "is_refused"),
    [(False, 2, True), (False, 3, False), (True, 4, True), (True, 5, False)],
)
def test_no_room_for_a_token(second, max_length, is_refused, encoded):
    """The tokenizer gives up cutting, and a row is longer than the model has positions."""
    examples = make_examples(second)
    if is_refused:
        words = f"task_training.max_length={max_length} has no room.*: {max_length + 1} at least"
        with pytest.raises(ExperimentError, match=words):
            encoded(examples, max_length=max_length)
    else:
        assert max(encoded(examples, max_length=max_length)["length"][:]) == max_length


# The cache


def test_second_time_takes_nothing(encoded, calls):
    """Every fine-tuning of a search tokenises anew."""
    examples = make_examples()
    first = encoded(examples).to_dict()
    assert calls == [30]
    assert encoded(make_examples()).to_dict() == first
    assert calls == [30]


@pytest.mark.parametrize("for_training", [True, False])
def test_second_time_of_windows(for_training, encoded, calls):
    """The same for questions."""
    first = encoded(make_questions(), "spans", for_training).to_dict()
    assert encoded(make_questions(), "spans", for_training).to_dict() == first
    assert calls == [5]


def test_settings_that_a_call_has_left(encoded, tokenizer, calls):
    """Truncation or padding of an earlier call gets into the rows or the name of the cache."""
    first = encoded(make_examples()).to_dict()
    for number, leave in enumerate(
        [
            {"truncation": "only_second", "max_length": 12},
            {"padding": "max_length", "max_length": 64, "pad_to_multiple_of": 8},
            {"padding": True, "truncation": True, "max_length": 9},
            {"split_special_tokens": True},
        ]
    ):
        tokenizer(["the model [SEP]"], ["the student"], **leave)
        assert encoded(make_examples()).to_dict() == first
        tokenizer(["the model [SEP]"], ["the student"], **leave)
        assert encoded(make_examples(fingerprint=f"other {number}")).to_dict() == first
    assert calls == [30] * 5


def test_fingerprint_leaves_the_tokenizer_alone(tokenizer):
    """A tokenizer that stops cutting or padding because it was given a name."""
    backend = tokenizer.backend_tokenizer
    plain = fingerprint_tokenizer(tokenizer)
    assert backend.truncation is None and backend.padding is None
    backend.enable_truncation(7, stride=2, strategy="only_second", direction="left")
    backend.enable_padding(direction="left", pad_to_multiple_of=4, length=8)
    before = backend.truncation, backend.padding
    assert fingerprint_tokenizer(tokenizer) == plain
    assert (backend.truncation, backend.padding) == before


def add_token(tokenizer):
    tokenizer.add_tokens(["student"])


def change_normalizer(tokenizer):
    tokenizer.backend_tokenizer.normalizer = None


def change_side(tokenizer):
    tokenizer.truncation_side = "left"


def change_padding_side(tokenizer):
    tokenizer.padding_side = "left"


def change_cls(tokenizer):
    tokenizer.cls_token = "[MASK]"


def change_split(tokenizer):
    tokenizer.split_special_tokens = True


@pytest.mark.parametrize(
    "change",
    [add_token, change_normalizer, change_side, change_padding_side, change_cls, change_split,
     without_token_types],
)  # fmt: skip
def test_another_tokenizer(change, encoded, tokenizer, calls):
    """Token ids of another vocabulary, cut at the other end, or with another first token."""
    encoded(make_examples())
    other = copy.deepcopy(tokenizer)
    assert fingerprint_tokenizer(other) == fingerprint_tokenizer(tokenizer)
    change(other)
    assert fingerprint_tokenizer(other) != fingerprint_tokenizer(tokenizer)
    encoded(make_examples(), tokenizer=other)
    assert calls == [30, 30]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 23},
        {"doc_stride": 5},
        {"kind": "regression"},
        {"for_training": False},
        {"examples": make_examples(fingerprint="another name")},
    ],
)
def test_other_settings_or_data(changes, encoded, calls):
    """Rows of another length or of other examples."""
    encoded(make_examples())
    changes = {"examples": make_examples()} | changes
    encoded(changes.pop("examples"), **changes)
    assert calls == [30, 30]


def test_training_and_evaluation_windows(encoded, calls):
    """Answers are read from windows that have labels in place of offsets."""
    assert "start_positions" in encoded(make_questions(), "spans", True).column_names
    assert "offsets" in encoded(make_questions(), "spans", False).column_names
    assert calls == [5, 5]


def test_another_version(encoded, calls, monkeypatch):
    """Rows that an earlier version of this code has made."""
    encoded(make_examples())
    monkeypatch.setattr(encode_module, "ENCODING_VERSION", encode_module.ENCODING_VERSION + 1)
    encoded(make_examples())
    assert calls == [30, 30]


def test_part_of_the_examples(encoded, calls):
    """The first rows in place of the chosen ones."""
    examples = make_examples()
    whole = encoded(examples)
    assert encoded(examples.at_most(7)).to_dict() == whole.select(
        [n * 30 // 7 for n in range(7)]
    ).to_dict()  # fmt: skip
    assert calls == [30, 7]


def files_of(cache, ending):
    found = sorted(cache.glob(f"*{ending}"))
    assert len(found) == 1
    return found[0]


def cut_between_batches(content):
    """A whole number of batches, without the mark at the end: Arrow reads it without a word."""
    with pyarrow.ipc.open_stream(content) as reader:
        schema, batch = reader.schema, reader.read_next_batch()
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()[:-8]


def flip(content):
    """One bit in a token id."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: bytes(range(256)) * 20,
    "between batches": cut_between_batches,
    "bit": flip,
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damaged_cache(damage, encoded, cache, calls, caplog, monkeypatch):
    """The run ends, or goes on with fewer or with other rows."""
    monkeypatch.setattr(encode_module, "_BATCH_EXAMPLES", 10)
    first = encoded(make_examples()).to_dict()
    file = files_of(cache, ".arrow")
    content = file.read_bytes()
    file.write_bytes(DAMAGE[damage](content))
    assert encoded(make_examples()).to_dict() == first
    assert calls == [10] * 6
    assert f"{file} is damaged; it is made again" in caplog.text
    assert file.read_bytes() == content
    assert encoded(make_examples()).to_dict() == first
    assert calls == [10] * 6


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"0" * 32])
def test_damaged_digest(content, encoded, cache, calls):
    """A kill between the rows and their digest makes every later run fail, or trust the rows."""
    first = encoded(make_examples()).to_dict()
    digest = files_of(cache, ".digest")
    digest.unlink()
    if content is not None:
        digest.write_bytes(content)
    for _ in range(2):
        assert encoded(make_examples()).to_dict() == first
    assert calls == [30, 30]


def test_rows_stay_while_another_makes_them_again(encoded, cache):
    """Rows change under a run that reads them."""
    rows = encoded(make_examples())
    first = rows.to_dict()
    files_of(cache, ".digest").unlink()
    encoded(make_examples())
    assert rows.to_dict() == first


def test_failure_leaves_nothing(encoded, cache, monkeypatch):
    """Half of the rows are taken for all of them after an error in the middle."""
    monkeypatch.setattr(encode_module, "_BATCH_EXAMPLES", 10)
    function = encode_module._encode_texts

    def failing(batch, **named):
        if batch["first"][0] == TEXTS[20 % 6]:
            raise ValueError("in the middle")
        return function(batch, **named)

    monkeypatch.setattr(encode_module, "_encode_texts", failing)
    with pytest.raises(ValueError, match="in the middle"):
        encoded(make_examples())
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    monkeypatch.setattr(encode_module, "_encode_texts", function)
    assert len(encoded(make_examples())) == 30


def test_two_processes_at_once(encoded, cache, calls, monkeypatch):
    """The second one reads what the first one has half written, or both write into one file."""
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.SimpleQueue()
    function = encode_module._encode_texts

    def begin_together(batch, **named):
        # Broken where one of them waits for a lock that the other one holds.
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(1)
        return function(batch, **named)

    monkeypatch.setattr(encode_module, "_encode_texts", begin_together)

    def run():
        try:
            queue.put(encoded(make_examples()).to_dict())
        except BaseException as error:
            queue.put(f"{type(error).__name__}: {error}")

    processes = [context.Process(target=run, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT)
        process.kill()
    assert not queue.empty()
    first, second = queue.get(), queue.get()
    assert first == second
    monkeypatch.undo()
    assert encoded(make_examples()).to_dict() == first
    assert sorted(path.suffix for path in cache.iterdir()) == [".arrow", ".digest", ".lock"]


def test_many_rows(encoded, cache, calls):
    """Rows lost or out of order at the border of a batch."""
    number = 2 * encode_module._BATCH_EXAMPLES + 1
    columns = {"first": [f"{n}" for n in range(number)], "label": list(range(number))}
    rows = encoded(Examples(Dataset.from_dict(columns), "many"))
    assert calls == [1000, 1000, 1]
    assert rows["labels"][:] == list(range(number))
    assert rows["length"][:] == (2 + numpy.char.str_len([str(n) for n in range(number)])).tolist()
