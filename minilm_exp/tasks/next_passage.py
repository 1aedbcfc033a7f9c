"""A task made from the corpus itself: does the second passage follow the first?"""

from __future__ import annotations

import itertools
import random

import xxhash
from datasets import Dataset

from minilm_exp.documents import sentences
from minilm_exp.errors import ExperimentError
from minilm_exp.provenance import fingerprint_text
from minilm_exp.task_settings import NextPassage
from minilm_exp.tasks.examples import Examples, TaskData

_FEWEST = 8


def make_next_passage(documents: list[str], task: NextPassage) -> TaskData:
    """Pairs of passages, half of them consecutive in a document (label 1).

    A passage is a run of whole sentences. Of the pairs with label 0, every other one takes its
    second passage from elsewhere in the same document, so that topic alone does not give the
    answer; the rest take it from another document of the same split. Documents are divided into
    training and validation by a hash of their text, and each passage opens one pair at most. The
    pairs are the same for every seed of a run.

    Raises:
        ExperimentError: The held-out documents are too few or too short.
    """
    passages = [_passages(document, task.passage_characters) for document in documents]
    by_hash = sorted(
        (xxhash.xxh3_64_intdigest("\n".join(group).encode()), group)
        for group in passages
        if len(group) >= 4
    )
    groups = [group for _, group in by_hash]
    # Equal documents have equal hashes; one copy is enough.
    groups = [group for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    total = sum(map(len, groups))
    share = task.num_validation / (task.num_validation + task.num_train)
    validation: list[list[str]] = []
    while len(groups) > len(validation) + 1 and sum(map(len, validation)) < share * total:
        validation.append(groups[len(validation)])
    train = groups[len(validation) :]
    data = [
        _pairs(part, number, f"{name} {task.version}")
        for part, number, name in (
            (train, task.num_train, "train"),
            (validation, task.num_validation, "validation"),
        )
    ]
    if min(map(len, data)) < _FEWEST:
        raise ExperimentError(
            f"task=next_passage needs held-out documents with several passages of"
            f" {task.passage_characters} characters, some to train on and others to score on; the"
            f" {len(documents)} held-out documents give {len(data[0])} and {len(data[1])} pairs:"
            " set task=none, raise corpus.held_out_fraction, give more text, or lower"
            " tasks.next_passage.passage_characters"
        )
    examples = [
        Examples(
            Dataset.from_dict(dict(zip(("first", "second", "label"), zip(*pairs)))),
            fingerprint_text(repr(pairs)),
        )
        for pairs in data
    ]
    return TaskData(examples[0], {"": examples[1]}, {}, task.num_labels)


def _passages(document: str, num_characters: int) -> list[str]:
    passages: list[str] = []
    current: list[str] = []
    for sentence in sentences(document):
        current.append(sentence)
        if sum(map(len, current)) >= num_characters:
            passages.append(" ".join(current))
            current = []
    return passages


def _pairs(groups: list[list[str]], number: int, seed: str) -> list[tuple[str, str, int]]:
    draw = random.Random(f"next_passage {seed}")
    firsts = [(g, i) for g, group in enumerate(groups) for i in range(len(group) - 1)]
    draw.shuffle(firsts)
    followers: dict[str, set[str]] = {}
    for group in groups:
        for first, second in itertools.pairwise(group):
            followers.setdefault(first, set()).add(second)
    pairs = []
    for count, (g, i) in enumerate(firsts[:number]):
        first, is_next = groups[g][i], count % 2 == 0
        if is_next:
            second = groups[g][i + 1]
        else:
            same_document = count % 4 == 1 or len(groups) == 1
            chosen = groups[g] if same_document else groups[_other(draw, len(groups), g)]
            # A passage may occur twice; what follows one of its copies is no wrong answer.
            elsewhere = [text for text in chosen if text not in followers[first] | {first}]
            if not elsewhere:
                continue
            second = draw.choice(elsewhere)
        pairs.append((first, second, int(is_next)))
    return pairs


def _other(draw: random.Random, number: int, this: int) -> int:
    other = draw.randrange(number - 1)
    return other + (other >= this)
