"""What a run found, as it stands in result.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minilm_exp.redaction import redact_all


@dataclass
class Result:
    """Measured values of one run; what was not computed is absent, never zero.

    Attributes:
        scores: Of the student, the value that stands for each task; `undistilled_scores` and
            `teacher_scores` likewise.
        metrics: Every metric by model and task, the mean over fine-tuning seeds.
        spreads: Their standard deviations, where there are several seeds.
        num_seeds: Fine-tunings of each model on each task.
        made_by: Commit, whether the tree was changed, results version, precision, hardware.
        replaces: Finished runs of the same key, by MLflow id, which this one stands for once it is
            finished.
        stages: Of a recipe with several stages, the validation losses of each.
        untrained: Parameters of the student that no stage reached.
        exports: By exported model (student, or the task that it was fine-tuned on): threads; of
            teacher, student and each export a `Measured`; fingerprints of the exports' files.
        pushed_to: Repository of the hub that has the student as it is now.
        student_fingerprint: Of the saved student's files, which tells when they are damaged.
        grids: By model and task every cell of a search, not only the best.
        candidates: Shapes that a budget chose from, each with what is known of it.
        asked: `overrides`, what was typed on the command line, and `groups`, the options chosen.
    """

    run_id: str
    run_key: str
    status: str
    folder: str
    meaningful: bool
    scores: dict[str, float] = field(default_factory=dict)
    undistilled_scores: dict[str, float] = field(default_factory=dict)
    teacher_scores: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    spreads: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    grids: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    num_seeds: int | None = None
    validation_loss: float | None = None
    validation_losses: dict[str, float] = field(default_factory=dict)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    baseline: str | None = None
    speedup: float | None = None
    parameters: dict[str, dict[str, int]] = field(default_factory=dict)
    elapsed_seconds: float | None = None
    made_by: dict[str, str] = field(default_factory=dict)
    replaces: list[str] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)
    pushed_to: str | None = None
    student_fingerprint: str | None = None
    error: str | None = None

    def scores_of(self, role: str) -> dict[str, float]:
        """The scores of a model by task: student, undistilled or teacher."""
        return {
            "student": self.scores,
            "undistilled": self.undistilled_scores,
            "teacher": self.teacher_scores,
        }[role]

    @property
    def score(self) -> float | None:
        """What a sweep maximises: the mean score, or minus the validation loss without tasks.

        Of the student; of the teacher where there is no student.
        """
        is_of_teacher = self.validation_loss is None and not self.scores
        scores = self.teacher_scores if is_of_teacher else self.scores
        if scores:
            return sum(scores.values()) / len(scores)
        if self.validation_loss is not None:
            return -self.validation_loss
        return None

    def trial_value(self, name: str) -> float | None:
        """What a search optimises: score, speedup, or parameters of the student's blocks."""
        if name == "parameters":
            return self.parameters["student"]["transformer"]
        return self.speedup if name == "speedup" else self.score

    def write(self) -> None:
        """Writes result.json into the run folder, whole or not at all."""
        content = redact_all(asdict(self)) | {"folder": self.folder}
        write_json(Path(self.folder) / "result.json", content, indent=1)


# Of fields in results that earlier versions wrote.
_OLD_NAMES = {
    "validation_relation_loss": "validation_loss",
    "validation_relation_losses": "validation_losses",
}


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Writes a file, whole or not at all."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    partial.write_text(f"{text}\n", encoding="utf-8")
    partial.replace(path)


def read_result(folder: Path) -> Result | None:
    """The result in a run folder, or None where there is no readable one.

    Its folder is the present one, also where the run was moved.
    """
    try:
        stored = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        for old, new in _OLD_NAMES.items():
            if old in stored:
                stored[new] = stored.pop(old)
        return Result(**(stored | {"folder": str(folder)}))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def read_results(folders: Iterable[Path]) -> list[Result]:
    """Those that can be read."""
    results = [read_result(folder) for folder in folders]
    return [result for result in results if result is not None]


def standing(results: Iterable[Result], key: str) -> list[Result]:
    """The finished runs of a key that no other replaces; several only where runs were copied."""
    finished = [r for r in results if r.run_key == key and r.status == "FINISHED"]
    replaced = {run_id for result in finished for run_id in result.replaces}
    return [result for result in finished if result.run_id not in replaced]
