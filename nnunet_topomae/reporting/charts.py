"""Charts as SVG for an HTML page: their text and axes have the colour of the page's text, light or dark."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import cycle
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cbook import boxplot_stats
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

_INK = "#010203"  # becomes the colour of the page's text
_COLORS = (  # each has a contrast of at least 3 : 1 with the light and with the dark page
    "#3a86c8", "#d9702b", "#2a9a6b", "#c8507d", "#8a63d2", "#8a8a3a", "#2f9a9f", "#a0694a", "#7d8590",
)  # fmt: skip
_DASHES = ("", "6 2", "2 2", "8 2 2 2")  # colours are not the only difference
_SIZE = (4.2, 2.9)  # inches
_MAX_POINTS = 200  # of a line; longer ones are thinned
_FEW_POINTS = 20  # up to which every point gets a dot
_MAX_TOLD = 8  # lines that the text for screen readers describes
_LABEL_WIDTH = 20  # letters in a line
LOWEST_SKILL = -1.5  # that is drawn if others are higher: early epochs would hide these
_DECADE = 10  # factor from which on a scale is logarithmic
_POINT = 25  # area of a marker
_SETTINGS: dict[Any, Any] = {
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{part}color": _INK for part in ("edge", "label", "title")},
    "axes.facecolor": "none",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "font.size": 10,
    "grid.alpha": 0.2,
    "svg.fonttype": "none",  # text stays text
}


class Style(NamedTuple):
    """How a row or a run is drawn in all charts.

    Attributes:
        label: what the legend says.
        color: for instance ``#3a86c8``.
        dashes: lengths of dashes and gaps, as SVG has them; empty for a solid line.
    """

    label: str
    color: str
    dashes: str = ""


class Line(NamedTuple):
    """Values of one line of a chart, from the first epoch on; NaN where there is none."""

    values: Sequence[float]
    style: Style


class Chart(NamedTuple):
    """A picture that a page shows as it is.

    Attributes:
        svg: the ``<svg>`` element.
        alt: what it shows, in words.
    """

    svg: str
    alt: str


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for every label; the first nine differ in colour, all up to 36 in colour and dashes."""
    dashes = cycle(_DASHES)
    return {
        label: Style(label, color, dash) for label, color, dash in zip(labels, cycle(_COLORS), dashes, strict=False)
    }


def over_time(title: str, lines: Sequence[Line], *, from_zero: bool = False, lowest: float | None = None) -> Chart:
    """A value per epoch.

    Args:
        title: above the chart.
        lines: at least one.
        from_zero: draw a linear scale that begins at 0.
        lowest: see :func:`fit_scale`.
    """

    def draw(axis: Axes) -> None:
        for line in lines:
            values = np.asarray(line.values, dtype=float)
            epochs = np.linspace(0, len(values) - 1, min(len(values), _MAX_POINTS)).round().astype(int)
            marker = "." if len(values) < _FEW_POINTS else None
            axis.plot(epochs, values[epochs], color=line.style.color, linestyle=_dashes(line.style), marker=marker)
        if from_zero:
            axis.set_ylim(bottom=0)
        else:
            fit_scale(axis, [value for line in lines for value in line.values], lowest)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(title=title, xlabel="epoch")

    said = "; ".join(f"{line.style.label}: {_course(line.values)}" for line in lines[:_MAX_TOLD])
    said += f"; and {len(lines) - _MAX_TOLD} more" if len(lines) > _MAX_TOLD else ""
    return _chart(f"{title} by epoch. {said}", draw)


def fit_scale(axis: Axes, values: Sequence[float], lowest: float | None = None) -> None:
    """Make the vertical scale logarithmic where all values are positive and differ by more than a factor of 10.

    Args:
        axis: on which the values have been drawn.
        values: NaN and inf are passed over.
        lowest: where the scale begins if only some values are below it, as these would hide the others.
    """
    finite = [value for value in values if np.isfinite(value)]
    if lowest is not None and finite and min(finite) < lowest < max(finite):
        axis.set_ylim(bottom=lowest)
    elif finite and max(finite) > _DECADE * min(finite) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
        axis.yaxis.set_major_formatter(FuncFormatter(_short))


def over_labels(measure: str, points: Mapping[Style, Mapping[int, Sequence[float]]]) -> Chart:
    """Means over the number of labelled cases, with a small dot for each seed.

    Args:
        measure: name of the vertical axis.
        points: by row, number of labelled cases and seed.
    """
    counts = sorted({count for row in points.values() for count in row})

    def draw(axis: Axes) -> None:
        for style, row in points.items():
            known = sorted(row)
            means = [float(np.mean(row[count])) for count in known]
            axis.plot(known, means, color=style.color, linestyle=_dashes(style), marker="o")
            for count in known:
                axis.scatter([count] * len(row[count]), row[count], _POINT / 3, style.color, alpha=0.6)
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set(xlabel="labelled cases", ylabel=measure)

    rows = (
        f"{style.label}: " + ", ".join(f"{np.mean(row[count]):.3g} with {count}" for count in sorted(row))
        for style, row in points.items()
    )
    return _chart(f"{measure} over the number of labelled cases. {'; '.join(rows)}", draw)


def boxes(title: str, measure: str, values: Mapping[Style, Sequence[float]]) -> Chart:
    """A box and all values of every row: quartiles, whiskers of at most 1.5 times the box, and a dot a case.

    Args:
        title: above the chart.
        measure: name of the horizontal axis.
        values: a value per case, by row.
    """

    def draw(axis: Axes) -> None:
        places = range(len(values), 0, -1)
        for place, (style, row) in zip(places, values.items(), strict=True):
            (box,) = boxplot_stats(row)
            axis.barh(place, box["q3"] - box["q1"], 0.6, box["q1"], fill=False, edgecolor=style.color)
            axis.vlines(box["med"], place - 0.3, place + 0.3, style.color, linewidth=2)
            whiskers = [box["whislo"], box["q3"]], [box["q1"], box["whishi"]]
            axis.hlines([place, place], *whiskers, style.color)
            spread = np.linspace(-0.18, 0.18, len(row)) if len(row) > 1 else [0.0]
            axis.scatter(row, place + np.asarray(spread), _POINT / 3, style.color, alpha=0.6)
        axis.set_yticks(list(places), [fill(style.label, _LABEL_WIDTH) for style in values])
        axis.set_ylim(0.4, len(values) + 0.6)
        axis.set(title=title, xlabel=measure)

    said = "; ".join(f"{s.label}: median {np.median(v):.3g}, {min(v):.3g} to {max(v):.3g}" for s, v in values.items())
    height = 1.0 + 0.55 * len(values)
    return _chart(f"{measure} of all test cases, {title}. {said}", draw, (_SIZE[0], height))


def _chart(alt: str, draw: Callable[[Axes], None], size: tuple[float, float] = _SIZE) -> Chart:
    with _theme(alt):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None})
    return Chart(_embeddable(text.getvalue()), alt)


@contextmanager
def _theme(salt: str) -> Iterator[None]:
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt}):  # no two charts of a page share an id
        yield


def _embeddable(svg: str) -> str:
    """The ``<svg>`` element alone, as wide as the page allows, without ids that other charts have too."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.DOTALL)
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    element = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", element)
    return element.replace(_INK, "currentColor")


def _dashes(style: Style) -> str | tuple[int, list[float]]:
    return (0, [float(length) / 1.5 for length in style.dashes.split()]) if style.dashes else "solid"


def _course(values: Sequence[float]) -> str:
    known = [value for value in values if np.isfinite(value)]
    return f"{known[0]:.3g} to {known[-1]:.3g} in {len(values)} epochs" if known else "no value"


def _short(value: float, _: object) -> str:
    return f"{value:g}"
