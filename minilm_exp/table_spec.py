"""What a table of a sweep shows: sweeps/NAME.table, beside the sweep."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from minilm_exp.errors import ExperimentError
from minilm_exp.paper import paper_table, paper_value
from minilm_exp.resolvers import REPOSITORY

# Of a paper's table: the name of a column, or values that its row has, by column.
_Place = str | dict[str, Any]


@dataclass(frozen=True)
class Named:
    """A value of a row's setting, or a column: how it is called, and where papers have it.

    Attributes:
        label: For people.
        paper: By the table's name, a column, or what the row has in some columns.
        is_foreign: Whether the spec knows nothing of the setting, and so of the paper's number.
    """

    label: str
    paper: dict[str, _Place] = field(default_factory=dict)
    is_foreign: bool = False


@dataclass(frozen=True)
class Axis:
    """A setting by which rows differ.

    Attributes:
        label: Of its values, with {value} in it.
        values: Those that have a name of their own.
        shares: Of a number of layers: by the divisor of the teacher's, 2 for a half of them.
        depth: For teacher layers: by the table's name, the column of the layer and the number of
            layers. A layer stands beside the paper's at the same share of the depth.
    """

    label: str
    values: dict[str, Named]
    shares: dict[int, dict[str, _Place]]
    depth: dict[str, tuple[str, int]]

    def named(self, value: str, teacher_layers: int) -> Named:
        """Name and places of one of the values that the rows have."""
        if value in self.values:
            return self.values[value]
        label = self.label.format(value=_short(value))
        for divisor, paper in self.shares.items():
            if int(value) == teacher_layers // divisor:
                return Named(label, paper)
        # The paper's table of a teacher as deep, else the first.
        same = [t for t, (_, layers) in self.depth.items() if layers == teacher_layers]
        for table in same or list(self.depth)[:1]:
            column, layers = self.depth[table]
            share = int(value) * layers / teacher_layers
            if share == int(share):
                return Named(label, {table: {column: int(share)}})
        return Named(label)


@dataclass(frozen=True)
class Figure:
    """What is drawn of a sweep.

    Attributes:
        kind: line (score against a setting), pareto (score against speedup), loss (curves) or
            search (score against what else is searched for, or trial by trial).
        axis: Of a line, the setting.
        label: Of that axis.
    """

    kind: str
    axis: str = ""
    label: str = ""


@dataclass(frozen=True)
class TableSpec:
    """A whole table.

    Attributes:
        title: With the paper's table.
        axes: By setting.
        columns: By task; `mean` is that of the tasks' scores.
        more: Columns that are no scores: parameters, speedup.
        cells: Values of whole rows and where papers have these.
        figure: Of `python -m minilm_exp.figures`.
        unavailable: Values of rows that the paper has and a teacher may lack, with the reason.
        note: What else a reader must know to compare with the paper.
    """

    title: str
    axes: dict[str, Axis]
    columns: dict[str, Named]
    more: dict[str, Named]
    cells: list[tuple[dict[str, str], dict[str, _Place]]]
    figure: Figure | None
    unavailable: list[tuple[dict[str, str], str]]
    note: str

    def parts(self, values: dict[str, str], teacher_layers: int) -> list[Named]:
        """Names and places of a row's values, and of all of them together."""
        parts = [
            self.axes[axis].named(value, teacher_layers)
            if axis in self.axes
            else Named(f"{axis}={value}", is_foreign=True)
            for axis, value in values.items()
        ]
        parts += [Named("", paper) for cell, paper in self.cells if cell == values]
        return parts

    def paper_value(self, row: list[Named], column: Named) -> tuple[float | str | None, str | None]:
        """The paper's number of a cell and its table, or None."""
        if any(part.is_foreign for part in row):
            return None, None
        for table, place in column.paper.items():
            name, match = (place, {}) if isinstance(place, str) else (None, dict(place))
            for part in row:
                given = part.paper.get(table)
                if isinstance(given, dict):
                    match |= given
                elif given is not None:
                    name = given
            if name is not None and (value := paper_value(table, name, match)) is not None:
                return value, table
        return None, None


def spec_of(sweep: str) -> Path:
    """The file of a sweep's spec."""
    return REPOSITORY / "sweeps" / f"{sweep}.table"


def read_spec(file: Path) -> TableSpec:
    """The spec of a table.

    Raises:
        ExperimentError: The file is not there, or not what it should be.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        spec = TableSpec(
            content.pop("title"),
            {name: _axis(axis) for name, axis in content.pop("rows").items()},
            _named(content.pop("columns")),
            _named(content.pop("more", {})),
            [(one["values"], one["paper"]) for one in content.pop("cells", [])],
            Figure(**content.pop("figure")) if "figure" in content else None,
            [(one["values"], one["reason"]) for one in content.pop("unavailable", [])],
            str(content.pop("note", "")),
        )
        if content:
            raise ExperimentError(f"{file} has unknown keys: {', '.join(content)}")
    except FileNotFoundError as error:
        raise ExperimentError(
            f"{file} is missing: the table of a sweep is described beside it (sweeps/README.md)"
        ) from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ExperimentError(f"{file} cannot be read: {error!r}") from error
    for axis in spec.axes.values():
        for table in axis.depth:
            paper_table(table)
    return spec


def _axis(content: dict[str, Any]) -> Axis:
    values = _named(content.get("values", {}))
    depth = {table: (place[0], int(place[1])) for table, place in content.get("depth", {}).items()}
    return Axis(content.get("label", "{value}"), values, content.get("shares", {}), depth)


def _short(value: str) -> str:
    """Numbers with many digits are cut."""
    try:
        return f"{float(value):.3g}" if "." in value else value
    except ValueError:
        return value


def _named(content: dict[Any, Any]) -> dict[str, Named]:
    return {
        str(name): Named(given.get("label", str(name)), given.get("paper", {}))
        for name, given in content.items()
    }
