"""The report of a sweep: its table and figure, the losses of its cells, and where each was run."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import yaml

from minilm_exp.errors import ExperimentError
from minilm_exp.figures import draw
from minilm_exp.plots import History, loss_panels, svg
from minilm_exp.report_page import (
    REPORT,
    Block,
    Details,
    Drawing,
    Entry,
    Examples,
    Page,
    Section,
    Table,
    Text,
    Words,
    write_page,
)
from minilm_exp.result import Result
from minilm_exp.result_table import ROLES, scored_tasks
from minilm_exp.sweep_record import Cell, Runs, SweepRecord, record_folder
from minilm_exp.table_data import TableData, in_order
from minilm_exp.tables import Asked, entries, footer, headings
from minilm_exp.tracking import open_tracker

# Cells whose losses can be told apart in one figure.
_MOST_CURVES = 8


def write_sweep_report(asked: Asked) -> Path:
    """Writes report.html into the folder of the sweep's name beside its record."""
    record, runs = asked.record, asked.runs
    file = record_folder(asked.outputs) / record.name / REPORT
    data: TableData | None = None
    title, refusal = record.sweep, ""
    try:
        title = asked.spec().title
        data = asked.collect()
    except ExperimentError as error:
        refusal = str(error)
    found = {cell.name: result for cell in record.cells if (result := runs.result(cell))}
    page = Page(
        title,
        f"sweep {record.name}: {runs.count(record.cells)} are finished",
        _warnings(record, list(found.values()), refusal, data),
        [
            Section("What was asked", _asked(record, list(found.values()))),
            Section("Table", [Words(refusal)] if data is None else _table(data)),
            Section("Figure", _figure(data, asked.uri)),
            Section("Losses", _losses(record, runs, asked.uri)),
            Section("Runs", _runs(record, runs, file.parent)),
            Section("Settings and versions", _provenance(list(found.values()), asked.uri)),
        ],
    )
    write_page(page, file)
    return file


def _warnings(
    record: SweepRecord, results: list[Result], refusal: str, data: TableData | None
) -> list[str]:
    found = []
    if any(not result.meaningful for result in results):
        found.append("NOT MEANINGFUL: the teacher had random weights.")
    failed = sum(cell.error is not None for cell in record.cells)
    if failed:
        found.append(f"FAILED: {failed} of {len(record.cells)} cells, for the reasons below.")
    if refusal:
        found.append("NO TABLE: its cells should not stand in one, for the reasons below.")
    if data is not None and data.problems:
        found.append("MIXED OR INCOMPLETE: for the reasons below the table.")
    return found


def _asked(record: SweepRecord, results: list[Result]) -> list[Block]:
    commands = "\n".join(shlex.join(["python", *words]) for words in record.commands)
    blocks: list[Block] = [Words(commands)]
    values: dict[str, dict[str, None]] = {}
    for cell in record.cells:
        for name, value in cell.values.items():
            values.setdefault(name, {})[value] = None
    varied = [[name, ", ".join(known)] for name, known in values.items()]
    blocks.append(Table(["setting", "values"], varied, "What is varied", False))
    chosen = [result.asked["groups"] for result in results if "groups" in result.asked]
    if chosen:
        groups = sorted((name, str(option)) for name, option in _common(chosen).items())
        blocks += [Text("Options of the groups, in all finished cells:"), Examples([([], groups)])]
    return blocks


def _table(data: TableData) -> list[Block]:
    rows = [[Entry(t.plain, t.bold) for t in row] for row in entries(data)]
    return [Table(headings(data), rows, data.spec.title), *map(Text, footer(data))]


def _figure(data: TableData | None, uri: str | None) -> list[Block]:
    if data is None:
        return [Text("None: it is drawn of the table.")]
    try:
        figure = draw(data, uri)
    except ExperimentError as error:
        return [Text(f"None: {error}.")]
    return [Drawing([svg(figure, "figure")], data.spec.title)]


def _losses(record: SweepRecord, runs: Runs, uri: str | None) -> list[Block]:
    seeds = in_order({c.values["seed"] for c in record.cells if runs.result(c) is not None})
    if not seeds:
        return [Text("None: no cell is finished.")]
    cells = [cell for cell in record.cells if cell.values["seed"] == seeds[0]]
    histories: dict[str, tuple[History, str]] = {}
    try:
        for cell in cells:
            result = runs.result(cell)
            if result is not None and result.validation_losses and not result.stages:
                history = open_tracker(uri, result.run_id).history
                histories[_without_seed(cell)] = (history, "total")
    except ExperimentError as error:
        return [Text(f"None: {error}.")]
    if not histories:
        return [Text("None: no cell distils on a corpus in one stage.")]
    if len(histories) > _MOST_CURVES:
        return [Text(f"None: {len(histories)} curves cannot be told apart; each run has its own.")]
    panels = loss_panels(histories, "loss of all its terms")
    return [
        Drawing(
            [svg(panel, f"losses-{number}") for number, panel in enumerate(panels)],
            f"Loss of all terms by optimiser step, of the cells of seed {seeds[0]}. Only losses of"
            " the same terms compare.",
        )
    ]


def _without_seed(cell: Cell) -> str:
    values = [f"{name}={value}" for name, value in cell.values.items() if name != "seed"]
    return " ".join(values) or cell.name


def _runs(record: SweepRecord, runs: Runs, page: Path) -> list[Block]:
    """Every cell, with a link to its report, and why others failed."""
    found = [runs.result(cell) for cell in record.cells]
    results = [result for result in found if result is not None]
    tasks = dict.fromkeys(task for result in results for task in scored_tasks(result))
    columns = [
        (task, role)
        for task in tasks
        for role in ROLES
        if any(task in result.scores_of(role) for result in results)
    ]
    rows = []
    for cell, result in zip(record.cells, found):
        row = [_link(cell, result, page), _state(cell, runs)]
        loss = None if result is None else result.validation_loss
        row.append(Entry("" if loss is None else f"{loss:.4f}"))
        for task, role in columns:
            score = None if result is None else result.scores_of(role).get(task)
            row.append(Entry("" if score is None else f"{score:.3f}"))
        rows.append(row)
    names = [f"{task}, {ROLES[role]}" for task, role in columns]
    blocks: list[Block] = [
        Table(["cell", "state", "validation loss", *names], rows, "Each run by itself")
    ]
    blocks += [
        Text(f"Failed: {cell.name}: {cell.error}", is_warning=True)
        for cell in record.cells
        if cell.error is not None
    ]
    return blocks


def _link(cell: Cell, result: Result | None, page: Path) -> Entry:
    if result is None:
        return Entry(cell.name)
    report = Path(result.folder) / REPORT
    return Entry(cell.name, to=os.path.relpath(report, page) if report.is_file() else "")


def _state(cell: Cell, runs: Runs) -> Entry:
    if runs.standing(cell):
        return Entry("finished")
    return Entry("failed" if cell.error is not None else "not finished")


def _provenance(results: list[Result], uri: str | None) -> list[Block]:
    """What the runs were made by; several values where they differ."""
    known: dict[str, dict[str, None]] = {}
    for result in results:
        for name, value in result.made_by.items():
            if value:
                known.setdefault(name.replace("_", " "), {})[value] = None
        try:
            tags = open_tracker(uri, result.run_id).tags()
        except ExperimentError:
            tags = {}  # without MLflow's store nobody knows the versions
        for name, value in sorted(tags.items()):
            if name.startswith("version."):
                known.setdefault(name.removeprefix("version."), {})[value] = None
    if not results:
        return [Text("No cell is finished.")]
    rows = [[name, ", ".join(values)] for name, values in known.items()]
    blocks: list[Block] = [Table(["", ""], rows, "Of all finished cells", has_numbers=False)]
    configs = [config for result in results if (config := _config(result)) is not None]
    if configs:
        shared = yaml.safe_dump(_common(configs), sort_keys=False)
        blocks.append(Details("Settings that all finished cells have in common", [Words(shared)]))
    return blocks


def _config(result: Result) -> dict[str, Any] | None:
    try:
        content = yaml.safe_load((Path(result.folder) / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def _common(contents: list[dict[str, Any]]) -> dict[str, Any]:
    """What is the same in all of them, group by group."""
    shared: dict[str, Any] = {}
    for name, value in contents[0].items():
        others = [content.get(name) for content in contents]
        if all(isinstance(other, dict) for other in others):
            inner = _common([other for other in others if isinstance(other, dict)])
            if inner or not value:
                shared[name] = inner
        elif all(other == value for other in others):
            shared[name] = value
    return shared
