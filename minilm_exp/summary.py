"""The closing table of a run."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minilm_exp.model_card import export_rows
from minilm_exp.result import Result
from minilm_exp.settings import Settings


def print_summary(settings: Settings, result: Result) -> None:
    """The models of this run as measured, and every cell of a search."""
    tasks = list(dict.fromkeys(task for role in _ROLES for task in result.scores_of(role)))
    console = Console(width=max(Console().width, 95 + 16 * len(tasks)), markup=False)
    distilled = settings.recipe.name != "finetune"
    has_loss = result.validation_loss is not None
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model")
    headings = ["layers x hidden", "params (no emb.)", "speedup"]
    headings += ["validation loss"] if has_loss else []
    for heading in (*headings, *tasks, *(["mean"] if len(tasks) > 1 else [])):
        table.add_column(heading, justify="right")
    for role in ("teacher", "student", "undistilled"):
        scores = result.scores_of(role)
        if not scores and (role == "undistilled" or role not in result.parameters):
            continue
        table.add_row(
            _label(settings, role, distilled),
            _shape(settings, role),
            _size(result.parameters.get("teacher" if role == "teacher" else "student")),
            _speedup(settings, result, role),
            *([_loss(result) if role == "student" else "-"] * has_loss),
            *(_score(settings, result, role, task) for task in tasks),
            *([f"{statistics.fmean(scores.values()):.3f}" if scores else "-"] * (len(tasks) > 1)),
        )
    if "baseline" in result.parameters:
        baseline = settings.baseline
        table.add_row(
            f"baseline {baseline.name}",
            f"{baseline.num_layers} x {baseline.hidden_size}",
            _size(result.parameters["baseline"]),
            "x1.0",
        )
    console.print()
    console.print(table)
    for role, grids in result.grids.items():
        for task, cells in grids.items():
            console.print(f"\nsearch: {role} on {task}")
            console.print(_grid(settings.tasks[task].selected_by, cells))
    for name, measured in result.exports.items():
        _print_exports(name, measured)
    if any(result.spreads.values()):
        console.print(f"mean ± standard deviation over {result.num_seeds} fine-tuning seeds")
    if not result.meaningful:
        console.print("not meaningful: the teacher had random weights (teacher.weights=random)")
    console.print(f"\nrun folder  {result.folder}", soft_wrap=True)
    console.print(f"MLflow run  {result.run_id}", soft_wrap=True)
    if settings.tracking.uri.startswith("sqlite:"):
        console.print(
            f"compare     mlflow ui --host 127.0.0.1 --backend-store-uri {settings.tracking.uri}",
            soft_wrap=True,
        )


def _print_exports(name: str, measured: dict[str, Any]) -> None:
    header, *rows = export_rows(measured)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(header[0])
    for heading in header[1:]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=max(Console().width, 120 + 16 * len(header)), markup=False)
    console.print(f"\nexports: {name}, on a CPU with {measured['threads']} threads")
    console.print(table)


def _label(settings: Settings, role: str, distilled: bool) -> str:
    if role == "teacher":
        return f"teacher  {settings.teacher.name}"
    if not distilled:
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


def _grid(metric: str, cells: list[dict[str, Any]]) -> Table:
    """Cells of a search, the best first."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in (*cells[0]["settings"], metric):
        table.add_column(name, justify="right")
    for cell in sorted(cells, key=lambda cell: -cell["mean"].get(metric, -math.inf)):
        spread = cell["spread"].get(metric)
        value = cell["error"] or f"{cell['mean'][metric]:.4f}" + (
            "" if spread is None else f" ± {spread:.4f}"
        )
        table.add_row(*(f"{setting:g}" for setting in cell["settings"].values()), value)
    return table


def print_comparison(outcomes: list[tuple[list[str], Result]]) -> None:
    """The runs of a multirun, those that differ by their seed alone in one row.

    Args:
        outcomes: Finished runs, each with the settings that were asked for on the command line.
    """
    common = set.intersection(*(set(overrides) for overrides, _ in outcomes))
    groups: dict[str, list[Result]] = {}
    for overrides, result in outcomes:
        differing = [o for o in overrides if o not in common and not o.startswith("seed=")]
        groups.setdefault(" ".join(differing), []).append(result)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run")
    columns = [
        (task, role)
        for task in dict.fromkeys(
            task for _, result in outcomes for role in _ROLES for task in result.scores_of(role)
        )
        for role in _ROLES
        if any(task in result.scores_of(role) for _, result in outcomes)
    ]
    for heading in ("seeds", "validation loss", *(f"{t} {_ROLES[role]}" for t, role in columns)):
        table.add_column(heading, justify="right")
    for label, results in groups.items():
        cells = [_mean([result.validation_loss for result in results], 4)]
        for task, role in columns:
            cells.append(_mean([result.scores_of(role).get(task) for result in results], 3))
        table.add_row(label or "default", str(len(results)), *cells)
    console = Console(width=max(Console().width, 140), markup=False)
    console.print("\nmean ± standard deviation over seeds")
    console.print(table)
    if len(groups) > 1:
        console.print("validation losses compare between runs of one objective only")


_ROLES = {"student": "student", "undistilled": "not distilled", "teacher": "teacher"}


def _mean(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "-"
    mean = f"{statistics.mean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


def _size(parameters: dict[str, int] | None) -> str:
    if parameters is None:
        return "-"
    return f"{parameters['total'] / 1e6:.1f}M ({parameters['transformer'] / 1e6:.1f}M)"
