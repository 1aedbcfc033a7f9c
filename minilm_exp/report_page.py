"""One self-contained HTML page made of headings, texts, tables and figures.

It fetches nothing and runs no script. Every text is escaped and redacted as it is put in, and
stands in an element of its own for its writing direction, so that foreign text cannot reorder the
rest.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from minilm_exp.redaction import redact

REPORT = "report.html"
_LONGEST = 400
# Neither HTML nor a reader has a use for them.
_CONTROLS = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Entry:
    """What stands in a table: a text, maybe with a bold one behind it, maybe a link.

    Attributes:
        text: The text.
        bold: Behind it.
        to: A file that it links to, as a path relative to the page's folder.
    """

    text: str
    bold: str = ""
    to: str = ""

    @property
    def href(self) -> str:
        """As an address."""
        return quote(redact(self.to))


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning stands out."""

    text: str
    is_warning: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Words:
    """Text whose lines stay as they are."""

    text: str
    kind: ClassVar[str] = "words"


@dataclass(frozen=True)
class Table:
    """Rows of texts; all but the first of a row are numbers, unless it says otherwise."""

    headings: Sequence[str]
    rows: Iterable[Sequence[str | Entry]]
    caption: str = ""
    has_numbers: bool = True
    kind: ClassVar[str] = "table"

    @property
    def entries(self) -> list[list[Entry]]:
        """The rows, all of one kind."""
        return [[Entry(e) if isinstance(e, str) else e for e in row] for row in self.rows]


@dataclass(frozen=True)
class Drawing:
    """Figures side by side.

    Attributes:
        svgs: From `plots.svg`.
        caption: What they show, with units; their text alternative too.
    """

    svgs: list[str]
    caption: str
    kind: ClassVar[str] = "drawing"

    @property
    def markups(self) -> list[Markup]:
        """As they go into the page."""
        return [Markup(redact(svg)) for svg in self.svgs]


@dataclass(frozen=True)
class Maps:
    """Heat maps side by side, on one colour scale.

    Attributes:
        title: What they show.
        caption: Below them.
        labels: Of the rows from above, and of the columns from the left.
        images: Data URIs of pictures by name.
    """

    title: str
    caption: str
    labels: list[str]
    images: dict[str, str]
    kind: ClassVar[str] = "maps"


@dataclass(frozen=True)
class Examples:
    """Texts, each with what is said of them by name."""

    examples: list[tuple[list[str], list[tuple[str, str]]]]
    kind: ClassVar[str] = "examples"


@dataclass(frozen=True)
class Details:
    """What is folded up."""

    summary: str
    blocks: list[Block]
    kind: ClassVar[str] = "details"


Block = Text | Words | Table | Drawing | Maps | Examples | Details


@dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: Its heading.
        subtitle: Below it.
        warnings: What a reader must know before the numbers.
        sections: In their order.
    """

    title: str
    subtitle: str
    warnings: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as HTML."""
    return _environment().get_template("report.html.jinja").render(page=page)


def write_page(page: Page, file: Path) -> None:
    """Writes it, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(render(page), encoding="utf-8")
    partial.replace(file)


def shorten(text: str) -> str:
    """Long text cut off."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} …"


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _clean(value: Any) -> Any:
    """What every expression of the template goes through before it is escaped."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return _CONTROLS.sub("\ufffd", redact(value))
    return value
