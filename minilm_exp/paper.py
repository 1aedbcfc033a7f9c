"""The papers' tables, as data with their sources."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from minilm_exp.errors import ExperimentError

_FILE = Path(__file__).with_name("paper_tables.json")


@cache
def paper_tables() -> dict[str, dict[str, Any]]:
    """The tables by paper and number, such as "MiniLMv2 Table 7"."""
    tables: dict[str, dict[str, Any]] = {}
    for table in json.loads(_FILE.read_text(encoding="utf-8")):
        paper = table["paper"].split(" (")[0]
        tables.setdefault(f"{paper} {table['table']}", table)
    return tables


def paper_table(name: str) -> dict[str, Any]:
    """One of the tables.

    Raises:
        ExperimentError: There is none of this name.
    """
    if name not in paper_tables():
        raise ExperimentError(f"there is no {name}; there are {', '.join(sorted(paper_tables()))}")
    return paper_tables()[name]


def paper_value(name: str, column: str, row: dict[str, Any]) -> float | str | None:
    """The number in the one row that has these values; None where there is none, or several.

    Raises:
        ExperimentError: There is no such table or column.
    """
    table = paper_table(name)
    columns = table["columns"]
    unknown = [key for key in (column, *row) if key not in columns]
    if unknown:
        raise ExperimentError(f"{name} has no column {unknown[0]}; it has {', '.join(columns)}")
    rows = [
        cells
        for cells in table["rows"]
        if all(str(cells[columns.index(key)]) == str(value) for key, value in row.items())
    ]
    value: float | str | None = rows[0][columns.index(column)] if len(rows) == 1 else None
    return value
