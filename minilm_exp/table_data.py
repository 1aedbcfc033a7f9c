"""The cells of a sweep as rows of a table, and what is wrong with them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from scipy import stats

from minilm_exp.errors import ExperimentError
from minilm_exp.provenance import RESULTS_VERSION
from minilm_exp.result import Result, read_result
from minilm_exp.sweep_record import Cell, SweepRecord, read_record, record_folder
from minilm_exp.table_spec import Named, TableSpec

# Below it a difference is bold; two-sided, of Welch's t-test over seeds.
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Measured:
    """Values of one cell of the table, one for each seed."""

    values: list[float]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def differs_from(self, other: Measured) -> bool:
        """Whether Welch's t-test tells them apart."""
        if len(self.values) < 2 or len(other.values) < 2:
            return False
        if self.spread == 0 and other.spread == 0:
            return self.mean != other.mean
        test = stats.ttest_ind_from_stats(
            self.mean, self.spread, len(self.values), other.mean, other.spread, len(other.values),
            equal_var=False,
        )  # fmt: skip
        return bool(test.pvalue < SIGNIFICANCE)


@dataclass
class Row:
    """Runs that differ by their seed alone.

    Attributes:
        values: Of the settings by which rows differ.
        parts: Name and paper's place of each of them.
        results: By seed.
        unavailable: Why there are none.
    """

    values: dict[str, str]
    parts: list[Named]
    results: dict[str, Result] = field(default_factory=dict)
    unavailable: str | None = None

    @property
    def label(self) -> str:
        """The row's name."""
        return ", ".join(part.label for part in self.parts if part.label)

    def measured(self, column: str) -> Measured | None:
        """A column's values in the order of the seeds; None where a run lacks it."""
        values = [_value(self.results[seed], column) for seed in sorted(self.results)]
        known = [value for value in values if value is not None]
        return Measured(known) if known and len(known) == len(values) else None


@dataclass
class TableData:
    """A sweep as a table.

    Attributes:
        spec: What it shows.
        record: Where its cells are.
        rows: The first is what the others are compared with.
        columns: Those of the spec and of tasks that it does not name.
        more: Columns that are no scores.
        papers: Columns of the paper whose tasks were not run here.
        problems: What a table should not be made of; empty unless it is allowed.
    """

    spec: TableSpec
    record: SweepRecord
    rows: list[Row]
    columns: dict[str, Named]
    more: dict[str, Named]
    papers: dict[str, Named]
    problems: list[str]

    @property
    def results(self) -> list[Result]:
        """Of all cells."""
        return [result for row in self.rows for result in row.results.values()]


def newest_record(outputs: Path, name: str) -> SweepRecord:
    """The record of a sweep, or of several scales of it the one last written.

    Args:
        outputs: The folder of all runs.
        name: Of the sweep, or of one record.

    Raises:
        ExperimentError: There is none.
    """
    folder = record_folder(outputs)
    files = [*folder.glob(f"{name}.json"), *folder.glob(f"{name}-*.json")]
    if not files:
        there = ", ".join(sorted(file.stem for file in folder.glob("*.json"))) or "nothing"
        raise ExperimentError(
            f"{folder} has no sweep {name}; there is {there}: run it (python run.py -m"
            f" sweeps={name}), or name the folder of its runs (--outputs)"
        )
    return read_record(max(files, key=lambda file: file.stat().st_mtime))


def collect(record: SweepRecord, spec: TableSpec, allow_mixed: bool = False) -> TableData:
    """Brings the cells into rows.

    Raises:
        ExperimentError: Cells are missing, unfinished, damaged, there twice, made by a changed
            tree, or by other versions of the results; it names all of them.
    """
    problems: list[str] = []
    found: list[tuple[Cell, Result]] = []
    # A search goes on without the trials that failed; of a grid every cell is wanted.
    cells = [cell for cell in record.cells if record.is_grid or cell.error is None]
    for cell in cells:
        problem = _problem(cell)
        if problem is None and (result := cell.result) is not None:
            found.append((cell, result))
            problems += _duplicates(cell, result)
        else:
            problems.append(f"{cell.name}: {problem}")
    axes = _axes(record, spec)
    problems += _mixed(found, axes)
    rows: dict[tuple[str, ...], Row] = {}
    for cell in cells:
        values = {axis: cell.values[axis] for axis in axes}
        rows.setdefault(tuple(values.values()), Row(values, []))
    for cell, result in found:
        row = rows[tuple(cell.values[axis] for axis in axes)]
        row.results[cell.values["seed"]] = result
    for row in rows.values():
        row.parts = spec.parts(row.values, _teacher_layers(row))
    seeds = {cell.values["seed"] for cell in cells}
    for row in rows.values():
        missing = sorted(seeds - set(row.results))
        known = {c.values["seed"] for c in cells if _is_in(c, row)}
        problems += [
            f"{row.label}: seed {seed} is missing" for seed in missing if seed not in known
        ]
    if problems and not allow_mixed:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ExperimentError(
            f"no table of {record.name}:\n{listed}\nrun the sweep again, which computes what is"
            " missing (with rerun=true also what is finished), or print it all the same with"
            " --allow-mixed, which says so in the table"
        )
    tasks = list(dict.fromkeys(task for _, result in found for task in result.scores))
    columns = {task: spec.columns.get(task, Named(task)) for task in tasks}
    if len(tasks) > 1:
        mean = spec.columns.get("mean", Named("mean"))
        # The mean over other tasks has nothing to do with the paper's.
        is_papers = set(tasks) == set(spec.columns) - {"mean"}
        columns["mean"] = mean if is_papers else Named(mean.label)
    papers = {n: c for n, c in spec.columns.items() if c.paper and columns.get(n) != c}
    all_rows = [*rows.values(), *_unavailable(spec, rows.values())]
    return TableData(spec, record, all_rows, columns, spec.more, papers, problems)


def _value(result: Result, column: str) -> float | None:
    if column == "mean":
        return statistics.fmean(result.scores.values()) if result.scores else None
    if column in ("parameters", "speedup"):
        return result.trial_value(column)
    return result.scores.get(column)


def _problem(cell: Cell) -> str | None:
    """Why the cell cannot stand in a table."""
    if cell.error is not None:
        return f"failed: {cell.error}"
    if cell.folder is None:
        return "has not been run to its end"
    result, name = read_result(Path(cell.folder)), Path(cell.folder).name
    if result is None:
        return f"its result is gone or damaged (result.json of {name})"
    if result.run_key != cell.run_key:
        return f"another run lies in {name}"
    if result.status != "FINISHED":
        return f"its run {name} is {result.status}"
    if not result.scores:
        return f"its run {name} has no score"
    return None


def _duplicates(cell: Cell, result: Result) -> Iterable[str]:
    folder = Path(result.folder)
    for other in sorted(folder.parent.glob(f"*-{result.run_key[:10]}*/")):
        if other != folder and (twin := read_result(other)) is not None:
            if twin.status == "FINISHED" and twin.run_key == result.run_key:
                yield f"{cell.name}: is there twice, remove {folder.name} or {other.name}"


def _mixed(found: list[tuple[Cell, Result]], axes: list[str]) -> Iterable[str]:
    first: dict[str, Cell] = {}
    for cell, result in found:
        if result.run_key in first:
            yield f"{first[result.run_key].name} and {cell.name} are the same run"
        first[result.run_key] = cell
        folder = Path(result.folder).name
        if result.made_by.get("git_dirty") != "false":
            yield f"{cell.name}: made by a tree with uncommitted changes ({folder})"
        if result.made_by.get("results_version") != str(RESULTS_VERSION):
            version = result.made_by.get("results_version", "unknown")
            yield f"{cell.name}: results version {version}, this program's is {RESULTS_VERSION}"
    for name in ("precision", "device"):
        values = {result.made_by.get(name, "unknown") for _, result in found}
        if len(values) > 1:
            yield f"cells of several kinds of {name}: {', '.join(sorted(values))}"
    names = {n for _, r in found for n in r.made_by if n.startswith("input.")}
    for name in sorted(names):
        if any(axis.startswith(name.split(".")[1]) for axis in axes):
            continue
        values = {r.made_by[name] for _, r in found if name in r.made_by}
        if len(values) > 1:
            shown = ", ".join(sorted(value[:8] for value in values))
            yield f"cells with another content of {name.removeprefix('input.')}: {shown}"


def _axes(record: SweepRecord, spec: TableSpec) -> list[str]:
    """What is varied, in the order of the spec."""
    varied = list(dict.fromkeys(name for cell in record.cells for name in cell.values))
    varied = [name for name in varied if name != "seed"]
    return [a for a in spec.axes if a in varied] + [a for a in varied if a not in spec.axes]


def _is_in(cell: Cell, row: Row) -> bool:
    return all(cell.values[axis] == value for axis, value in row.values.items())


def _teacher_layers(row: Row) -> int:
    """Of the runs' teacher."""
    for result in row.results.values():
        try:
            text = (Path(result.folder) / "config.yaml").read_text(encoding="utf-8")
            return int(yaml.safe_load(text)["teacher"]["num_layers"])
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
            continue
    return 1


def _unavailable(spec: TableSpec, rows: Iterable[Row]) -> Iterable[Row]:
    """Rows that the paper has and that were not run, for the reason that the spec gives."""
    there = [row.values for row in rows]
    for values, reason in spec.unavailable:
        if not any(values.items() <= row.items() for row in there):
            yield Row(values, spec.parts(values, 1), {}, reason)
