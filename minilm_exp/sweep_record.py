"""What is known of a sweep, kept beside its runs: its cells, and where each was computed."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock

from minilm_exp.errors import ExperimentError
from minilm_exp.result import Result, read_results, standing, write_json


@dataclass
class Cell:
    """One run of a sweep.

    Attributes:
        values: What the sweep varies, by setting, as typed on a command line.
        run_key: Of the run that computed it; None before.
        error: Why its last run failed.
    """

    values: dict[str, str]
    run_key: str | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """Its values as on a command line."""
        return " ".join(f"{key}={value}" for key, value in self.values.items())

    def take(self, result: Result) -> None:
        """Notes the run that computed it."""
        self.run_key, self.error = result.run_key, None


class Runs:
    """The runs that lie in a folder of outputs, as they are there now."""

    def __init__(self, outputs: Path) -> None:
        self.folder = outputs / "runs"
        self._by_key: dict[str, list[Result]] = {}
        for result in read_results(sorted(self.folder.glob("*/"))):
            self._by_key.setdefault(result.run_key, []).append(result)

    def of(self, cell: Cell) -> list[Result]:
        """All runs of the cell, whatever became of them."""
        return self._by_key.get(cell.run_key or "", [])

    def standing(self, cell: Cell) -> list[Result]:
        """Its finished runs that no other replaces; several only where runs were copied."""
        return standing(self.of(cell), cell.run_key or "")

    def count(self, cells: list[Cell]) -> str:
        """How many of them are finished."""
        return f"{sum(bool(self.standing(cell)) for cell in cells)} of {len(cells)} cells"

    def result(self, cell: Cell) -> Result | None:
        """Of its finished run; None where there is none, or none that can be read."""
        return next(iter(self.standing(cell)), None)


@dataclass
class SweepRecord:
    """A sweep at one scale: all of its cells, of whichever calls and seeds.

    Attributes:
        sweep: Name of the file in sweeps/.
        name: The same with a fingerprint of every setting that is not varied.
        token: By which its studies are told from those of other folders in one database.
        commands: Of all calls, each once.
        calls: How many there were.
        is_grid: False for a search.
        num_trials: Of a search, how many were asked for.
        num_complete: Of them, how many were finished when a call last began or ended.
        trial_values: What its trials return, of which the score is one.
        directions: Of each of them, maximize or minimize.
        uri: Of MLflow, without its password.
        run_id: The MLflow run above those of the cells.
        cells: In the order in which they were first asked for.
    """

    sweep: str
    name: str
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    commands: list[list[str]] = field(default_factory=list)
    calls: int = 0
    is_grid: bool = True
    num_trials: int | None = None
    num_complete: int = 0
    trial_values: list[str] = field(default_factory=lambda: ["score"])
    directions: list[str] = field(default_factory=lambda: ["maximize"])
    uri: str | None = None
    run_id: str | None = None
    cells: list[Cell] = field(default_factory=list)

    def begin(self, command: list[str], is_grid: bool) -> None:
        """Notes a call."""
        self.commands = [known for known in self.commands if known != command] + [command]
        self.calls += 1
        self.is_grid = is_grid

    def order(self, values: list[dict[str, str]], runs: Runs) -> list[Cell]:
        """The cells of a grid, in its order; new ones come after those of earlier calls.

        What earlier calls did not finish and this one does not ask for is forgotten, such as a
        value with a slip.
        """
        asked = [self.cell(one) for one in values]
        if values:
            kept = [cell for cell in self.cells if cell.values in values or runs.standing(cell)]
            self.cells = kept
        return asked

    def cell(self, values: dict[str, str]) -> Cell:
        """The cell of these values, which is added where it is new."""
        for cell in self.cells:
            if cell.values == values:
                return cell
        self.cells.append(Cell(values))
        return self.cells[-1]


def record_folder(outputs: Path) -> Path:
    """Where the records of all sweeps lie."""
    return outputs / "sweeps"


@contextmanager
def open_record(outputs: Path, sweep: str, name: str) -> Iterator[SweepRecord]:
    """The record, held against other processes; what is changed is written at the end."""
    folder = record_folder(outputs)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    with FileLock(f"{file}.lock"):
        record = read_record(file) if file.is_file() else SweepRecord(sweep, name)
        yield record
        write_json(file, asdict(record), indent=1)


def read_record(file: Path) -> SweepRecord:
    """A record as it was last written.

    Raises:
        ExperimentError: It cannot be read.
    """
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        cells = [Cell(c["values"], c["run_key"], c["error"]) for c in stored.pop("cells")]
        return SweepRecord(**stored, cells=cells)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ExperimentError(
            f"{file} is no record of a sweep: remove it, and start the sweep again; finished runs"
            " are not computed again"
        ) from error
