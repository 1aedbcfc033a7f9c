"""What a teacher that is a classifier already says: of a corpus, and in its own label names."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterable
from typing import Any

import numpy
import torch
import xxhash
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minilm_exp.documents import sentences
from minilm_exp.errors import ExperimentError
from minilm_exp.provenance import fingerprint_text
from minilm_exp.task_settings import TeacherLabels
from minilm_exp.tasks.encode import encode
from minilm_exp.tasks.examples import Examples, TaskData
from minilm_exp.tasks.finetune import Finetuning, predict

_FEWEST = 8
_log = logging.getLogger(__name__)


def label_names(classifier: PreTrainedModel) -> list[str]:
    """The classes of a classifier by their number; one name for a regression.

    Raises:
        ExperimentError: It gives a text several labels at once.
    """
    config: Any = classifier.config
    if config.problem_type == "multi_label_classification":
        raise ExperimentError(
            "teacher.head=own: the teacher gives several labels to a text"
            " (problem_type=multi_label_classification), which no task here has; set"
            " teacher.head=new"
        )
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def make_teacher_labels(
    documents: Iterable[str], held_out: list[str], split: str, task: TeacherLabels
) -> TaskData:
    """Texts of the corpus without labels yet, the train part from documents that are not held out.

    Of more texts than are asked for, those with the lowest hashes are taken; of equal ones, one.

    Args:
        documents: All of the corpus.
        held_out: Those that are not trained on.
        split: document, or sentence for their sentences.
        task: How many texts.

    Raises:
        ExperimentError: There are too few.
    """
    validation = _lowest(held_out, split, task.num_validation, set())
    # A sentence of a held-out document may stand in others too.
    known = {piece for text in held_out for piece in _pieces(text, split)}
    train = _lowest(documents, split, task.num_train, known | set(held_out))
    examples = []
    for chosen in (train, validation):
        rows = {"first": chosen, "label": [0] * len(chosen)}
        examples.append(Examples(Dataset.from_dict(rows), fingerprint_text(repr(chosen))))
    if min(map(len, examples)) < _FEWEST:
        raise ExperimentError(
            f"task=teacher_labels: the corpus has {len(examples[0])} texts to train on and"
            f" {len(examples[1])} held out, fewer than {_FEWEST}: give more text, raise"
            " corpus.held_out_fraction, or set corpus.split=sentence"
        )
    return TaskData(examples[0], {"": examples[1]}, {}, 2)


def _pieces(document: str, split: str) -> list[str]:
    pieces = sentences(document) if split == "sentence" else [document]
    return [piece.strip() for piece in pieces if piece.strip()]


def _lowest(documents: Iterable[str], split: str, number: int, known: set[str]) -> list[str]:
    """So many texts with the lowest hashes, without those that are known."""
    hashes: dict[str, int] = {}
    for document in documents:
        for piece in _pieces(document, split):
            if piece not in known:
                hashes[piece] = xxhash.xxh3_64_intdigest(piece.encode())
        if len(hashes) > 2 * number:  # a corpus may be larger than memory
            hashes = dict(heapq.nsmallest(number, hashes.items(), key=lambda one: one[1]))
    return [text for text, _ in heapq.nsmallest(number, hashes.items(), key=lambda one: one[1])]


def label(
    classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, job: Finetuning
) -> TaskData:
    """The texts of the job's data, each with the class that the teacher finds likeliest.

    Raises:
        ExperimentError: The teacher has no classes, or says the same of every text.
    """
    names = label_names(classifier)
    torch.nn.Module.to(classifier, job.runtime.device)
    if len(names) < 2:
        raise ExperimentError(
            "task=teacher_labels: the teacher gives a number and no class; have it score texts of"
            " your own first, and give them as task=text_classification"
            " tasks.text_classification.kind=regression"
        )

    def labelled(examples: Examples) -> Examples:
        encoded = encode(examples, "classification", False, tokenizer, job.settings, job.cache)
        logits = predict(classifier, encoded, tokenizer, job.precision)
        classes = numpy.stack(logits).argmax(axis=1).tolist()
        rows = Dataset.from_dict({"first": examples.rows["first"][:], "label": classes})
        return Examples(rows, fingerprint_text(f"{examples.fingerprint} {classes}"))

    _log.info("teacher_labels: the teacher labels %d texts", len(job.data.train))
    train = labelled(job.data.train)
    validation = {part: labelled(examples) for part, examples in job.data.validation.items()}
    found = set(train.rows["label"][:])
    if len(found) < 2:
        raise ExperimentError(
            f"task=teacher_labels: the teacher calls every text of the corpus"
            f" {names[found.pop()]!r:.50}, from which nothing can be learnt; give text of the kind"
            " that it was made for"
        )
    return TaskData(train, validation, {}, len(names), names)


def in_names_of_teacher(name: str, data: TaskData, classifier: PreTrainedModel) -> TaskData:
    """The same examples, labelled by the teacher's numbers and names of the classes.

    So the student can take the teacher's place. Labels are matched by name, else by name without
    regard to case, else by number where they are numbers.

    Raises:
        ExperimentError: The task has a class that the teacher does not know.
    """
    names = label_names(classifier)
    if (data.num_labels == 1) != (len(names) == 1):
        raise ExperimentError(
            f"teacher.head=own: the teacher has {len(names)} outputs, task={name} needs"
            f" {data.num_labels}; set teacher.head=new"
        )
    if len(names) == 1:
        return data
    new = _numbers(data, names)
    if new is None:
        asked = data.label_names or [str(number) for number in range(data.num_labels)]
        raise ExperimentError(
            f"teacher.head=own: task={name} has the labels {', '.join(asked)}, of which not each is"
            f" one of the teacher's, {', '.join(names)}: name them alike, or set teacher.head=new"
        )

    def renamed(examples: Examples) -> Examples:
        rows = examples.rows.map(lambda row: {"label": new[row["label"]]})
        return Examples(rows, f"{examples.fingerprint} {new}")

    return TaskData(
        renamed(data.train),
        {part: renamed(examples) for part, examples in data.validation.items()},
        {part: renamed(examples) for part, examples in data.test.items()},
        len(names),
        names,
    )


def _numbers(data: TaskData, names: list[str]) -> list[int] | None:
    """The teacher's number of each label of a task; None where one has none, or two have one."""
    if data.label_names is None:
        return list(range(data.num_labels)) if data.num_labels <= len(names) else None
    numbered = [str(number) for number in range(len(names))]
    for fold, known in ((str, names), (str.casefold, names), (str, numbered)):
        numbers = {fold(name): number for number, name in enumerate(known)}
        asked = [fold(name) for name in data.label_names]
        is_unique = len(numbers) == len(known) and len(set(asked)) == len(asked)
        if is_unique and set(asked) <= numbers.keys():
            return [numbers[name] for name in asked]
    return None
