"""The report of one run: what was asked, what it gave, and how teacher and student compare."""

from __future__ import annotations

import base64
import io
import statistics
from pathlib import Path
from typing import Any

from matplotlib.image import imsave
from torch import Tensor

from minilm_exp.disagreement import NUM_EXAMPLES, disagreements
from minilm_exp.errors import ExperimentError
from minilm_exp.heat_maps import heat_maps
from minilm_exp.model_card import export_rows
from minilm_exp.plots import History, Point, loss_panels, speed_and_quality, svg
from minilm_exp.report_page import (
    REPORT,
    Block,
    Details,
    Drawing,
    Examples,
    Maps,
    Page,
    Section,
    Table,
    Text,
    Words,
    shorten,
    write_page,
)
from minilm_exp.result import Result
from minilm_exp.result_table import model_rows, scored_tasks, search_rows
from minilm_exp.settings import Settings
from minilm_exp.tracking import Tracker, open_tracker

# Relations that are drawn; of objectives with more, a table has all.
_MOST_MAPS = 9
_PIXELS = 8
_COLOURS = "viridis"


def write_run_report(settings: Settings, result: Result, tracker: Tracker | None) -> Path:
    """Writes report.html into the run folder.

    Args:
        settings: The run.
        result: Of it.
        tracker: Of its MLflow run, which has the losses; None where that is gone.
    """
    student = settings.student_name if settings.recipe.name != "finetune" else None
    about = [f"recipe {settings.recipe.name}", f"seed {settings.seed}"]
    if result.elapsed_seconds is not None:
        about.append(f"{result.elapsed_seconds / 60:.1f} minutes")
    page = Page(
        f"{student} distilled from {settings.teacher.name}" if student else "Fine-tuned models",
        ", ".join(about),
        _warnings(result),
        [
            Section("What was asked", _asked(settings, result)),
            Section("Result", _result(settings, result)),
            Section("Speed and quality", _speed(settings, result)),
            Section("Loss", _losses(settings, result, tracker)),
            Section("Attention relations", _relations(settings, result)),
            Section("Where teacher and student disagree", _disagreements(settings, result)),
            Section("Settings and versions", _provenance(result, tracker)),
        ],
    )
    file = Path(result.folder) / REPORT
    write_page(page, file)
    return file


def _warnings(result: Result) -> list[str]:
    found = []
    if result.status == "RUNNING":
        found.append("NOT FINISHED: what is here may be a part of the run.")
    elif result.status != "FINISHED":
        found.append(f"{result.status}: {result.error or 'no reason is known'}")
    if not result.meaningful:
        found.append("NOT MEANINGFUL: the teacher had random weights.")
    if result.made_by.get("git_dirty") == "true":
        found.append("Made by a tree with uncommitted changes.")
    return found


def _asked(settings: Settings, result: Result) -> list[Block]:
    overrides, groups = result.asked.get("overrides"), result.asked.get("groups")
    if overrides is None or groups is None:
        return [Text("The command line is not known."), *map(Text, settings.notes)]
    words: list[Block] = [Words("\n".join(overrides))] if overrides else []
    return [
        Text("Overrides on the command line:" if overrides else "The defaults, without overrides."),
        *words,
        Text("Options of the groups:"),
        Examples([([], sorted((name, str(option)) for name, option in groups.items()))]),
        *map(Text, settings.notes),
    ]


def _result(settings: Settings, result: Result) -> list[Block]:
    headings, rows = model_rows(settings, result)
    said = []
    if any(result.spreads.values()):
        said.append(f"Mean ± standard deviation over {result.num_seeds} fine-tuning seeds.")
    if result.speedup is not None:
        said.append(f"Speedup over {result.baseline}.")
    said += [f"{task}: {settings.tasks[task].score}." for task in scored_tasks(result)]
    blocks: list[Block] = [Table(headings, rows, " ".join(said))]
    if not scored_tasks(result):
        blocks.append(Text("No model was scored on a task."))
    if result.validation_losses:
        losses = [[name, f"{loss:.4f}"] for name, loss in result.validation_losses.items()]
        table = Table(["term", "loss"], losses, "After the last step, on held-out text")
        blocks.append(Details("Validation loss by term", [table]))
    for role, grids in result.grids.items():
        for task, cells in grids.items():
            table = Table(*search_rows(settings.tasks[task].selected_by, cells))
            blocks.append(Details(f"Search: {role} on {task}", [table]))
    if result.candidates:
        blocks.append(_table_of(result.candidates, "Shapes that the budget chose from"))
    return blocks


def _speed(settings: Settings, result: Result) -> list[Block]:
    blocks: list[Block] = []
    points = _points(settings, result)
    tasks = scored_tasks(result)
    if result.speedup is None:
        blocks.append(Text("No speed was measured."))
    elif not tasks:
        blocks.append(Text("No figure: without a task there is no score to draw."))
    else:
        score = f"score on {tasks[0]}" if len(tasks) == 1 else f"mean score of {len(tasks)} tasks"
        figure = speed_and_quality(points, str(result.baseline), score)
        blocks.append(
            Drawing(
                [svg(figure, "speed")],
                f"Speedup over {result.baseline} and {score}. A line is a model of which only one"
                " of the two was measured.",
            )
        )
    if result.exports:
        for name, measured in result.exports.items():
            headings, *rows = export_rows(measured)
            title = f"Exports: {name}, on a CPU with {measured['threads']} threads"
            blocks.append(Table(headings, rows, title))
    return blocks


def _points(settings: Settings, result: Result) -> list[Point]:
    """Of every model and export."""
    is_over_teacher = settings.baseline.name == "teacher"
    # The student before it was distilled has its speed.
    speeds = {"student": result.speedup, "undistilled": result.speedup}
    speeds["teacher"] = 1.0 if is_over_teacher else None
    if "student" not in result.parameters:
        speeds["teacher"] = result.speedup
    points = [
        Point(name, speeds[role], _mean(result.scores_of(role)))
        for role, name in _NAMES.items()
        if result.scores_of(role)
    ]
    if not is_over_teacher:
        points.append(Point(f"baseline {result.baseline}", 1.0, None))
        return points
    if settings.runtime.device != "cpu":
        return points  # exports are timed on the CPU
    for measured in result.exports.values():
        for name, facts in measured["models"].items():
            scores = {
                task: metrics[settings.tasks[task].score]
                for task, metrics in facts["scores"].items()
            }
            speed = facts["speedup"].get(str(settings.baseline.batch_size))
            if name not in _NAMES and speed and [*scores] == scored_tasks(result):
                points.append(Point(name, speed, _mean(scores)))
    return points


_NAMES = {"teacher": "teacher", "student": "student", "undistilled": "not distilled"}


def _mean(scores: dict[str, float]) -> float:
    return statistics.fmean(scores.values())


def _losses(settings: Settings, result: Result, tracker: Tracker | None) -> list[Block]:
    if settings.recipe.name == "finetune" or not settings.corpus_stages:
        return [Text("None: nothing was distilled on a corpus.")]
    if tracker is None:
        return [Text("None: MLflow's store, which has them, is out of reach or has lost this run.")]
    if not settings.stages:
        history, terms = tracker.history, list(result.validation_losses)
        return [_curves("loss", "Loss", history, terms)]
    blocks: list[Block] = []
    for number, stage in enumerate(settings.corpus_stages):
        losses = result.stages.get(stage.name)
        if losses is None and stage.name == settings.origin.name:
            losses = result.validation_losses
        try:
            file = Path(result.folder) / "stages" / stage.name / "run_id"
            run_id = file.read_text("utf-8") if file.is_file() else None
            is_single = len(settings.chain) == 1
            of_stage = tracker if is_single else open_tracker(settings.tracking.uri, run_id)
            title = f"Stage {stage.name}: loss"
            blocks.append(_curves(f"loss{number}", title, of_stage.history, list(losses or ())))
        except ExperimentError as error:
            blocks.append(Text(f"Stage {stage.name}: {error}"))
    return blocks


def _curves(name: str, title: str, history: History, terms: list[str]) -> Block:
    if not terms:
        return Text(f"{title}: the distillation has not ended.")
    panels = loss_panels({term: (history, term) for term in terms}, "loss")
    return Drawing(
        [svg(panel, f"{name}-{number}") for number, panel in enumerate(panels)],
        f"{title} of each term, without its weight, and of all together (total), in nats for"
        " relations, by optimiser step; in training and on held-out text.",
    )


def _relations(settings: Settings, result: Result) -> list[Block]:
    try:
        found = heat_maps(settings, result)
    except ExperimentError as error:
        return [Text(f"None: {error}.")]
    blocks: list[Block] = [
        Text(
            "Of one sentence of the held-out text. A row shows how much of the relation of its"
            f" token falls on each token of the column, the mean over relation heads. Teacher:"
            f" {found.teacher}."
        )
    ]
    for one in found.compared[:_MOST_MAPS]:
        highest = float(max(one.teacher.max(), one.student.max()))
        blocks.append(
            Maps(
                f"{_pair(one.pair)}, {one.num_relation_heads} relation heads: KL"
                f" {one.divergence:.4f} nats",
                f"Colours from 0 (dark) to {highest:.2f} (light) in both. The largest difference"
                f" of the two is {one.difference:.2f}.",
                found.tokens,
                {
                    f"teacher, layer {one.teacher_layer}": _picture(one.teacher, highest),
                    f"student, layer {one.student_layer}": _picture(one.student, highest),
                },
            )
        )
    if len(found.compared) > _MOST_MAPS:
        rows = [
            [_pair(one.pair), f"{one.teacher_layer}", f"{one.student_layer}",
             f"{one.divergence:.4f}", f"{one.difference:.2f}"]
            for one in found.compared
        ]  # fmt: skip
        headings = ["relation", "teacher layer", "student layer", "KL (nats)", "largest difference"]
        caption = f"All {len(rows)} relations, of which the first {_MOST_MAPS} are drawn"
        blocks.append(Table(headings, rows, caption))
    return blocks


def _pair(pair: tuple[str, str]) -> str:
    return "-".join(name[0].upper() for name in pair)


def _picture(map_SS: Tensor, highest: float) -> str:
    """A PNG with squares for numbers, so that every browser keeps their edges."""
    squares = map_SS.repeat_interleave(_PIXELS, 0).repeat_interleave(_PIXELS, 1).numpy()
    file = io.BytesIO()
    imsave(file, squares, vmin=0, vmax=highest, cmap=_COLOURS, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _disagreements(settings: Settings, result: Result) -> list[Block]:
    if not settings.tasks:
        return [Text("No task was asked for.")]
    blocks: list[Block] = []
    for task in settings.tasks:
        try:
            found = disagreements(settings, result, task)
        except ExperimentError as error:
            blocks.append(Text(f"{task}: not compared, {error}."))
            continue
        for one in found:
            title = f"{task}, {one.part}" if one.part else task
            total = sum(one.counts.values())
            rows = [[n, f"{v}", f"{v / max(total, 1):.1%}"] for n, v in one.counts.items()]
            caption = f"{title}: validation examples, fine-tuned with seed {one.seed}"
            blocks.append(Table(["", "examples", "share"], rows, caption))
            if not one.examples:
                blocks.append(Text(f"{title}: the two say the same of every example."))
                continue
            shown = [
                ([shorten(t) for t in e.texts], [(n, shorten(v)) for n, v in e.facts])
                for e in one.examples
            ]
            which = f"up to {NUM_EXAMPLES} on which they differ"
            if settings.tasks[task].kind in ("regression", "similarity"):
                which = f"the {len(shown)} with the largest differences"
            blocks.append(Details(f"{title}: {which}", [Examples(shown)]))
    return blocks


def _provenance(result: Result, tracker: Tracker | None) -> list[Block]:
    rows = [
        ["run folder", Path(result.folder).name],
        ["run key", result.run_key],
        ["MLflow run", result.run_id],
        *([name.replace("_", " "), value] for name, value in result.made_by.items() if value),
    ]
    tags = tracker.tags() if tracker is not None else {}
    for name, value in sorted(tags.items()):
        if name.startswith("version."):
            rows.append([name.removeprefix("version."), value])
    blocks: list[Block] = [Table(["", ""], rows, has_numbers=False)]
    try:
        config = (Path(result.folder) / "config.yaml").read_text("utf-8")
        blocks.append(Details("All settings (config.yaml)", [Words(config)]))
    except OSError:
        blocks.append(Text("Its config.yaml is gone."))
    return blocks


def _table_of(rows: list[dict[str, Any]], caption: str) -> Table:
    """A table of what was measured by name; what a row lacks stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = [[_value(row.get(name)) for name in names] for row in rows]
    return Table([name.replace("_", " ") for name in names], texts, caption)


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    return str(value)
