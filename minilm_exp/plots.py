"""Figures of a run."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

LINES = ("-", "--", "-.", ":")


def loss_curves(history: Callable[[str], list[tuple[int, float]]], terms: list[str]) -> Figure:
    """Loss against step, in training and on held-out text; readable in grey.

    Args:
        history: Steps and values of a metric by its name.
        terms: Names of the terms, and "total".
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, group, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("distill/loss", "distill/validation"),
        ("training", "held-out text"),
    ):
        for number, term in enumerate(terms):
            points = history(f"{group}/{term}")
            axes.plot(
                [step for step, _ in points],
                [value for _, value in points],
                linestyle=LINES[number % len(LINES)],
                linewidth=2.5 if term == "total" else 1.2,
                color="black" if term == "total" else None,
                marker="." if len(points) < 20 else None,
                label=term,
            )
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss")
    figure.axes[0].legend()
    return figure
