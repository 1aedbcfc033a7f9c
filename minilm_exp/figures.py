"""Figures of sweeps: python -m minilm_exp.figures teacher_layer.

Written as PNG and SVG to outputs/figures, and as artifacts of the sweep's MLflow run. Marks and
lines differ, so that they can be told apart in grey.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minilm_exp.errors import ExperimentError
from minilm_exp.pareto import on_front
from minilm_exp.plots import LINES, MARKS
from minilm_exp.table_data import Measured, Row, TableData, in_order
from minilm_exp.tables import command_line, log_files
from minilm_exp.tracking import open_tracker

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
        "search": _search,
        "loss": functools.partial(_loss, uri),
    }
    if given is None or given.kind not in kinds:
        raise ExperimentError(
            f"the table of {data.record.sweep} names no figure of {', '.join(kinds)}"
        )
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    kinds[given.kind](axes, data)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    title = "\n".join([data.spec.title, *([", ".join(data.common)] if data.common else [])])
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
            yerr=_bars([measured for _, measured in known]),
            label=f"{column.label} ({100 * first.mean:.1f} at {reference.label})",
            capsize=3,
            **_style(number),
        )
    _paper_lines(axes, data, rows, places)
    if max(places, default=0) >= 8 * max(1.0, min(places, default=1)):
        axes.set_xscale("log", base=2)
    axes.set_xticks(places, [row.values[axis] for row in rows])
    axes.set_xlabel(data.spec.figure.label or axis)
    axes.set_ylabel(f"score × 100, less that of {reference.label}{_seeds(data)}")


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
            yerr=_bars([score]),
            label=row.label,
            capsize=3,
            linestyle="none",
            marker=MARKS[number % len(MARKS)],
            color=_GREYS[number // len(MARKS) % len(_GREYS)],
        )
    _front(axes, points, on_front(points))
    baselines = sorted({str(result.baseline) for result in data.results})
    axes.set_xlabel(f"speedup over {', '.join(baselines)}")
    axes.set_ylabel(f"{data.columns[column].label}, score × 100{_seeds(data)}")


def _front(axes: Axes, points: list[tuple[float, float]], is_on_front: list[bool]) -> None:
    front = sorted({point for point, is_best in zip(points, is_on_front) if is_best})
    axes.plot(
        [x for x, _ in front],
        [y for _, y in front],
        color="0.6",
        linewidth=1,
        label="Pareto front" if len(front) > 1 else "_nolegend_",
        zorder=0,
    )


def _search(axes: Axes, data: TableData) -> None:
    """Score against the second value that is searched for, or in the order of the trials."""
    rows = sorted((row for row in data.rows if row.results), key=lambda row: row.number)
    others = [name for name in data.record.trial_values if name != "score"]
    points, is_best = [], []
    for row in rows:
        result = row.results[in_order(row.results)[0]]
        score, other = result.score, result.trial_value(others[0]) if others else row.number
        if score is not None and other is not None:
            points.append((float(other), 100 * score if result.scores else score))
            is_best.append(row.is_best)
    axes.plot(*zip(*points), "o", color="0.35", fillstyle="none", label="a trial")
    if others:
        best = [point for point, found in zip(points, is_best) if found]
        axes.plot(*zip(*best), "o", color="black", label="none is as good and better in one")
        _front(axes, points, is_best)
    else:
        best_yet = itertools.accumulate((score for _, score in points), max)
        trials = [x for x, _ in points]
        axes.step(trials, [*best_yet], color="black", where="post", label="best yet")
    axes.set_xlabel(others[0] if others else "trial")
    axes.set_ylabel("score × 100, mean of the tasks")


def _bars(measured: list[Measured]) -> list[float] | None:
    """Half lengths of error bars; none where there is one seed."""
    if all(one.spread is None for one in measured):
        return None
    return [100 * (one.spread or 0) for one in measured]


def _seeds(data: TableData) -> str:
    """What points and error bars stand for."""
    numbers = sorted({len(row.results) for row in data.rows if row.results})
    if numbers in ([], [1]):
        return "\n(one seed)"
    return f"\n(mean ± standard deviation of {' to '.join(map(str, numbers))} seeds)"


def _loss(uri: str | None, axes: Axes, data: TableData) -> None:
    """Training loss of the first seed of each row."""
    seeds = set()
    for number, row in enumerate(row for row in data.rows if row.results):
        seeds.add(seed := in_order(row.results)[0])
        try:
            tracker = open_tracker(uri, row.results[seed].run_id)
        except ExperimentError as error:
            raise ExperimentError(
                f"{error}; losses are kept in MLflow alone: name its store by --tracking-uri, or"
                " compute the runs again with rerun=true"
            ) from error
        points = tracker.history("distill/loss/total")
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            label=row.label,
            **(_style(number) | {"marker": None}),
        )
    axes.set_xlabel(f"step (the runs of seed {', '.join(in_order(seeds))})")
    axes.set_ylabel("loss of all its terms (not comparable between rows)")
    axes.set_ylim(bottom=0)


def _style(number: int) -> dict[str, Any]:
    return {
        "marker": MARKS[number % len(MARKS)],
        "linestyle": LINES[number % len(LINES)],
        "color": _GREYS[number // len(LINES) % len(_GREYS)],
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    asked, data = command_line("minilm_exp.figures", __doc__, arguments)
    try:
        figure = draw(data, asked.uri)
    except ExperimentError as error:
        sys.exit(f"error: {error}")
    folder = asked.outputs / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{asked.name}.{ending}" for ending in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=150)
        print(f"written: {file}")
    log_files(data.record, asked.uri, files, "figures")


if __name__ == "__main__":
    main()
