"""Reports as one HTML page that needs nothing else: no network, no files beside it, no scripts."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nnunet_topomae.files import write_file
from nnunet_topomae.reporting.charts import Chart, Style

_MAX_BYTES = 10_000_000
_TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Picture:
    """A picture of pixels.

    Attributes:
        png: the content of a PNG file.
        alt: what it shows, in words.
        caption: below it.
    """

    png: bytes
    alt: str
    caption: str = ""

    @property
    def source(self) -> str:
        """A ``data:`` URL."""
        return f"data:image/png;base64,{b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Charts:
    """Charts that share a legend, side by side where there is room."""

    kind: ClassVar[str] = "charts"
    title: str
    charts: Sequence[Chart]
    legend: Sequence[Style] = ()
    note: str = ""

    @cached_property
    def drawn(self) -> list[tuple[Markup, str]]:
        """The ``<svg>`` element and the text of every chart."""
        return [(Markup(chart.svg), chart.alt) for chart in self.charts]


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side.

    Attributes:
        columns: how many there are in a row; 1 for pictures as wide as the page.
    """

    kind: ClassVar[str] = "pictures"
    title: str
    pictures: Sequence[Picture]
    columns: int = 1
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of every row names it."""

    kind: ClassVar[str] = "table"
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading.

    Attributes:
        blocks: what it shows.
        paragraphs: of plain text, before everything else.
        legend: of its pictures, after the paragraphs.
    """

    title: str
    blocks: Sequence[Charts | Pictures | Table] = ()
    paragraphs: Sequence[str] = ()
    legend: Sequence[Style] = ()


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: heading of the page.
        answers: what it says, a sentence each; a single one is the headline.
        sections: in their order; those that are empty are left out.
        foot: by what it was made.
    """

    title: str
    answers: Sequence[str]
    sections: Sequence[Section]
    foot: str

    def html(self) -> str:
        """The whole page."""
        environment = Environment(
            loader=PackageLoader("nnunet_topomae", "reporting"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        shown = [section for section in self.sections if section.blocks or section.paragraphs]
        return environment.get_template(_TEMPLATE).render(page=self, sections=shown)

    def save(self, file: Path) -> None:
        """Write the page.

        Raises:
            ValueError: if it would have more than 10 MB.
        """
        content = self.html().encode()
        if len(content) > _MAX_BYTES:
            raise ValueError(
                f"{file} would have {len(content) / 1e6:.0f} MB, and more than 10 MB are too much for one page; name "
                "fewer folders"
            )
        write_file(file, lambda stream: stream.write(content))


def plain(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) if value else "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(each)}" for key, each in value.items()) if value else "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
