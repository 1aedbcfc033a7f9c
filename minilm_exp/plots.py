"""Figures of a run."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

_LINES = ("-", "--", "-.", ":")


def loss_curves(history: Callable[[str], list[tuple[int, float]]], relations: list[str]) -> Figure:
    """Relation loss against step, in training and on held-out text; readable in grey.

    Args:
        history: Steps and values of a metric by its name.
        relations: Names of the relations, and "total".
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, group, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("distill/loss", "distill/validation"),
        ("training", "held-out text"),
    ):
        for number, relation in enumerate(relations):
            points = history(f"{group}/{relation}")
            axes.plot(
                [step for step, _ in points],
                [value for _, value in points],
                linestyle=_LINES[number % len(_LINES)],
                linewidth=2.5 if relation == "total" else 1.2,
                color="black" if relation == "total" else None,
                marker="." if len(points) < 20 else None,
                label=relation,
            )
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss")
    figure.axes[0].legend()
    return figure
