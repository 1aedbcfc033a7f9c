"""Figures of runs."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure

LINES = ("-", "--", "-.", ":")
MARKS = "osD^vPX*"
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# No XML may have them.
_CONTROLS = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)


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


def cell_curves(histories: dict[str, Callable[[str], list[tuple[int, float]]]]) -> Figure:
    """Whole losses of several runs against step, in training and on held-out text.

    Args:
        histories: By the name of a run, steps and values of a metric by its name.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, group, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("distill/loss", "distill/validation"),
        ("training", "held-out text"),
    ):
        for number, (name, history) in enumerate(histories.items()):
            points = history(f"{group}/total")
            axes.plot(
                [step for step, _ in points],
                [value for _, value in points],
                linestyle=LINES[number % len(LINES)],
                marker="." if len(points) < 20 else None,
                label=name,
            )
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss of all its terms")
    figure.axes[0].legend(fontsize="small")
    return figure


@dataclass(frozen=True)
class Point:
    """A model in `speed_and_quality`; None is what was not measured."""

    name: str
    speedup: float | None
    score: float | None


def speed_and_quality(points: list[Point], baseline: str, score: str) -> Figure:
    """Scores against speedup; a model without one of the two is a line.

    Args:
        points: The models.
        baseline: What the speedup is over.
        score: What the score is.
    """
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, point in enumerate(points):
        style: dict[str, Any] = {"color": f"C{number}", "label": point.name}
        if point.speedup is not None and point.score is not None:
            mark = MARKS[number % len(MARKS)]
            axes.plot([point.speedup], [point.score], linestyle="none", marker=mark, ms=9, **style)
        elif point.score is not None:
            axes.axhline(point.score, linestyle="--", **style)
        elif point.speedup is not None:
            axes.axvline(point.speedup, linestyle=":", **style)
    axes.set_xlim(left=0)
    axes.margins(x=0.2, y=0.2)
    axes.set_xlabel(f"speedup over {baseline} (times as fast)")
    axes.set_ylabel(score)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element that can stand in a page beside others.

    Its text is text, which the browser's fonts draw in any script.

    Args:
        figure: The figure.
        name: Of it in the page, where every id begins with it.
    """
    for axes in figure.axes:
        legend = axes.get_legend()
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label]
        for text in [*texts, *(legend.get_texts() if legend is not None else [])]:
            text.set_parse_math(False)  # a name may have a $ in it
    file = io.StringIO()
    with warnings.catch_warnings(), rc_context({"svg.fonttype": "none"}):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="svg", transparent=True)
    root = ElementTree.fromstring(_CONTROLS.sub("", file.getvalue()))
    for unwanted in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(unwanted)
    for element in root.iter():
        for attribute, value in element.attrib.items():
            if attribute == "id":
                element.set(attribute, f"{name}-{value}")
            elif attribute == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.set(attribute, f"#{name}-{value[1:]}")
            else:
                element.set(attribute, value.replace("url(#", f"url(#{name}-"))
    return ElementTree.tostring(root, encoding="unicode")
