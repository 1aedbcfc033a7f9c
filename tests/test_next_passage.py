"""The task that is made from the corpus: pairs that are what their labels say."""

import random
import re

import pytest

from minilm_exp.errors import ExperimentError
from minilm_exp.task_settings import NextPassage
from minilm_exp.tasks.next_passage import make_next_passage


def make_task(**changes):
    values = {"version": 1, "num_train": 60, "num_validation": 30, "passage_characters": 30}
    return NextPassage(**{**values, **changes})


def make_documents(number=30, shortest=5, longest=12):
    """Documents whose passages are one numbered sentence each."""
    draw = random.Random(3)
    return [
        "\n".join(
            f"In document {d} this is passage {p}." for p in range(draw.randint(shortest, longest))
        )
        for d in range(number)
    ]


def place(passage):
    """Document and position of a passage."""
    document, position = re.findall(r"\d+", passage)
    return int(document), int(position)


PARTS = ("train", "validation")


def rows(data, part):
    """First and second text and label of each pair; the only validation part has no name."""
    examples = {"train": data.train, "validation": data.validation[""]}[part]
    assert examples.rows.column_names == ["first", "second", "label"]
    return [(row["first"], row["second"], row["label"]) for row in examples.rows]


def content(data):
    assert list(data.validation) == [""]
    assert data.test == {}
    return {part: rows(data, part) for part in PARTS}


def test_sizes_and_balance():
    """A task where always giving one answer is right more often than not."""
    data = make_next_passage(make_documents(), make_task())
    assert (len(data.train), len(data.validation[""])) == (60, 30)
    assert (data.num_labels, data.label_names) == (2, None)
    for part in PARTS:
        labels = [label for _, _, label in rows(data, part)]
        assert labels.count(1) == labels.count(0) == len(labels) / 2


def test_labels_are_true():
    """Positives that do not follow, negatives that do, or a passage paired with itself."""
    data = make_next_passage(make_documents(), make_task())
    same_document = dict.fromkeys(PARTS, 0)
    for part in PARTS:
        for first, second, label in rows(data, part):
            (d, p), (e, q) = place(first), place(second)
            assert ((e, q) == (d, p + 1)) == bool(label)
            assert (e, q) != (d, p)
            same_document[part] += not label and d == e
    # Half of the negatives, so that the topic alone does not tell.
    assert same_document == {"train": 15, "validation": 8}


def test_no_document_is_in_both_parts():
    """Validation passages that were trained on."""
    data = make_next_passage(make_documents(), make_task())
    documents = {
        part: {place(text)[0] for first, second, _ in rows(data, part) for text in (first, second)}
        for part in PARTS
    }
    assert documents["train"] and documents["validation"]
    assert not documents["train"] & documents["validation"]


def test_each_passage_opens_one_pair_at_most():
    """The same first passage with both labels, to be learnt by heart."""
    data = make_next_passage(make_documents(), make_task(num_train=1000, num_validation=500))
    firsts = [first for part in PARTS for first, _, _ in rows(data, part)]
    assert len(set(firsts)) == len(firsts) > 100


def test_pairs_do_not_depend_on_order_or_global_state():
    """Scores of two runs that were taken on different pairs."""
    documents = make_documents()
    data = make_next_passage(documents, make_task())
    random.seed(99)
    for again in (documents, documents[::-1]):
        same = make_next_passage(again, make_task())
        assert content(same) == content(data)
        assert same.fingerprint == data.fingerprint
    assert content(make_next_passage(documents, make_task(version=2))) != content(data)


def test_other_pairs_have_another_fingerprint():
    """Encoded pairs and stored scores of one corpus that are taken for those of another."""
    tasks = (make_task(), make_task(version=2), make_task(num_train=50, num_validation=25))
    found = {}
    for number in (30, 31, 45):
        for task in tasks:
            data = make_next_passage(make_documents(number), task)
            for examples, part in ((data.train, "train"), (data.validation[""], "validation")):
                found.setdefault(examples.fingerprint, set()).add(tuple(rows(data, part)))
    assert len(found) > 12
    assert {len(pairs) for pairs in found.values()} == {1}
    assert len(set.union(*found.values())) == len(found)


def test_copies_of_a_document_count_once():
    """One article that is in both parts, because the corpus holds it twice."""
    documents = make_documents()
    data = make_next_passage(documents, make_task())
    assert content(make_next_passage(documents * 2, make_task())) == content(data)


def test_repeated_passages_do_not_contradict():
    """A recurring line drawn as a negative although it is what follows: noise in the labels."""
    chorus = "And this line is sung again and again."
    documents = [
        "\n".join(f"Song {d} has verse number {v} here.\n{chorus}" for v in range(6))
        for d in range(20)
    ]
    data = make_next_passage(documents, make_task())
    for part in PARTS:
        labels = {}
        for first, second, label in rows(data, part):
            labels.setdefault((first, second), set()).add(label)
            if "Song" in first:  # a verse, which the chorus follows each time
                assert (second == chorus) == bool(label), (first, second)
        assert all(len(found) == 1 for found in labels.values())


def test_passages_are_whole_sentences_of_the_asked_length():
    """Passages that end anywhere, so that the seam gives the answer away."""
    documents = ["\n".join(f"A b{d} c{s}. And d{s}!" for s in range(60)) for d in range(20)]
    data = make_next_passage(documents, make_task())
    for part in PARTS:
        for *texts, _ in rows(data, part):
            for text in texts:
                assert text.endswith((".", "!"))
                assert 30 <= len(text.replace(" ", "")) + text.count(" ") < 30 + 2 * 12


@pytest.mark.parametrize(
    "documents",
    [
        [],
        ["Too short."],
        ["One. Two. Three."] * 50,
        make_documents(1, 100, 100),
        make_documents(2, 4, 5),
        make_documents(100, 3, 3),
    ],
    ids=["none", "short", "copies", "one", "two", "few passages"],
)
def test_too_few_documents_are_refused(documents):
    """A score on a handful of pairs, or a failing draw from an empty list."""
    with pytest.raises(ExperimentError) as caught:
        make_next_passage(documents, make_task())
    for setting in ("task=none", "corpus.held_out_fraction", "passage_characters"):
        assert setting in str(caught.value)


def test_two_long_documents_are_enough():
    """A negative from another document where a part has only one."""
    data = make_next_passage(make_documents(2, 60, 60), make_task())
    for part in PARTS:
        for first, second, _ in rows(data, part):
            assert place(first)[0] == place(second)[0]
