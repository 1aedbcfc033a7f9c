"""Where the fine-tuned teacher and student differ, by what a run keeps of their predictions.

Validation examples only: what a test split holds is for its score alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm_exp.downstream import predictions_folder
from minilm_exp.errors import ExperimentError
from minilm_exp.result import Result
from minilm_exp.settings import Settings

NUM_EXAMPLES = 10
_BOTH_RIGHT = "both right"
_TEACHER_RIGHT = "only the teacher right"
_STUDENT_RIGHT = "only the student right"
_OTHER_WRONG = "both wrong, with different answers"
_SAME_WRONG = "both wrong, with the same answer"


@dataclass(frozen=True)
class Example:
    """One on which the models differ.

    Attributes:
        texts: What they read.
        facts: By name: the label where there is one, and what each model said.
    """

    texts: list[str]
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Disagreement:
    """Of one part of one task.

    Attributes:
        task: Its name.
        part: Of its validation split; "" for the only one.
        seed: Of the two fine-tunings that are compared.
        counts: How many examples there are of each kind.
        examples: Some on which they differ.
    """

    task: str
    part: str
    seed: int
    counts: dict[str, int]
    examples: list[Example]


def disagreements(settings: Settings, result: Result, task: str) -> list[Disagreement]:
    """Of every validation part of a task.

    Raises:
        ExperimentError: There are not predictions of both models, or not of the same examples.
    """
    for role in ("teacher", "student"):
        if task not in result.scores_of(role):
            raise ExperimentError(f"the {role} was not scored on it")
    kind = settings.tasks[task].kind
    seed = settings.task_training.seeds(settings.seed)[0]
    folders = {
        role: predictions_folder(
            Path(result.folder), task, role, _best_settings(settings, result, task, role), seed
        )
        for role in ("teacher", "student")
    }
    ending = ".json" if kind == "spans" else ".jsonl"
    files = [
        file
        for file in sorted(folders["student"].glob(f"*{ending}"))
        if not file.stem.endswith("_null_scores") and not f"{file.stem}_".startswith("test_")
    ]
    if not files:
        raise ExperimentError("its predictions are no longer in the run folder")
    found = []
    for file in files:
        part = "" if file.stem == "validation" else file.stem
        other = folders["teacher"] / file.name
        if kind == "spans":
            counts, examples = _answers(_read_answers(other), _read_answers(file))
        else:
            rows = _pairs(other, file)
            if kind == "classification":
                counts, examples = _classes(rows)
            elif kind == "generation":
                counts, examples = _outputs(rows)
            else:
                counts, examples = _numbers(rows)
        found.append(Disagreement(task, part, seed, counts, examples))
    return found


def _best_settings(settings: Settings, result: Result, task: str, role: str) -> dict[str, Any]:
    """What tells the best cell of a search from the others."""
    cells = result.grids.get(role, {}).get(task, [])
    metric = settings.tasks[task].selected_by
    known = [cell for cell in cells if metric in cell["mean"]]
    return max(known, key=lambda cell: cell["mean"][metric])["settings"] if known else {}


def _pairs(teacher: Path, student: Path) -> Iterator[tuple[dict[str, Any], Any, Any]]:
    """Each example with what the two said."""
    for other, own in itertools.zip_longest(_read_lines(teacher), _read_lines(student)):
        said = [line.pop("prediction") for line in (other, own) if line is not None]
        if other != own:
            raise ExperimentError("teacher and student were scored on different examples")
        yield own, said[0], said[1]


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{file.parent.name}/{file.name} cannot be read") from error


def _read_answers(file: Path) -> dict[str, str]:
    try:
        answers: dict[str, str] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{file.parent.name}/{file.name} cannot be read") from error
    return answers


def _classes(
    rows: Iterator[tuple[dict[str, Any], Any, Any]],
) -> tuple[dict[str, int], list[Example]]:
    """Examples of the three ways to differ in turn."""
    counts = dict.fromkeys(
        (_BOTH_RIGHT, _TEACHER_RIGHT, _STUDENT_RIGHT, _OTHER_WRONG, _SAME_WRONG), 0
    )
    kept: dict[str, list[Example]] = {
        kind: [] for kind in (_TEACHER_RIGHT, _STUDENT_RIGHT, _OTHER_WRONG)
    }
    for row, teacher, student in rows:
        if teacher == student:
            kind = _BOTH_RIGHT if teacher == row["label"] else _SAME_WRONG
        elif row["label"] in (teacher, student):
            kind = _TEACHER_RIGHT if teacher == row["label"] else _STUDENT_RIGHT
        else:
            kind = _OTHER_WRONG
        counts[kind] += 1
        if kind in kept and len(kept[kind]) < NUM_EXAMPLES:
            facts = [("label", row["label"]), ("teacher", teacher), ("student", student)]
            kept[kind].append(_example(row, facts))
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kept.values()))
    return counts, [example for example in turns if example is not None][:NUM_EXAMPLES]


def _numbers(
    rows: Iterator[tuple[dict[str, Any], Any, Any]],
) -> tuple[dict[str, int], list[Example]]:
    """Those with the largest difference."""
    known = list(rows)
    ordered = sorted(known, key=lambda one: -abs(one[1] - one[2]))[:NUM_EXAMPLES]
    return {"examples": len(known)}, [
        _example(row, [("label", row["label"]), ("teacher", teacher), ("student", student)])
        for row, teacher, student in ordered
        if teacher != student
    ]


def _outputs(
    rows: Iterator[tuple[dict[str, Any], Any, Any]],
) -> tuple[dict[str, int], list[Example]]:
    counts = {"the same text": 0, "different texts": 0}
    examples: list[Example] = []
    for row, teacher, student in rows:
        counts["the same text" if teacher == student else "different texts"] += 1
        if teacher != student and len(examples) < NUM_EXAMPLES:
            facts = [("target", row["target"]), ("teacher", teacher), ("student", student)]
            examples.append(_example({"first": row["source"]}, facts))
    return counts, examples


def _answers(
    teacher: dict[str, str], student: dict[str, str]
) -> tuple[dict[str, int], list[Example]]:
    """By the id of the question, which is all that predictions of spans have of it."""
    if teacher.keys() != student.keys():
        raise ExperimentError("teacher and student were scored on different examples")
    differing = [name for name, answer in student.items() if teacher[name] != answer]
    counts = {
        "the same answer": len(student) - len(differing),
        "different answers": len(differing),
    }
    return counts, [
        Example(
            [f"question {name}"],
            [
                ("teacher", teacher[name] or "(no answer)"),
                ("student", student[name] or "(no answer)"),
            ],
        )
        for name in differing[:NUM_EXAMPLES]
    ]


def _example(row: dict[str, Any], facts: list[tuple[str, Any]]) -> Example:
    texts = [str(row[name]) for name in ("first", "second") if row.get(name) is not None]
    return Example(
        texts,
        [(name, f"{v:.3f}" if isinstance(v, float) else str(v)) for name, v in facts],
    )
