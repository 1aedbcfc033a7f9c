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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend

LINES = ("-", "--", "-.", ":")
MARKS = "osD^vPX*"
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# Of both figures of losses, and MLflow's names.
_PARTS = {"training": "distill/loss", "held-out text": "distill/validation"}
# Steps and values of a metric by its name.
History = Callable[[str], list[tuple[int, float]]]
# Inches that a narrow screen can show; wider figures scroll there.
_WIDEST = 6
# No XML may have them.
_CONTROLS = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)


def loss_curves(history: History, terms: list[str]) -> Figure:
    """Loss against step, in training and on held-out text; readable in grey.

    Args:
        history: Steps and values of a metric by its name.
        terms: Names of the terms, and "total".
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (title, group) in zip(figure.subplots(1, 2, sharey=True), _PARTS.items()):
        _draw(axes, title, {term: history(f"{group}/{term}") for term in terms})
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("loss")
    figure.axes[0].legend()
    return figure


def loss_panels(histories: dict[str, tuple[History, str]], label: str) -> list[Figure]:
    """The same as a figure for each of the two, with one scale; the curves may be of several runs.

    Args:
        histories: By the name of a curve, the history and the term it has in it.
        label: Of the losses.
    """
    panels = []
    for title, group in _PARTS.items():
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        axes = figure.subplots()
        curves = {name: read(f"{group}/{term}") for name, (read, term) in histories.items()}
        _draw(axes, title, curves)
        axes.set_ylabel(label)
        axes.legend(fontsize="small" if len(curves) < 8 else "xx-small")
        panels.append(figure)
    highest = max(figure.axes[0].get_ylim()[1] for figure in panels)
    for figure in panels:
        figure.axes[0].set_ylim(0, highest)
    return panels


def _draw(axes: Axes, title: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    for number, (name, points) in enumerate(curves.items()):
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            linestyle=LINES[number % len(LINES)],
            linewidth=2.5 if name == "total" else 1.2,
            color="black" if name == "total" else None,
            marker="." if len(points) < 20 else None,
            label=name,
        )
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


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
    figure = Figure(figsize=(5.4, 3.9), layout="constrained")
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
    axes.set_xlim(0, 1.2 * max((point.speedup or 1.0 for point in points), default=1.0))
    axes.margins(y=0.2)
    axes.set_xlabel(f"speedup over {baseline} (times as fast)")
    axes.set_ylabel(score)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=min(3, len(points)))
    return figure


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element that can stand in a page beside others.

    Its text is text, which the browser's fonts draw in any script.

    Args:
        figure: The figure.
        name: Of it in the page, where every id begins with it.
    """
    texts = [text for legend in figure.findobj(Legend) for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
    for text in texts:
        text.set_parse_math(False)  # a name may have a $ in it
    file = io.StringIO()
    with warnings.catch_warnings(), rc_context({"svg.fonttype": "none"}):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="svg", transparent=True)
    root = ElementTree.fromstring(_CONTROLS.sub("", file.getvalue()))
    if figure.get_size_inches()[0] > _WIDEST:
        root.set("class", "large")
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
