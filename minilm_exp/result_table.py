"""The models of a run as rows of a table: what the terminal and the report say of them."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from minilm_exp.result import Result
from minilm_exp.settings import Settings

ROLES = {"student": "student", "undistilled": "not distilled", "teacher": "teacher"}


def model_rows(settings: Settings, result: Result) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for the teacher, the student, the same not distilled, and a baseline."""
    tasks = scored_tasks(result)
    has_loss = result.validation_loss is not None
    headings = ["model", "layers x hidden", "params (no emb.)", "speedup"]
    headings += ["validation loss"] if has_loss else []
    headings += [*tasks, *(["mean"] if len(tasks) > 1 else [])]
    rows = []
    for role in ("teacher", "student", "undistilled"):
        scores = result.scores_of(role)
        if not scores and (role == "undistilled" or role not in result.parameters):
            continue
        rows.append(
            [
                _label(settings, role),
                _shape(settings, role),
                _size(result.parameters.get("teacher" if role == "teacher" else "student")),
                _speedup(settings, result, role),
                *([_loss(result) if role == "student" else "-"] * has_loss),
                *(_score(settings, result, role, task) for task in tasks),
                *(
                    [f"{statistics.fmean(scores.values()):.3f}" if scores else "-"]
                    * (len(tasks) > 1)
                ),
            ]
        )
    if "baseline" in result.parameters:
        baseline = settings.baseline
        row = [
            f"baseline {baseline.name}",
            f"{baseline.num_layers} x {baseline.hidden_size}",
            _size(result.parameters["baseline"]),
            "x1.0",
        ]
        rows.append(row + [""] * (len(headings) - len(row)))
    return headings, rows


def search_rows(metric: str, cells: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and the cells of a search for fine-tuning settings, the best first."""
    rows = []
    for cell in sorted(cells, key=lambda cell: -cell["mean"].get(metric, -math.inf)):
        spread = cell["spread"].get(metric)
        value = cell["error"] or f"{cell['mean'][metric]:.4f}" + (
            "" if spread is None else f" ± {spread:.4f}"
        )
        rows.append([*(f"{setting:g}" for setting in cell["settings"].values()), value])
    return [*cells[0]["settings"], metric], rows


def scored_tasks(result: Result) -> list[str]:
    """Tasks on which a model was scored."""
    return list(dict.fromkeys(task for role in ROLES for task in result.scores_of(role)))


def _label(settings: Settings, role: str) -> str:
    if role == "teacher":
        return f"teacher  {settings.teacher.name}"
    if settings.recipe.name == "finetune":
        return f"student  {Path(settings.student.path or '').name}"
    return "student  distilled" if role == "student" else "student  same, not distilled"


def _shape(settings: Settings, role: str) -> str:
    model = settings.teacher if role == "teacher" else settings.chain[-1].settings.student
    return f"{model.num_layers} x {model.hidden_size}"


def _speedup(settings: Settings, result: Result, role: str) -> str:
    """Over the baseline; measured for the student, or for the teacher where it is alone."""
    if result.speedup is None:
        return "-"
    if role != "teacher" or "student" not in result.parameters:
        return f"x{result.speedup:.1f}"
    return "x1.0" if settings.baseline.name == "teacher" else "-"


def _loss(result: Result) -> str:
    loss = result.validation_loss
    return "-" if loss is None else f"{loss:.4f}"


def _score(settings: Settings, result: Result, role: str, task: str) -> str:
    scores = result.scores_of(role)
    if task not in scores:
        return "-"
    spread = result.spreads.get(role, {}).get(task, {}).get(settings.tasks[task].score)
    return f"{scores[task]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _mean(scores: dict[str, float]) -> str:
    return f"{statistics.fmean(scores.values()):.3f}" if scores else "-"


def _size(parameters: dict[str, int] | None) -> str:
    if parameters is None:
        return "-"
    return f"{parameters['total'] / 1e6:.1f}M ({parameters['transformer'] / 1e6:.1f}M)"
