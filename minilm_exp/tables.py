"""Tables of sweeps: python -m minilm_exp.tables relation_set.

Prints the table and writes it as Markdown, LaTeX and CSV to outputs/tables.
"""

from __future__ import annotations

import argparse
import csv
import io
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from minilm_exp.errors import ExperimentError
from minilm_exp.paper import paper_table
from minilm_exp.resolvers import REPOSITORY
from minilm_exp.sweep_record import Runs, SweepRecord
from minilm_exp.table_data import (
    SIGNIFICANCE,
    Measured,
    Row,
    TableData,
    collect,
    find_records,
    in_order,
)
from minilm_exp.table_spec import Named, TableSpec, read_spec, spec_of
from minilm_exp.tracking import open_tracker, sqlite_file


@dataclass(frozen=True)
class Text:
    """One entry of a table, and whether it is bold."""

    plain: str
    bold: str = ""


def headings(data: TableData) -> list[str]:
    """Of the columns: each score is followed by the paper's; those that only it has come last."""
    found = ["", "n"]
    for column in [*data.columns.values(), *data.more.values()]:
        found.append(column.label)
        if _in_paper(data, column):
            found.append(f"{column.label}, paper")
    return found + [f"{c.label}, paper" for c in data.papers.values() if _in_paper(data, c)]


def entries(data: TableData) -> list[list[Text]]:
    """The rows: mean ± standard deviation, and in brackets the difference to the first row.

    Of a search without differences, and with a star where nothing beats the trial.
    """
    rows = []
    for row in data.rows:
        texts = [Text(f"{row.label} *" if row.is_best else row.label), Text(str(len(row.results)))]
        for name, column in [*data.columns.items(), *data.more.items()]:
            texts.append(_measured(data, row, name))
            if _in_paper(data, column):
                texts.append(Text(_paper(data, row, column)))
        only = [column for column in data.papers.values() if _in_paper(data, column)]
        rows.append(texts + [Text(_paper(data, row, column)) for column in only])
    return rows


def footer(data: TableData) -> list[str]:
    """What the numbers are, and where they come from."""
    results = data.results
    made = [result.made_by for result in results]

    def all_of(name: str) -> str:
        return ", ".join(sorted({by.get(name, "unknown") for by in made})) or "unknown"

    hours = sum(result.elapsed_seconds or 0 for result in results) / 3600
    lines = [_meaning(data)]
    if not data.record.is_grid:
        directions = map(" ".join, zip(data.record.directions, data.record.trial_values))
        lines.append(
            f"A search ({', '.join(directions)}), the best trials first; *: no other trial is as"
            " good in all that is searched for and better in one. The best of many trials is the"
            " luckiest too: score it again with other seeds."
        )
        failed = sum(cell.error is not None for cell in data.record.cells)
        lines += [f"{failed} trials failed and are left out."] * bool(failed)
    if data.common:
        lines.append(f"In all rows: {', '.join(data.common)}.")
    if data.without:
        lines.append(f"Left out (--without): {', '.join(data.without)}.")
    if "speedup" in data.more and any(result.speedup is not None for result in results):
        baselines = sorted({str(result.baseline) for result in results})
        lines.append(
            f"Speedup over {', '.join(baselines)}: the mean of all measurements of students of one"
            " shape."
        )
    shown = [*data.columns.values(), *data.more.values(), *data.papers.values()]
    places = [data.spec.paper_value(row.parts, c)[1] for c in shown for row in data.rows]
    tables = dict.fromkeys(table for table in places if table is not None)
    if tables:
        lines.append(
            f"Paper: {', '.join(map(_source, tables))}, in other settings (teacher, corpus,"
            " steps, data): compare the order, not the numbers."
        )
        lines += [data.spec.note] * bool(data.spec.note)
    lines += [
        *(f"Command: {shlex.join(['python', *words])}" for words in data.record.commands),
        f"Runs: {data.record.name}, {len(results)} of {len(data.record.cells)} cells,"
        f" {_hours(hours)}, precision {all_of('precision')}, on {all_of('device')}.",
        f"Commit: {all_of('git_commit')}; results version {all_of('results_version')}.",
    ]
    if any(not result.meaningful for result in results):
        lines.append("NOT MEANINGFUL: the teacher had random weights.")
    for row in data.rows:
        if row.unavailable is not None:
            lines.append(f"unavailable, {row.label}: {row.unavailable}")
    if data.problems:
        lines.append("MIXED OR INCOMPLETE, printed all the same (--allow-mixed):")
        lines += [f"- {problem}" for problem in data.problems]
    return lines


def _meaning(data: TableData) -> str:
    """Of the numbers."""
    seeds = in_order({seed for row in data.rows for seed in row.results})
    text = f"Scores × 100, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"
    has_spread = any(len(row.results) > 1 for row in data.rows)
    if has_spread:
        text += ": mean ± standard deviation over the n seeds of a row"
    if not data.is_compared:
        return f"{text}."
    text += "; in brackets the difference to the first row"
    if not has_spread:
        return f"{text}. One seed has no spread: a difference may be chance."
    return (
        f"{text}, bold where Welch's t-test over the seeds gives p < {SIGNIFICANCE:g} (two-sided,"
        " not corrected for the number of rows)."
    )


def _hours(hours: float) -> str:
    return f"{hours:.2f} hours" if hours >= 0.1 else f"{60 * hours:.1f} minutes"


def markdown(data: TableData) -> str:
    """The table as Markdown."""

    def line(texts: list[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    names = headings(data)
    lines = [f"**{data.spec.title}**", "", line(names)]
    lines.append("|" + "|".join([" --- ", *[" ---: "] * (len(names) - 1)]) + "|")
    for row in entries(data):
        lines.append(line([f"{t.plain}{f' **{t.bold}**' if t.bold else ''}" for t in row]))
    return "\n".join([*lines, "", *(f"{text}  " for text in footer(data))]) + "\n"


def latex(data: TableData) -> str:
    """The table as LaTeX, for the package booktabs."""
    names = headings(data)
    lines = [
        r"\begin{table}",
        rf"\caption{{{_escape(data.spec.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}",
        r"\toprule",
        " & ".join(map(_escape, names)) + r" \\",
        r"\midrule",
    ]
    for row in entries(data):
        texts = [
            _number(t.plain) + (rf" \textbf{{{_number(t.bold)}}}" if t.bold else "") for t in row
        ]
        lines.append(" & ".join(texts) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", "", r"\parbox{\linewidth}{\footnotesize"]
    lines += [_escape(text) + r"\par" for text in footer(data)]
    lines.append("}")
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def comma_separated(data: TableData) -> str:
    """One line a cell, with all digits and the value of each seed; scores × 100, as papers have."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    axes = list(dict.fromkeys(axis for row in data.rows for axis in row.values))
    names = ["row", *axes, "column", "mean", "std", "n", "difference", "differs", "values"]
    writer.writerow([*names, "paper", "paper_table", "note"])
    for row in data.rows:
        for name, column in [*data.columns.items(), *data.more.items(), *data.papers.items()]:
            measured, first = row.measured(name), data.rows[0].measured(name)
            paper, table = data.spec.paper_value(row.parts, column)
            known = measured is not None and first is not None and data.is_compared
            scale = 1 if name in data.more else 100
            writer.writerow(
                [
                    row.label,
                    *(row.values.get(axis, "") for axis in axes),
                    name,
                    _digits(scale, measured.mean if measured else None),
                    _digits(scale, measured.spread if measured else None),
                    len(measured.values) if measured else 0,
                    _digits(scale, measured.mean - first.mean if known else None),  # type: ignore
                    str(measured.differs_from(first)).lower() if known else "",  # type: ignore
                    " ".join(_digits(scale, v) for v in measured.values) if measured else "",
                    "" if paper is None else paper,
                    table or "",
                    row.unavailable or "",
                ]
            )
    return file.getvalue()


def print_table(data: TableData) -> None:
    """The table in the terminal."""
    table = RichTable(title=data.spec.title, title_justify="left", header_style="bold")
    for number, name in enumerate(headings(data)):
        table.add_column(name, justify="right" if number else "left")
    for row in entries(data):
        table.add_row(*(f"{t.plain}{f' [bold]{t.bold}[/bold]' if t.bold else ''}" for t in row))
    console = Console(width=max(Console().width, 120))
    console.print(table)
    for text in footer(data):
        console.print(text, markup=False, soft_wrap=True)


# By the ending of the file.
FORMATS: dict[str, Callable[[TableData], str]] = {
    "md": markdown,
    "tex": latex,
    "csv": comma_separated,
}


def _measured(data: TableData, row: Row, name: str) -> Text:
    if row.unavailable is not None:
        return Text("unavailable")
    measured = row.measured(name)
    if measured is None:
        return Text("-")
    if name in data.more:
        return Text(_size(name, measured.mean))
    text = f"{100 * measured.mean:.1f}"
    if measured.spread is not None:
        text += f" ± {100 * measured.spread:.1f}"
    first = data.rows[0].measured(name)
    if row is data.rows[0] or first is None or not data.is_compared:
        return Text(text)
    return _with_difference(text, measured, first)


def _with_difference(text: str, measured: Measured, first: Measured) -> Text:
    difference = f"({100 * (measured.mean - first.mean):+.1f})"
    if measured.differs_from(first):
        return Text(text, difference)
    return Text(f"{text} {difference}")


def _digits(scale: int, value: float | None) -> str:
    return "" if value is None else f"{scale * value:.10g}"


def _size(name: str, value: float) -> str:
    return f"{value / 1e6:.1f}M" if name == "parameters" else f"×{value:.1f}"


def _paper(data: TableData, row: Row, column: Named) -> str:
    value, table = data.spec.paper_value(row.parts, column)
    if value is None:
        return "-"
    first, first_table = data.spec.paper_value(data.rows[0].parts, column)
    is_number = isinstance(value, (int, float)) and isinstance(first, (int, float))
    if row is data.rows[0] or not is_number or table != first_table:
        return str(value)
    assert isinstance(value, (int, float)) and isinstance(first, (int, float))
    return f"{value} ({value - first:+.1f})"


def _in_paper(data: TableData, column: Named) -> bool:
    return any(data.spec.paper_value(row.parts, column)[0] is not None for row in data.rows)


def _source(table: str) -> str:
    return table if paper_table(table)["confirmed"] else f"{table} (read off the figure)"


def _escape(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


def _number(text: str) -> str:
    """With the sign of a difference as a minus, not a hyphen."""
    return _escape(text).replace("(-", "($-$")


_LATEX = {sign: f"\\{sign}" for sign in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    "×": r"$\times$",
}


@dataclass(frozen=True)
class Asked:
    """A sweep as a command line names it.

    Attributes:
        name: Of the sweep or the record.
        outputs: The folder of all runs.
        record: Of the sweep.
        runs: Those in the folder.
        uri: Of MLflow.
        spec_file: What its table shows, where that is not the sweep's own.
        allow_mixed: Whether cells may be in the table that should not stand in one.
        without: SETTING=VALUE whose cells are left out.
    """

    name: str
    outputs: Path
    record: SweepRecord
    runs: Runs
    uri: str | None
    spec_file: Path | None = None
    allow_mixed: bool = False
    without: Sequence[str] = ()

    def spec(self) -> TableSpec:
        """What its table shows.

        Raises:
            ExperimentError: The file is not there, or not what it should be.
        """
        return read_spec(self.spec_file or spec_of(self.record.sweep))

    def collect(self) -> TableData:
        """The cells as rows.

        Raises:
            ExperimentError: There is no spec, or the cells cannot stand in a table.
        """
        return collect(self.record, self.spec(), self.runs, self.allow_mixed, self.without)


def parser_of(program: str, description: str | None) -> argparse.ArgumentParser:
    """What the command lines of tables, figures and reports have in common."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("name", help="of the sweep, or of one of its records in outputs/sweeps")
    parser.add_argument("--outputs", type=Path, default=REPOSITORY / "outputs")
    parser.add_argument("--spec", type=Path, help="another spec than sweeps/NAME.table")
    parser.add_argument(
        "--allow-mixed", action="store_true", help="whatever the cells are, and say so"
    )
    parser.add_argument(
        "--tracking-uri", help="of MLflow, where it has a password, which is not kept"
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="leaves these cells out, and says so; may be given again",
    )
    return parser


def find_asked(given: argparse.Namespace) -> Asked:
    """The sweep that the arguments name.

    Raises:
        ExperimentError: There is none.
    """
    outputs = given.outputs.absolute()
    runs = Runs(outputs)
    record, *others = find_records(outputs, given.name, runs)
    if others:
        names = ", ".join(f"{r.name} ({runs.count(r.cells)})" for r in others)
        print(f"of {record.name}; there are also {names}")
    uri = moved_store(given.tracking_uri or record.uri or "", outputs) or None
    return Asked(
        given.name, outputs, record, runs, uri, given.spec, given.allow_mixed, given.without
    )


def moved_store(uri: str, outputs: Path) -> str:
    """MLflow's store; that in the folder of all runs where the folder was moved."""
    store, own = sqlite_file(uri), outputs / "mlflow.db"
    is_moved = store is not None and not store.exists() and own.exists()
    return f"sqlite:///{own}" if is_moved else uri


def command_line(
    program: str, description: str | None, arguments: list[str] | None
) -> tuple[Asked, TableData]:
    """The sweep and its table; exits where it cannot be had."""
    try:
        asked = find_asked(parser_of(program, description).parse_args(arguments))
        return asked, asked.collect()
    except ExperimentError as error:
        sys.exit(f"error: {error}")


def log_files(
    record: SweepRecord, uri: str | None, files: list[Path], folder: str | None = None
) -> None:
    """Puts them into the MLflow run of the sweep; a store out of reach is said."""
    try:
        tracker = open_tracker(uri, record.run_id)
        for file in files:
            tracker.log_artifact(file, folder)
    except ExperimentError as error:
        print(f"not in MLflow: {error}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    asked, data = command_line("minilm_exp.tables", __doc__, arguments)
    folder = asked.outputs / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for ending, write in FORMATS.items():
        files.append(folder / f"{asked.name}.{ending}")
        files[-1].write_text(write(data), encoding="utf-8")
    print_table(data)
    for file in files:
        print(f"written: {file}")
    log_files(data.record, asked.uri, files, "tables")


if __name__ == "__main__":
    main()
