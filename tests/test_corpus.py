"""Packing, the held-out part, and a cache that is right whatever happened to its files."""

import contextlib
import gzip
import json
import multiprocessing
import random
import shutil
import threading
import time

import numpy
import pytest

from minilm_exp import corpus as corpus_module
from minilm_exp.corpus import fingerprint_corpus, prepare_corpus
from minilm_exp.errors import ExperimentError

LENGTH = 16
CONTENT = LENGTH - 2
CACHE_FILES = ["train.ids", "train.offsets", "validation.ids", "validation.offsets",
               "held_out.jsonl"]  # fmt: skip
WAIT = 20  # seconds, for what should take a fraction of one


def make_documents(number=40, seed=5):
    """Different documents of a few to a few dozen tokens, each full of its own number."""
    draw = random.Random(seed)
    return [f"{' '.join([f'd{i}'] * draw.randint(2, 12))}. the end" for i in range(number)]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(make_documents()))
    return path


@pytest.fixture
def settings_of(settings_for):
    """Settings for a corpus of some files."""

    def made(*files, **values):
        given = {"block_length": LENGTH, "files": [str(file) for file in files], **values}
        return settings_for(
            "task=none", values={f"corpus.{name}": value for name, value in given.items()}
        )

    return made


@pytest.fixture
def prepare(settings_of, tiny_tokenizer):
    def prepared(*files, tokenizer=tiny_tokenizer, **values):
        settings = settings_of(*files, **values)
        return prepare_corpus(settings, tokenizer, fingerprint_corpus(settings.corpus))

    return prepared


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rows(blocks):
    return [blocks[i]["input_ids"].tolist() for i in range(len(blocks))]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def by_part(documents, prepared):
    held_out = prepared.held_out_documents()
    return {
        "validation": held_out,
        "train": [document for document in documents if document not in held_out],
    }


# Packing


@pytest.mark.parametrize("split", ["document", "sentence"])
def test_blocks_hold_the_whole_stream_in_order(split, prepare, text_file, tiny_tokenizer):
    """Tokens lost or doubled at the border of a block, a batch or a document."""
    prepared = prepare(text_file, split=split)
    first, separator = tiny_tokenizer.cls_token_id, tiny_tokenizer.sep_token_id
    for part, documents in by_part(make_documents(), prepared).items():
        stream = []
        for document in documents:
            sentences = [document]
            if split == "sentence":
                words, end = document.split(". ")
                sentences = [f"{words}.", end]
            for sentence in sentences:
                stream += [*ids_of(tiny_tokenizer, sentence), separator]
        blocks = rows(getattr(prepared, part))
        assert all(len(block) == LENGTH for block in blocks)
        assert all(block[0] == first and block[-1] == separator for block in blocks)
        packed = [token for block in blocks for token in block[1:-1]]
        assert packed == stream[: len(packed)]
        assert len(stream) - len(packed) < CONTENT
        assert getattr(prepared, part).num_tokens == len(blocks) * LENGTH


def test_more_documents_than_a_batch(prepare, tmp_path, tiny_tokenizer, monkeypatch):
    """The rest of a stream forgotten between two batches of documents."""
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(make_documents(50)))
    monkeypatch.setattr(corpus_module, "_BATCH_BYTES", 300)
    prepared = prepare(path)
    assert prepared.num_documents == 50
    separator = tiny_tokenizer.sep_token_id
    for part, documents in by_part(make_documents(50), prepared).items():
        stream = [t for text in documents for t in [*ids_of(tiny_tokenizer, text), separator]]
        packed = [t for block in rows(getattr(prepared, part)) for t in block[1:-1]]
        assert packed == stream[: len(stream) // CONTENT * CONTENT]


def test_without_packing_each_document_is_an_example(prepare, text_file, tiny_tokenizer):
    """Short documents joined, long ones dropped, or cut off without being counted."""
    prepared = prepare(text_file, packing=False)
    first, separator = tiny_tokenizer.cls_token_id, tiny_tokenizer.sep_token_id
    num_long = 0
    for part, documents in by_part(make_documents(), prepared).items():
        ids = [ids_of(tiny_tokenizer, document) for document in documents]
        num_long += sum(len(i) > CONTENT for i in ids)
        expected = [[first, *i[:CONTENT], separator] for i in ids]
        assert rows(getattr(prepared, part)) == expected
    assert prepared.num_truncated == num_long
    assert 0 < num_long < 40


def test_sentences_without_packing(prepare, text_file):
    """split=sentence that still gives whole documents."""
    prepared = prepare(text_file, packing=False, split="sentence")
    assert len(prepared.train) + len(prepared.validation) == 2 * 40


def test_pretokenized_ids_are_packed_as_they_are(prepare, tmp_path, tiny_tokenizer):
    """Ids changed, read as text, or an empty list that becomes a document."""
    draw = random.Random(2)
    lists = [[draw.randrange(5, 40) for _ in range(draw.randint(3, 30))] for _ in range(30)]
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(f"{json.dumps(ids)}\n" for ids in [*lists, []]))
    prepared = prepare(path, pretokenized=True)
    separator = tiny_tokenizer.sep_token_id
    assert prepared.num_documents == 30
    packed = {
        part: [t for block in rows(getattr(prepared, part)) for t in block[1:-1]]
        for part in ("train", "validation")
    }
    # Which list went where is seen from the streams, each of which must be used up in order.
    left = {part: list(tokens) for part, tokens in packed.items()}
    for ids in lists:
        piece = [*ids, separator]
        part = next(p for p, tokens in left.items() if piece[: len(tokens)] == tokens[: len(piece)])
        del left[part][: len(piece)]
    assert left == {"train": [], "validation": []}
    assert prepared.held_out_documents() == []


@pytest.mark.parametrize("wrong", [-1, 10_000])
def test_token_id_outside_the_vocabulary_is_refused(wrong, prepare, tmp_path):
    """Ids of another tokenizer, noticed by an index error on a GPU, or wrapped around."""
    path = tmp_path / "ids.jsonl"
    path.write_text(f"[5, 6, 7]\n[5, {wrong}]\n")
    with pytest.raises(ExperimentError, match=f"token id {wrong} is outside"):
        prepare(path, pretokenized=True)


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_empty_corpus_is_refused(content, prepare, tmp_path):
    """A run on nothing."""
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(ExperimentError, match="the corpus is empty"):
        prepare(path)


def test_too_small_corpus_is_refused(prepare, tmp_path):
    """No held-out block, and a division by zero after distilling."""
    path = tmp_path / "small.txt"
    path.write_text("the model and the student\n\nthe teacher of the student")
    with pytest.raises(ExperimentError, match=r"too small: its 2 documents.*block_length"):
        prepare(path, block_length=64)


def test_a_reading_error_leaves_no_cache(prepare, settings_of, tmp_path):
    """Half a corpus taken for a whole one the second time."""
    path = tmp_path / "a.jsonl"
    good = "".join(json.dumps({"text": text}) + "\n" for text in make_documents())
    path.write_text(good + "{broken\n")
    for _ in range(2):
        with pytest.raises(ExperimentError, match="line 41: not valid JSON"):
            prepare(path)
    folder = settings_of(path).outputs / "cache" / "corpus"
    assert [path for path in folder.iterdir() if path.suffix != ".lock"] == []


def test_lone_surrogates_are_no_text(prepare, tmp_path):
    """An escape in a JSON file that cannot be encoded stops the run, there or in a task."""
    path = tmp_path / "a.jsonl"
    texts = ["first \ud800 text", *make_documents()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepared = prepare(path)
    assert prepared.num_documents == 41
    for document in prepared.held_out_documents():
        document.encode()


# The held-out part


def parts_of(documents, prepared, tokenizer):
    """Parts in which each document's own number occurs, read from the blocks themselves."""
    text = {
        part: " ".join(tokenizer.decode(row) for row in rows(getattr(prepared, part)))
        .replace(" ", "")
        .replace("##", "")
        for part in ("train", "validation")
    }
    return {
        document: [p for p in text if document.split(".")[0].split()[0] * 2 in text[p]]
        for document in documents
    }


def test_every_document_is_in_one_part(prepare, text_file, tiny_tokenizer):
    """Validation on what was trained on, or documents that are in neither part."""
    prepared = prepare(text_file, packing=False)
    documents = make_documents()
    held_out = set(prepared.held_out_documents())
    assert prepared.num_documents == 40
    assert documents[0] in held_out
    assert 4 <= len(held_out) <= 22  # around 12 of 40
    for document, parts in parts_of(documents, prepared, tiny_tokenizer).items():
        assert parts == (["validation"] if document in held_out else ["train"])


def test_held_out_part_stays_when_text_is_added(prepare, text_file, tmp_path):
    """A document that was held out is trained on, because the corpus grew."""
    before = set(prepare(text_file).held_out_documents())
    more = tmp_path / "more.txt"
    more.write_text("\n\n".join(make_documents(80)[40:]))
    after = set(prepare(text_file, more).held_out_documents())
    assert before == after & set(make_documents())


def test_held_out_part_stays_when_text_is_put_in_front(prepare, text_file, tmp_path):
    """The same with a file that sorts first; only the old first document may change its part."""
    before = set(prepare(text_file, held_out_fraction=0.1).held_out_documents())
    more = tmp_path / "more.txt"
    more.write_text("\n\n".join(make_documents(80)[40:]))
    after = set(prepare(more, text_file, held_out_fraction=0.1).held_out_documents())
    kept = after & set(make_documents())
    assert kept <= before
    assert before - kept <= {make_documents()[0]}


def test_duplicates_are_on_one_side(prepare, tmp_path):
    """A copy of a held-out document in the training part."""
    documents = make_documents() * 3
    random.Random(1).shuffle(documents)
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(documents))
    held_out = prepare(path).held_out_documents()
    assert prepare(path).num_documents == 120
    assert {document: held_out.count(document) for document in held_out} == dict.fromkeys(
        held_out, 3
    )


def test_share_of_the_held_out_part(prepare, tmp_path):
    """A share that means something else than documents."""
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(make_documents(1000)))
    for share in (0.1, 0.5):
        found = len(prepare(path, held_out_fraction=share).held_out_documents()) / 1000
        assert abs(found - share) < 0.05


# The cache


@pytest.fixture
def no_tokenizing(monkeypatch, tiny_tokenizer):
    def fail(*_, **__):
        raise AssertionError("the cache was not used")

    def switch():
        monkeypatch.setattr(type(tiny_tokenizer), "__call__", fail)

    return switch


def test_cache_is_used_again(prepare, text_file, tmp_path, no_tokenizing):
    """Hours of tokenising at every start, or at every new name of the same file."""
    before = prepare(text_file)
    renamed = tmp_path / "renamed.txt"
    shutil.copy(text_file, renamed)
    no_tokenizing()
    for path in (text_file, renamed):
        after = prepare(path)
        assert after.folder == before.folder
        assert after.num_documents == before.num_documents
        assert after.num_truncated == before.num_truncated
        assert rows(after.train) == rows(before.train)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_length": 20},
        {"split": "sentence"},
        {"packing": False},
        {"held_out_fraction": 0.4},
    ],
    ids=str,
)
def test_key_changes_with_every_setting_of_the_blocks(changes, prepare, text_file):
    """A changed setting that is answered with the old blocks."""
    assert prepare(text_file, **changes).folder != prepare(text_file).folder


def test_key_changes_with_content_column_and_tokenizer(
    prepare, settings_of, text_file, tmp_path, tiny_tokenizer
):
    """Blocks of another text, column or vocabulary taken for the right ones."""
    folders = {prepare(text_file).folder}
    text_file.write_text(text_file.read_text().replace("d7", "d8", 1))
    folders.add(prepare(text_file).folder)
    other = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        **{k: v for k, v in tiny_tokenizer.special_tokens_map.items() if isinstance(v, str)},
    )
    other.add_tokens(["d3"])
    folders.add(prepare(text_file, tokenizer=other).folder)
    assert len(folders) == 3
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "body": "two"}\n')
    assert fingerprint_corpus(settings_of(path).corpus) != fingerprint_corpus(
        settings_of(path, text_column="body").corpus
    )


def test_key_changes_with_the_kind_of_file(settings_of, tmp_path):
    """Blocks of lines of JSON read as prose, taken for those of their texts."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in make_documents())
    fingerprints = set()
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text(lines)
        fingerprints.add(fingerprint_corpus(settings_of(tmp_path / name).corpus))
    assert len(fingerprints) == 2


def test_files_are_not_run_together(settings_of, tmp_path):
    """The same bytes divided otherwise between two files."""
    fingerprints = set()
    for number, (first, second) in enumerate([("ab", "c"), ("a", "bc")]):
        paths = [tmp_path / f"{number}{name}.txt" for name in "xy"]
        for path, text in zip(paths, (first, second)):
            path.write_text(text)
        fingerprints.add(fingerprint_corpus(settings_of(*paths).corpus))
    assert len(fingerprints) == 2


@pytest.mark.parametrize("name", CACHE_FILES)
@pytest.mark.parametrize("damage", ["byte", "cut off", "empty", "longer", "gone"])
def test_damaged_cache_is_built_again(name, damage, prepare, text_file):
    """Training on blocks of a broken disk or of a copy that stopped half way."""
    prepared = prepare(text_file)
    before, train = contents(prepared.folder), rows(prepared.train)
    path = prepared.folder / name
    whole = before[name]
    middle = len(whole) // 2
    if damage == "gone":
        path.unlink()
    else:
        changed = {
            "byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "cut off": whole[:-1],
            "empty": b"",
            "longer": whole + b"\0",
        }
        path.write_bytes(changed[damage])
    again = prepare(text_file)
    assert contents(again.folder) == before
    assert rows(again.train) == train


@pytest.mark.parametrize(
    "change",
    [
        lambda text: None,
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace("uint16", "uint17"),
        lambda text: text.replace('"num_documents": 40', '"num_documents": 41'),
        lambda text: text.replace('"dtype"', '"dtypf"'),
        lambda text: text.replace('"num_truncated"', '"num_truncatee"'),
    ],
    ids=["gone", "empty", "cut off", "a list", "no files", "type changed", "number changed",
         "type gone", "number gone"],
)  # fmt: skip
def test_damaged_meta_is_built_again(change, prepare, text_file):
    """A cache whose own description is wrong: a crash, or a number that was never true."""
    prepared = prepare(text_file)
    before = contents(prepared.folder)
    path = prepared.folder / "meta.json"
    text = change(before["meta.json"].decode())
    assert text != before["meta.json"].decode()
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    again = prepare(text_file)
    assert again.num_documents == 40
    assert contents(again.folder) == before


def test_remains_of_a_killed_writer_are_harmless(prepare, text_file):
    """Half a cache that is opened, or that keeps the next process from writing."""
    before = prepare(text_file)
    expected = contents(before.folder)
    shutil.rmtree(before.folder)
    partial = before.folder.with_name(f"{before.folder.name}.partial")
    partial.mkdir()
    (partial / "train.ids").write_bytes(b"\1" * 1000)
    (partial / "left_over").write_bytes(b"\1")
    assert contents(prepare(text_file).folder) == expected


def test_building_twice_gives_equal_bytes(prepare, text_file):
    """Blocks that depend on the order of a set or on the time."""
    prepared = prepare(text_file)
    before = contents(prepared.folder)
    shutil.rmtree(prepared.folder)
    assert contents(prepare(text_file).folder) == before


def in_processes(functions):
    """Runs each function in a process of its own; gives what they returned."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def run(number, function):
        try:
            queue.put((number, True, function()))
        except BaseException as error:
            queue.put((number, False, f"{type(error).__name__}: {error}"))

    processes = [
        context.Process(target=run, args=item, daemon=True) for item in enumerate(functions)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT)
    answers = sorted(queue.get() for _ in processes if not queue.empty())
    for process in processes:
        process.kill()
    assert len(answers) == len(functions)
    return answers


def test_two_processes_that_finish_the_same_cache_at_once(prepare, text_file, monkeypatch):
    """The second of two runs fails, because the folder that it wants is there already."""
    barrier = multiprocessing.get_context("fork").Barrier(2)
    rename = corpus_module.Path.rename

    def rename_together(self, target):
        # Broken where one of them waits for a lock that the other one holds.
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(2)
        return rename(self, target)

    monkeypatch.setattr(corpus_module.Path, "rename", rename_together)
    answers = in_processes([lambda: rows(prepare(text_file).train)] * 2)
    assert [ok for _, ok, _ in answers] == [True, True], answers
    assert answers[0][2] == answers[1][2]


def test_a_cache_that_is_being_read_is_not_taken_away(prepare, text_file, monkeypatch):
    """A slower process removes the finished cache while the faster one opens it."""
    context = multiprocessing.get_context("fork")
    is_read, is_removed, both_build = context.Event(), context.Event(), context.Barrier(2)
    hash_file, remove, tokenise = (
        corpus_module.fingerprint_files,
        shutil.rmtree,
        corpus_module._tokenise,
    )

    def begin_together(*arguments):
        with contextlib.suppress(threading.BrokenBarrierError):
            both_build.wait(2)
        return tokenise(*arguments)

    def hash_slowly(files):
        folder = files[0].parent
        if folder.parent.name == "corpus" and not folder.name.endswith(".partial"):
            is_read.set()
            if not is_removed.wait(1):
                is_removed.set()  # nobody removes it: once is enough to know
        return hash_file(files)

    def remove_late(path, *arguments, **named):
        if str(path).endswith(".partial"):
            return remove(path, *arguments, **named)
        is_read.wait(2)
        remove(path, *arguments, **named)
        is_removed.set()
        time.sleep(0.5)

    def faster():
        monkeypatch.setattr(corpus_module, "fingerprint_files", hash_slowly)
        return rows(prepare(text_file).train)

    def slower():
        monkeypatch.setattr(corpus_module.shutil, "rmtree", remove_late)
        return rows(prepare(text_file).train)

    monkeypatch.setattr(corpus_module, "_tokenise", begin_together)
    answers = in_processes([faster, slower])
    assert [ok for _, ok, _ in answers] == [True, True], answers
    assert answers[0][2] == answers[1][2]


def test_two_threads_that_build_the_same_cache(settings_of, text_file, tiny_tokenizer, monkeypatch):
    """Two jobs of one process that write to one partial folder."""
    barrier = threading.Barrier(2)
    tokenise = corpus_module._tokenise

    def begin_together(*arguments):
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(2)
        return tokenise(*arguments)

    monkeypatch.setattr(corpus_module, "_tokenise", begin_together)
    settings = settings_of(text_file)
    fingerprint = fingerprint_corpus(settings.corpus)
    answers = []

    def run():
        try:
            prepared = prepare_corpus(settings, tiny_tokenizer, fingerprint)
            answers.append(rows(prepared.train))
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert [type(answer) for answer in answers] == [list, list], answers
    assert answers[0] == answers[1]


def test_ids_are_stored_without_loss(prepare, text_file, tiny_tokenizer):
    """Ids above 65535 folded into two bytes."""

    class Large(type(tiny_tokenizer)):
        def __len__(self):
            return 2**16 + 1

    prepared = prepare(text_file)
    train = rows(prepared.train)
    assert prepared.train.ids.dtype == numpy.uint16
    large = Large(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        **{k: v for k, v in tiny_tokenizer.special_tokens_map.items() if isinstance(v, str)},
    )
    shutil.rmtree(prepared.folder)
    again = prepare(text_file, tokenizer=large)
    assert again.train.ids.dtype == numpy.uint32
    assert rows(again.train) == train


def test_compressed_and_plain_lines_give_the_same_blocks(prepare, tmp_path):
    """A compressed corpus that is read to another end."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in make_documents()).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    plain, packed = prepare(tmp_path / "a.jsonl"), prepare(tmp_path / "b.jsonl.gz")
    assert rows(plain.train) == rows(packed.train)
    assert rows(plain.validation) == rows(packed.validation)
