"""What a sweep prints before it begins and when it ends."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.table import Table

from minilm_exp.sweep_record import Cell, SweepRecord


def print_cells(name: str, cells: list[Cell], seconds: list[float | None]) -> None:
    """The cells of a sweep, which of them are finished, and how long the others will take.

    Args:
        name: Of the sweep's record.
        cells: Of this call.
        seconds: Estimates; None for what cannot be run.
    """
    took = [result.elapsed_seconds for cell in cells if (result := cell.result) is not None]
    measured = [value for value in took if value is not None]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("cell", "state", "about"):
        table.add_column(heading)
    left = 0.0
    for cell, estimate in zip(cells, seconds):
        if estimate is not None and measured:
            estimate = statistics.fmean(measured)
        state = "finished" if cell.is_finished else "to do"
        if estimate is None:
            state = "will fail"
        elif not cell.is_finished:
            left += estimate
        is_open = state == "to do" and estimate is not None
        table.add_row(cell.name, state, _time(estimate) if is_open and estimate else "")
    console = Console(markup=False)
    console.print(f"\n{name}: {len(cells)} cells")
    console.print(table)
    basis = "the finished ones took" if measured else "the sizes of the models; very rough"
    console.print(f"about {_time(left)} to go (from {basis})\n" if left else "nothing to do\n")


def print_end(record: SweepRecord, is_open: bool) -> None:
    """How many cells are finished, and what failed, with the reason.

    Args:
        record: Of the sweep.
        is_open: Whether another process still computes some.
    """
    console = Console(markup=False)
    finished = sum(cell.is_finished for cell in record.cells)
    console.print(f"\n{record.name}: {finished} of {len(record.cells)} cells are finished")
    if is_open:
        console.print("another process is still computing some")
    for cell in record.cells:
        if cell.error is not None:
            console.print(f"failed: {cell.name}: {cell.error}", soft_wrap=True)
    console.print(f"table       make table NAME={record.sweep}")


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
