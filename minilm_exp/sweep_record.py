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
from minilm_exp.result import Result, read_result, write_json


@dataclass
class Cell:
    """One run of a sweep.

    Attributes:
        values: What the sweep varies, by setting, as typed on a command line.
        folder: Of the run that computed it last, also where that failed; None before.
        run_key: Of that run.
        error: Why its last run failed, where it has no folder.
    """

    values: dict[str, str]
    folder: str | None = None
    run_key: str | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """Its values as on a command line."""
        return " ".join(f"{key}={value}" for key, value in self.values.items())

    def take(self, result: Result) -> None:
        """Notes the run that computed it."""
        self.folder, self.run_key, self.error = result.folder, result.run_key, None

    @property
    def result(self) -> Result | None:
        """Of its run; None where there is none, or none that can be read."""
        result = None if self.folder is None else read_result(Path(self.folder))
        return result if result is not None and result.run_key == self.run_key else None

    @property
    def is_finished(self) -> bool:
        """Whether its run ended well and is still there."""
        result = self.result
        return result is not None and result.status == "FINISHED"


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
        uri: Of MLflow, without its password.
        run_id: The MLflow run above those of the cells.
        cells: In the order of the last call, then those of earlier ones.
    """

    sweep: str
    name: str
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    commands: list[list[str]] = field(default_factory=list)
    calls: int = 0
    is_grid: bool = True
    uri: str | None = None
    run_id: str | None = None
    cells: list[Cell] = field(default_factory=list)

    def begin(self, command: list[str], is_grid: bool) -> None:
        """Notes a call."""
        self.commands = [known for known in self.commands if known != command] + [command]
        self.calls += 1
        self.is_grid = is_grid

    def order(self, values: list[dict[str, str]]) -> list[Cell]:
        """The cells of a grid, in its order, and before those of earlier calls.

        What earlier calls did not finish and this one does not ask for is forgotten, such as a
        value with a slip.
        """
        asked = [self.cell(one) for one in values]
        if values:
            others = [cell for cell in self.cells if cell.values not in values]
            self.cells = asked + [cell for cell in others if cell.is_finished]
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
        cells = [Cell(**cell) for cell in stored.pop("cells")]
        return SweepRecord(**stored, cells=cells)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ExperimentError(
            f"{file} is no record of a sweep ({error}): remove it, and start the sweep again;"
            " finished runs are not computed again"
        ) from error
