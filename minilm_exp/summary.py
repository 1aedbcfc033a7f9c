"""The closing table of a run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table

from minilm_exp.model_card import export_rows
from minilm_exp.report_page import REPORT
from minilm_exp.result import Result
from minilm_exp.result_table import ROLES, model_rows, scored_tasks, search_rows
from minilm_exp.settings import Settings


def print_summary(settings: Settings, result: Result) -> None:
    """The models of this run as measured, and every cell of a search."""
    console = Console(width=max(Console().width, 95 + 16 * len(scored_tasks(result))), markup=False)
    console.print()
    console.print(_table(*model_rows(settings, result)))
    for role, grids in result.grids.items():
        for task, cells in grids.items():
            console.print(f"\nsearch: {role} on {task}")
            headings, rows = search_rows(settings.tasks[task].selected_by, cells)
            console.print(_table(headings, rows, first="right"))
    for name, measured in result.exports.items():
        _print_exports(name, measured)
    if any(result.spreads.values()):
        console.print(f"mean ± standard deviation over {result.num_seeds} fine-tuning seeds")
    if not result.meaningful:
        console.print("not meaningful: the teacher had random weights (teacher.weights=random)")
    console.print(f"\nrun folder  {result.folder}", soft_wrap=True)
    report = Path(result.folder) / REPORT
    if report.is_file():
        console.print(f"report      {report}", soft_wrap=True)
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


def _table(headings: list[str], rows: list[list[str]], first: JustifyMethod = "left") -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else first)
    for row in rows:
        table.add_row(*row)
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
            task for _, result in outcomes for role in ROLES for task in result.scores_of(role)
        )
        for role in ROLES
        if any(task in result.scores_of(role) for _, result in outcomes)
    ]
    for heading in ("seeds", "validation loss", *(f"{t} {ROLES[role]}" for t, role in columns)):
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


def _mean(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "-"
    mean = f"{statistics.mean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean
