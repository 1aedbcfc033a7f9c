"""Figures of sweeps: python -m minilm_exp.figures teacher_layer.

Written as PNG and SVG to outputs/figures, and as artifacts of the sweep's MLflow run. Marks and
lines differ, so that they can be told apart in grey.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minilm_exp.errors import ExperimentError
from minilm_exp.plots import LINES
from minilm_exp.table_data import Row, TableData
from minilm_exp.tables import command_line, log_files
from minilm_exp.tracking import open_tracker

_MARKS = "osD^vPX*"
_GREYS = ("black", "0.35", "0.55")


def draw(data: TableData, uri: str | None = None) -> Figure:
    """The figure that the sweep's spec names.

    Args:
        data: The sweep.
        uri: Of MLflow, which has the losses.

    Raises:
        ExperimentError: The spec names none, or one that there is not.
    """
    given = data.spec.figure
    kinds: dict[str, Callable[[Axes, TableData], None]] = {
        "line": _line,
        "pareto": _pareto,
        "loss": functools.partial(_loss, uri),
    }
    if given is None or given.kind not in kinds:
        raise ExperimentError(
            f"the table of {data.record.sweep} names no figure of {', '.join(kinds)}"
        )
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    kinds[given.kind](axes, data)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    title = data.spec.title
    if any(not result.meaningful for result in data.results):
        title += "\nNOT MEANINGFUL: random teacher"
    if data.problems:
        title += f"\nmixed or incomplete: {len(data.problems)} problems"
    axes.set_title(title, fontsize="medium")
    return figure


def _line(axes: Axes, data: TableData) -> None:
    """Scores against a setting, ours and the paper's, each less that of the first row."""
    assert data.spec.figure is not None
    axis = data.spec.figure.axis
    rows = sorted(
        (row for row in data.rows if axis in row.values and row.results),
        key=lambda row: float(row.values[axis]),
    )
    reference = data.rows[0]
    places = [float(row.values[axis]) for row in rows]
    for number, (name, column) in enumerate(data.columns.items()):
        first = reference.measured(name)
        ours = [(x, row.measured(name)) for x, row in zip(places, rows)]
        known = [(x, measured) for x, measured in ours if measured is not None]
        if first is None or not known:
            continue
        axes.errorbar(
            [x for x, _ in known],
            [100 * (measured.mean - first.mean) for _, measured in known],
            yerr=[100 * (measured.spread or 0) for _, measured in known],
            label=f"{column.label} ({100 * first.mean:.1f} at {reference.label})",
            capsize=3,
            **_style(number),
        )
    _paper_lines(axes, data, rows, places)
    if max(places, default=0) >= 8 * max(1.0, min(places, default=1)):
        axes.set_xscale("log", base=2)
    axes.set_xticks(places, [row.values[axis] for row in rows])
    axes.set_xlabel(data.spec.figure.label or axis)
    axes.set_ylabel(f"score x 100, less that of {reference.label}")


def _paper_lines(axes: Axes, data: TableData, rows: list[Row], places: list[float]) -> None:
    """The paper's scores, also of tasks that were not run here."""
    number = len(data.columns)
    for column in {**data.spec.columns, **data.columns}.values():
        first, table = data.spec.paper_value(data.rows[0].parts, column)
        points = [
            (x, value)
            for x, row in zip(places, rows)
            if isinstance(value := data.spec.paper_value(row.parts, column)[0], (int, float))
        ]
        if not isinstance(first, (int, float)) or len(points) < 2:
            continue
        axes.plot(
            [x for x, _ in points],
            [value - first for _, value in points],
            label=f"{table}: {column.label} ({first})",
            fillstyle="none",
            **(_style(number) | {"color": "0.6"}),
        )
        number += 1


def _pareto(axes: Axes, data: TableData) -> None:
    """Mean score against speedup, and the line of what nothing beats in both."""
    column = "mean" if "mean" in data.columns else next(iter(data.columns))
    points = []
    for number, row in enumerate(row for row in data.rows if row.results):
        score, speed = row.measured(column), row.measured("speedup")
        if score is None or speed is None:
            continue
        points.append((speed.mean, 100 * score.mean))
        axes.errorbar(
            speed.mean,
            100 * score.mean,
            yerr=100 * (score.spread or 0),
            label=row.label,
            capsize=3,
            linestyle="none",
            marker=_MARKS[number % len(_MARKS)],
            color=_GREYS[number // len(_MARKS) % len(_GREYS)],
        )
    front = pareto_front(points)
    axes.plot(
        [x for x, _ in front], [y for _, y in front], color="0.6", linewidth=1, label="Pareto front"
    )
    axes.set_xlabel("speedup over the baseline")
    axes.set_ylabel(f"{data.columns[column].label}, score x 100")


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is at least as good as in both values and better in one."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def _loss(uri: str | None, axes: Axes, data: TableData) -> None:
    """Training loss of the first seed of each row."""
    for number, row in enumerate(row for row in data.rows if row.results):
        result = row.results[min(row.results, key=int)]
        points = open_tracker(uri, result.run_id).history("distill/loss/total")
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            label=row.label,
            **(_style(number) | {"marker": None}),
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss of all its terms (not comparable between rows)")
    axes.set_ylim(bottom=0)


def _style(number: int) -> dict[str, Any]:
    return {
        "marker": _MARKS[number % len(_MARKS)],
        "linestyle": LINES[number % len(LINES)],
        "color": _GREYS[number // len(LINES) % len(_GREYS)],
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    given, data = command_line("minilm_exp.figures", __doc__, arguments)
    uri = given.tracking_uri or data.record.uri
    try:
        figure = draw(data, uri)
    except ExperimentError as error:
        sys.exit(f"error: {error}")
    folder = Path(given.outputs) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{given.name}.{ending}" for ending in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=150)
        print(f"written: {file}")
    log_files(data, uri, files, "figures")


if __name__ == "__main__":
    main()
