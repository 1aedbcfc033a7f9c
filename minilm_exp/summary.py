"""The closing table of a run."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.table import Table

from minilm_exp.result import Result
from minilm_exp.settings import Settings


def print_summary(settings: Settings, result: Result) -> None:
    """Teacher, student and the same student not distilled, as measured in this run."""
    console = Console(width=max(Console().width, 110), markup=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model")
    for heading in ("layers x hidden", "params (no emb.)", "speedup", "relation loss"):
        table.add_column(heading, justify="right")
    tasks = list(result.scores)
    for task in tasks:
        table.add_column(task, justify="right")
    teacher, student = settings.teacher, settings.student
    student_shape = f"{student.num_layers} x {student.hidden_size}"
    student_size = _size(result.num_parameters, result.num_layer_parameters)
    speedup = f"x{result.speedup:.1f}" if result.speedup is not None else "-"
    loss = result.validation_relation_loss
    rows = [
        (
            f"teacher  {teacher.name}",
            f"{teacher.num_layers} x {teacher.hidden_size}",
            _size(result.teacher_num_parameters, result.teacher_num_layer_parameters),
            "x1.0",
            "-",
            result.teacher_scores,
        ),
        (
            "student  distilled",
            student_shape,
            student_size,
            speedup,
            f"{loss:.4f}" if loss is not None else "-",
            result.scores,
        ),
    ]
    if tasks:
        rows.append(
            (
                "student  same, not distilled",
                student_shape,
                student_size,
                speedup,
                "-",
                result.undistilled_scores,
            )
        )
    for *cells, scores in rows:
        table.add_row(*cells, *(f"{scores[t]:.3f}" if t in scores else "-" for t in tasks))
    console.print()
    console.print(table)
    if not result.meaningful:
        console.print("not meaningful: the teacher had random weights (teacher.weights=random)")
    console.print(f"\nrun folder  {result.folder}", soft_wrap=True)
    console.print(f"MLflow run  {result.run_id}", soft_wrap=True)
    if settings.tracking.uri.startswith("sqlite:"):
        console.print(
            f"compare     mlflow ui --backend-store-uri {settings.tracking.uri}", soft_wrap=True
        )


def print_comparison(outcomes: list[tuple[list[str], Result]]) -> None:
    """The runs of a multirun, those that differ by their seed alone in one row.

    Args:
        outcomes: Finished runs, each with the settings that were asked for on the command line.
    """
    common = set.intersection(*(set(overrides) for overrides, _ in outcomes))
    groups: dict[str, list[Result]] = {}
    for overrides, result in outcomes:
        differing = [o for o in overrides if o not in common and not o.startswith("seed=")]
        groups.setdefault(" ".join(differing), []).append(result)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run")
    tasks = list(dict.fromkeys(task for _, result in outcomes for task in result.scores))
    for heading in ("seeds", "relation loss", *(f"{t}{s}" for t in tasks for s in _ROLES)):
        table.add_column(heading, justify="right")
    for label, results in groups.items():
        cells = [_mean([result.validation_relation_loss for result in results], 4)]
        for task in tasks:
            for role in _ROLES.values():
                cells.append(_mean([getattr(result, role).get(task) for result in results], 3))
        table.add_row(label or "default", str(len(results)), *cells)
    console = Console(width=max(Console().width, 140), markup=False)
    console.print("\nmean ± standard deviation over seeds")
    console.print(table)


_ROLES = {
    " distilled": "scores",
    " not distilled": "undistilled_scores",
    " teacher": "teacher_scores",
}


def _mean(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "-"
    mean = f"{statistics.mean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


def _size(total: int | None, layers: int | None) -> str:
    if total is None or layers is None:
        return "-"
    return f"{total / 1e6:.1f}M ({layers / 1e6:.1f}M)"
