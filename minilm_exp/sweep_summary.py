"""What a sweep prints before it begins and when it ends."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from minilm_exp.resolvers import REPOSITORY
from minilm_exp.result import Result
from minilm_exp.summary import print_comparison
from minilm_exp.sweep_record import Cell, Runs, SweepRecord


@dataclass(frozen=True)
class Plan:
    """What is known of a cell before it is run.

    Attributes:
        seconds: A rough estimate; None for settings that are refused.
        finished: Its run, where it has been run before.
        error: Why its settings are refused.
    """

    seconds: float | None = None
    finished: Result | None = None
    error: str | None = None


def print_cells(record: SweepRecord, cells: list[Cell], plans: list[Plan], runs: Runs) -> None:
    """The cells of a sweep, which of them are finished, and how long the others will take.

    Args:
        record: Of the sweep.
        cells: Of this call.
        plans: What is known of each.
        runs: By which the time is estimated, where cells of the record are finished.
    """
    known = map(runs.result, record.cells)
    took = [result.elapsed_seconds for result in known if result is not None]
    measured = [value for value in took if value is not None]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("cell", "state", "about"):
        table.add_column(heading)
    left = 0.0
    for cell, plan in zip(cells, plans):
        if plan.finished is not None:
            table.add_row(cell.name, "finished", "")
        elif plan.seconds is None:
            table.add_row(cell.name, "will fail", plan.error)
        else:
            seconds = statistics.fmean(measured) if measured else plan.seconds
            left += seconds
            table.add_row(cell.name, "to do", _time(seconds))
    console = Console(markup=False)
    console.print(f"\n{record.name}: {len(cells)} cells")
    console.print(table)
    basis = "what the finished ones took" if measured else "the sizes of the models; very rough"
    if left:
        console.print(f"about {_time(left)} to go (from {basis})\n")
    else:
        is_done = all(plan.finished is not None for plan in plans)
        console.print("nothing to do\n" if is_done else "all of them will fail\n")


def print_search(name: str, finished: int, number: int, plan: Plan) -> None:
    """How many trials a search is to make, and how long they will take."""
    estimate = ""
    if plan.seconds is not None and number:
        estimate = f"; about {_time(number * plan.seconds)} (from the sizes of the models)"
    print(f"\n{name}: {finished} trials are finished, {number} to go{estimate}\n", flush=True)


def print_end(record: SweepRecord, failed: list[Cell], runs: Runs) -> None:
    """The cells whoever computed them, how many are finished, and why others of this call failed.

    Args:
        record: Of the sweep.
        failed: Cells of this call that are not finished.
        runs: Where its runs are.
    """
    console = Console(markup=False)
    outcomes = [
        ([f"{name}={value}" for name, value in cell.values.items()], result)
        for cell in record.cells
        if (result := runs.result(cell)) is not None
    ]
    if len(outcomes) > 1:
        print_comparison(outcomes)
    console.print(f"\n{record.name}: {len(outcomes)} of {len(record.cells)} cells are finished")
    for cell in failed:
        reason = cell.error or "not finished; the same command goes on with it"
        console.print(f"failed: {cell.name}: {reason}", soft_wrap=True)
    outputs = runs.folder.parent
    where = "" if outputs == REPOSITORY / "outputs" else f" ARGS='--outputs {outputs}'"
    console.print(f"table       make table NAME={record.sweep}{where}", soft_wrap=True)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
