"""The cells of a sweep as rows of a table, and what is wrong with them."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from scipy import stats

from minilm_exp.errors import ExperimentError
from minilm_exp.pareto import on_front
from minilm_exp.provenance import RESULTS_VERSION
from minilm_exp.resolvers import REPOSITORY
from minilm_exp.result import Result
from minilm_exp.sweep_record import Cell, Runs, SweepRecord, read_record, record_folder
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
        values: Of the settings that the sweep varies.
        label: The row's name: what tells it from other rows.
        parts: Name and paper's place of each of the values.
        number: Which of the rows it was, as they were asked for.
        results: By seed.
        unavailable: Why there are none.
        is_best: Of a search, whether no other trial beats it in all that is searched for.
    """

    values: dict[str, str]
    label: str
    parts: list[Named]
    number: int = 0
    results: dict[str, Result] = field(default_factory=dict)
    unavailable: str | None = None
    is_best: bool = False

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
        rows: The first is what the others are compared with. Of a search the best come first.
        common: What is the same in all rows though the sweep varies it, by name.
        without: Values that were left out, as on the command line.
        columns: Those of the spec and of tasks that it does not name.
        more: Columns that are no scores.
        papers: Columns of the paper whose tasks were not run here.
        problems: What a table should not be made of; empty unless it is allowed.
    """

    spec: TableSpec
    record: SweepRecord
    rows: list[Row]
    common: list[str]
    without: list[str]
    columns: dict[str, Named]
    more: dict[str, Named]
    papers: dict[str, Named]
    problems: list[str]

    @property
    def is_compared(self) -> bool:
        """Whether rows are compared with the first; those of a search are ordered by score."""
        return self.record.is_grid

    @property
    def results(self) -> list[Result]:
        """Of all cells."""
        return [result for row in self.rows for result in row.results.values()]


def find_records(outputs: Path, name: str, runs: Runs) -> list[SweepRecord]:
    """The records of a sweep, one for each scale: the one last written first.

    Those without a finished cell, as of a call that failed, come after all others.

    Args:
        outputs: The folder of all runs.
        name: Of the sweep, or of one record.
        runs: In that folder.

    Raises:
        ExperimentError: There is none.
    """
    folder = record_folder(outputs)
    files = [*folder.glob(f"{name}.json"), *folder.glob(f"{name}-*.json")]
    files.sort(key=lambda file: -file.stat().st_mtime)
    records = [read_record(file) for file in files]
    records = [record for record in records if name in (record.name, record.sweep)]
    if not records:
        there = ", ".join(sorted(file.stem for file in folder.glob("*.json"))) or "nothing"
        raise ExperimentError(
            f"{folder} has no sweep {name}; there is {there}: run it (python run.py -m"
            f" sweeps={name}), or name the folder of its runs (--outputs)"
        )
    return sorted(records, key=lambda record: not any(map(runs.standing, record.cells)))


def collect(
    record: SweepRecord,
    spec: TableSpec,
    runs: Runs,
    allow_mixed: bool = False,
    without: Sequence[str] = (),
) -> TableData:
    """Brings the cells into rows.

    Args:
        record: The sweep's cells.
        spec: What its table shows.
        runs: Where the cells' results are.
        allow_mixed: Also cells that should not stand in one table.
        without: SETTING=VALUE whose cells are left out.

    Raises:
        ExperimentError: Cells are missing, unfinished, damaged, there twice, made by a changed
            tree, or by other versions of the results; it names all of them.
    """
    problems: list[str] = []
    found: list[tuple[Cell, Result]] = []
    to_run: list[dict[str, str]] = []
    cells = _without(record, without)
    for cell in cells:
        problem = _problem(cell, runs)
        if problem is None and (result := runs.result(cell)) is not None:
            found.append((cell, result))
        else:
            problems.append(f"{cell.name}: {problem}")
            to_run.append(cell.values)
        twins = [Path(twin.folder).name for twin in runs.standing(cell)]
        if len(twins) > 1:
            problems.append(f"{cell.name}: is there twice, remove {' or '.join(twins)}")
    num_complete = max(record.num_complete, len(found))
    if not record.is_grid and num_complete < (record.num_trials or 0):
        problems.append(
            f"{num_complete} of {record.num_trials} trials are finished: the same command goes on"
        )
    axes = _axes(cells, spec)
    problems += _mixed(found, axes)
    _share_speeds([result for _, result in found])
    rows: dict[tuple[str, ...], Row] = {}
    for number, cell in enumerate(cells, start=1):
        values = {axis: cell.values[axis] for axis in axes}
        rows.setdefault(tuple(values.values()), Row(values, "", [], number))
    for cell, result in found:
        row = rows[tuple(cell.values[axis] for axis in axes)]
        row.results[cell.values["seed"]] = result
    common = _name(spec, list(rows.values()))
    seeds = in_order({cell.values["seed"] for cell in cells}) if record.is_grid else []
    for row in rows.values():
        known = {c.values["seed"] for c in cells if _is_in(c, row)}
        for seed in seeds:
            if seed not in known:
                problems.append(f"{row.label}: seed {seed} is missing")
                to_run.append({"seed": seed} | row.values)
    if problems and not allow_mixed:
        raise ExperimentError(_refusal(record, runs, problems, to_run))
    ordered = _ranked(record, [*rows.values()]) if not record.is_grid else _sorted(spec, rows)
    tasks = list(dict.fromkeys(task for _, result in found for task in result.scores))
    columns = {task: spec.columns.get(task, Named(task)) for task in tasks}
    if len(tasks) > 1:
        mean = spec.columns.get("mean", Named("mean"))
        # The mean over other tasks has nothing to do with the paper's.
        is_papers = set(tasks) == set(spec.columns) - {"mean"}
        columns["mean"] = mean if is_papers else Named(mean.label)
    papers = {n: c for n, c in spec.columns.items() if c.paper and columns.get(n) != c}
    more = dict(spec.more)
    if not record.is_grid:
        more |= {n: Named(n) for n in record.trial_values if n != "score" and n not in more}
    all_rows = [*ordered, *_unavailable(spec, rows.values())]
    return TableData(spec, record, all_rows, common, list(without), columns, more, papers, problems)


def _without(record: SweepRecord, without: Sequence[str]) -> list[Cell]:
    """The cells that are wanted."""
    # A search goes on without the trials that failed; of a grid every cell is wanted.
    cells = [cell for cell in record.cells if record.is_grid or cell.error is None]
    for given in without:
        name, _, value = given.partition("=")
        left = [cell for cell in cells if cell.values.get(name) != value]
        if not left or len(left) == len(cells):
            known = sorted({f"{n}={v}" for cell in record.cells for n, v in cell.values.items()})
            which = "no cell" if left else "every cell"
            raise ExperimentError(
                f"--without {given}: {which} of {record.name} has it; it varies {', '.join(known)}"
            )
        cells = left
    return cells


def _refusal(
    record: SweepRecord, runs: Runs, problems: list[str], to_run: list[dict[str, str]]
) -> str:
    lines = [f"no table of {record.name}:", *(f"  {problem}" for problem in problems)]
    if to_run and record.is_grid:
        lines.append(f"what is missing is computed by: {_command(record, runs, to_run)}")
    lines.append(
        "with rerun=true a sweep computes finished cells again, and the new ones replace the old;"
        " --without SETTING=VALUE leaves cells out; --allow-mixed prints the table all the same,"
        " and says so in it"
    )
    return "\n".join(lines)


def _command(record: SweepRecord, runs: Runs, cells: list[dict[str, str]]) -> str:
    """That of the sweep's last call, for these cells and the present folder."""
    words = record.commands[-1] if record.commands else ["run.py", "-m", f"sweeps={record.sweep}"]
    words = [word for word in words if word.split("=")[0] not in {"outputs_dir", *cells[0]}]
    if (outputs := runs.folder.parent) != REPOSITORY / "outputs":
        words.append(f"outputs_dir={outputs}")
    for name in cells[0]:
        values = dict.fromkeys(cell[name] for cell in cells)
        words.append(f"{name}=choice({','.join(values)})")
    return shlex.join(["python", *words])


def _share_speeds(results: list[Result]) -> None:
    """Gives students of one shape one speedup, the mean of their measurements."""
    by_shape: dict[str, list[Result]] = {}
    for result in results:
        if result.speedup is not None:
            shape = f"{result.baseline} {result.parameters.get('student')}"
            by_shape.setdefault(shape, []).append(result)
    for alike in by_shape.values():
        mean = statistics.fmean(r.speedup for r in alike if r.speedup is not None)
        for result in alike:
            result.speedup = mean


def _name(spec: TableSpec, rows: list[Row]) -> list[str]:
    """Labels the rows by what tells them apart; gives the names of what they have in common."""
    for row in rows:
        row.parts = spec.parts(row.values, _teacher_layers(row))
    axes = list(rows[0].values) if rows else []
    differing = [i for i, axis in enumerate(axes) if len({row.values[axis] for row in rows}) > 1]
    shown = differing or range(len(axes))
    for row in rows:
        row.label = ", ".join(row.parts[i].label for i in shown if row.parts[i].label)
    return [rows[0].parts[i].label for i in range(len(axes)) if i not in shown]


def in_order(seeds: Iterable[str]) -> list[str]:
    """As numbers are ordered."""
    return sorted(seeds, key=lambda seed: (len(seed), seed))


def _sorted(spec: TableSpec, rows: dict[tuple[str, ...], Row]) -> list[Row]:
    """In the order in which the spec names values; others come later, as they were asked for."""
    known: list[list[str]] = []
    for number, axis in enumerate(next(iter(rows.values())).values if rows else []):
        named = list(spec.axes[axis].values) if axis in spec.axes else []
        known.append(list(dict.fromkeys([*named, *(values[number] for values in rows)])))
    return [
        rows[key] for key in sorted(rows, key=lambda key: [k.index(v) for k, v in zip(known, key)])
    ]


def _ranked(record: SweepRecord, rows: list[Row]) -> list[Row]:
    """The trials of a search: those on the front are marked, the best first."""
    signs = [1 if direction == "maximize" else -1 for direction in record.directions]
    points: list[list[float]] = []
    known = []
    for row in rows:
        values = [r.trial_value(name) for r in row.results.values() for name in record.trial_values]
        if values and None not in values:
            known.append(row)
            points.append([sign * value for sign, value in zip(signs, values) if value is not None])
    for row, is_best in zip(known, on_front(points)):
        row.is_best = is_best
    order = {id(row): point for row, point in zip(known, points)}
    known.sort(key=lambda row: order[id(row)], reverse=True)
    return known + [row for row in rows if id(row) not in order]


def _value(result: Result, column: str) -> float | None:
    if column == "mean":
        return statistics.fmean(result.scores.values()) if result.scores else None
    if column in ("parameters", "speedup"):
        return result.trial_value(column)
    return result.scores.get(column)


def _problem(cell: Cell, runs: Runs) -> str | None:
    """Why the cell cannot stand in a table."""
    if cell.error is not None:
        return f"failed: {cell.error}"
    if cell.run_key is None:
        return "has not been run to its end"
    if not runs.of(cell):
        return (
            f"its result is gone or damaged: no result.json in {runs.folder} has the key"
            f" {cell.run_key[:10]}"
        )
    result = runs.result(cell)
    if result is None:
        states = " and ".join(f"{Path(r.folder).name} is {r.status}" for r in runs.of(cell))
        return f"its run {states}"
    if not result.scores:
        return f"its run {Path(result.folder).name} has no score"
    return None


def _mixed(found: list[tuple[Cell, Result]], axes: list[str]) -> Iterable[str]:
    first: dict[str, Cell] = {}
    for cell, result in found:
        if result.run_key in first:
            yield f"{first[result.run_key].name} and {cell.name} are the same run"
        first[result.run_key] = cell
        if result.made_by.get("results_version") != str(RESULTS_VERSION):
            version = result.made_by.get("results_version", "unknown")
            yield f"{cell.name}: results version {version}, this program's is {RESULTS_VERSION}"
    dirty = [cell.name for cell, result in found if result.made_by.get("git_dirty") != "false"]
    if dirty:
        yield (
            f"made by a tree with uncommitted changes: {'; '.join(dirty)}. Commit the changes, then"
            " run the sweep with rerun=true"
        )
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


def _axes(cells: list[Cell], spec: TableSpec) -> list[str]:
    """What is varied, in the order of the spec."""
    varied = list(dict.fromkeys(name for cell in cells for name in cell.values))
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
            parts = spec.parts(values, 1)
            label = ", ".join(part.label for part in parts if part.label)
            yield Row(values, label, parts, unavailable=reason)
