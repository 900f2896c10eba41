"""Charts are read back from their SVG: where a value is drawn, by the labels of the axes."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from nnunet_topomae.reporting.charts import Line, Style, boxes, over_labels, over_time, styles

FIRST, SECOND = styles(["first", "second"]).values()
SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


class Drawn:
    """The elements of a chart, and the scales of its axes."""

    def __init__(self, chart):
        self.root = ElementTree.fromstring(chart.svg)
        self.texts = {text.text: (text.attrib["x"], text.attrib["y"]) for text in self.root.iter(f"{SVG}text")}

    def ticks(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Values of an axis' labels, and their places: those of the ticks nearest to them."""
        anchor = "middle" if axis == 0 else "end"
        found = []
        for text in self.root.iter(f"{SVG}text"):
            number = text.text.replace("−", "-")
            if f"text-anchor: {anchor}" in text.attrib["style"] and re.fullmatch(r"-?[\d.]+", number):
                found.append((float(number), float(text.attrib["xy"[axis]])))
        values, places = zip(*found, strict=True)
        return np.array(values), np.array(places)

    def read(self, places, axis: int = 0, log: bool = False) -> np.ndarray:
        """Values at some places of an axis."""
        values, ticks = self.ticks(axis)
        slope, offset = np.polyfit(ticks, np.log10(values) if log else values, 1)
        found = slope * np.asarray(places) + offset
        return 10**found if log else found

    def markers(self, style: Style) -> np.ndarray:
        """Places (N, 2) of the dots of a style."""
        uses = [use for use in self.root.iter(f"{SVG}use") if f"fill: {style.color}" in use.attrib["style"]]
        return np.array([[float(use.attrib["x"]), float(use.attrib["y"])] for use in uses])

    def paths(self, style: Style) -> list[np.ndarray]:
        """Corners of the lines of a style."""
        paths = [
            path
            for path in self.root.iter(f"{SVG}path")
            if f"stroke: {style.color}" in path.attrib.get("style", "") and "clip-path" in path.attrib
        ]
        corners = (re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.attrib["d"]) for path in paths)
        return [np.array(each, dtype=float) for each in corners]


def test_styles_differ():
    found = styles([str(n) for n in range(36)])
    assert len({(style.color, style.dashes) for style in found.values()}) == 36
    assert len({found[str(n)].color for n in range(9)}) == 9
    assert found["0"] == Style("0", "#3a86c8", "")


def test_a_box_has_the_quartiles_and_a_dot_a_case():
    values = [0.1, 0.2, 0.3, 0.4, 0.9]
    chart = boxes("5 labelled cases", "Dice", {FIRST: values, SECOND: [0.5, 0.7]})
    drawn = Drawn(chart)
    assert drawn.read(np.sort(drawn.markers(FIRST)[:, 0])) == pytest.approx(values, abs=0.005)
    box, median, *whiskers = (drawn.read(path[:, 0]) for path in drawn.paths(FIRST))
    assert (box.min(), box.max()) == pytest.approx((0.2, 0.4), abs=0.005)  # quartiles
    assert median == pytest.approx([0.3, 0.3], abs=0.005)
    ends = [(whisker.min(), whisker.max()) for whisker in whiskers]
    assert sorted(ends) == [pytest.approx((0.1, 0.2), abs=0.005), pytest.approx((0.4, 0.4), abs=0.005)]  # 0.9 is out
    assert chart.alt == (
        "Dice of all test cases, 5 labelled cases. first: median 0.3, 0.1 to 0.9; second: median 0.6, 0.5 to 0.7"
    )
    assert {"first", "second", "Dice", "5 labelled cases"} <= drawn.texts.keys()


def test_means_over_labels_with_a_dot_a_seed():
    chart = over_labels("Dice", {FIRST: {10: [0.6, 0.8], 40: [0.9]}, SECOND: {40: [0.5]}})
    drawn = Drawn(chart)
    assert sorted(drawn.ticks(0)[0]) == [10, 40]
    assert chart.alt == "Dice over the number of labelled cases. first: 0.7 with 10, 0.9 with 40; second: 0.5 with 40"
    (line,) = (path for path in drawn.paths(FIRST) if len(path) == 2)
    assert drawn.read(line[:, 0], log=True) == pytest.approx([10, 40], rel=0.02)
    assert drawn.read(line[:, 1], axis=1) - drawn.read(line[0, 1], axis=1) == pytest.approx([0, 0.2], abs=0.005)
    heights = np.sort(drawn.read(drawn.markers(FIRST)[:, 1], axis=1))
    assert heights - heights[0] == pytest.approx([0, 0.1, 0.2, 0.3, 0.3], abs=0.005)  # 0.6, 0.7, 0.8, 0.9 and its mean
    assert len(drawn.markers(SECOND)) == 2


@pytest.mark.parametrize(
    ("values", "from_zero", "log"),
    [
        ([20.0, 4.0, 2.0, 1.0], False, True),
        ([0.5, -0.5, 0.25], False, False),
        ([8.0, 4.0, 2.0, 1.0], True, False),
    ],
    ids=["logarithmic", "linear", "from zero"],
)
def test_a_value_per_epoch(values, from_zero, log):
    drawn = Drawn(over_time("total loss", [Line(values, FIRST)], from_zero=from_zero))
    (line,) = drawn.paths(FIRST)
    assert drawn.read(line[:, 0]) == pytest.approx(range(len(values)), abs=0.02)
    heights = drawn.read(line[:, 1], axis=1, log=log)
    shift = heights / values if log else heights - values  # the label of a tick is a little below it
    assert np.ptp(shift) < 0.01
    assert len(drawn.markers(FIRST)) == len(values)
    assert (0 in drawn.ticks(1)[0]) == (not log)


@pytest.mark.parametrize(("values", "hidden"), [([-9.0, -1.0, 0.5], True), ([-9.0, -8.0, -5.0], False)])
def test_a_scale_begins_at_the_lowest_value_if_others_are_higher(values, hidden):
    ticks, _ = Drawn(over_time("skill", [Line(values, FIRST)], lowest=-1.5)).ticks(1)
    assert (min(ticks) < -1.5) == (not hidden)


def test_long_lines_are_thinned_and_what_is_missing_is_left_out():
    long = np.linspace(1, 0.1, 1000)
    chart = over_time("total loss", [Line(long, FIRST), Line([np.nan, 0.5, 0.25], SECOND)])
    drawn = Drawn(chart)
    (line,) = drawn.paths(FIRST)
    assert len(line) <= 200
    assert drawn.read(line[[0, -1], 0]) == pytest.approx([0, 999], abs=3)
    (short,) = drawn.paths(SECOND)
    assert len(short) == 2
    assert chart.alt == "total loss by epoch. first: 1 to 0.1 in 1000 epochs; second: 0.5 to 0.25 in 3 epochs"


@pytest.mark.parametrize("values", [[np.nan], []], ids=["nan", "stopped in its first epoch"])
def test_a_line_without_any_value_is_said(values):
    assert over_time("skill", [Line(values, FIRST)]).alt == "skill by epoch. first: no value"


def test_many_lines_are_counted():
    lines = [Line([1.0, 0.5], style) for style in styles([f"run {n}" for n in range(11)]).values()]
    assert over_time("loss", lines).alt.endswith("run 7: 1 to 0.5 in 2 epochs; and 3 more")


def test_a_chart_takes_width_and_colour_of_the_page_and_shares_no_id():
    charts = [over_time(name, [Line([1.0, 0.5], SECOND)]) for name in ("one", "two")]
    ids = [element.attrib["id"] for chart in charts for element in ElementTree.fromstring(chart.svg).iter()
           if "id" in element.attrib]  # fmt: skip
    assert len(ids) == len(set(ids)) > 0
    for chart in charts:
        root = ElementTree.fromstring(chart.svg)
        assert not {"width", "height"} & root.attrib.keys()
        assert len(root.attrib["viewBox"].split()) == 4
        assert all("fill: currentColor" in text.attrib["style"] for text in root.iter(f"{SVG}text"))
        links = {use.attrib[LINK][1:] for use in root.iter(f"{SVG}use")}
        assert links <= {element.attrib.get("id") for element in root.iter()}


def test_dashes_are_drawn():
    drawn = Drawn(over_time("loss", [Line([1.0, 0.5], Style("dashed", "#2a9a6b", "6 2"))]))
    dashed = [path for path in drawn.root.iter(f"{SVG}path") if "stroke-dasharray: 6,2" in path.get("style", "")]
    assert len(dashed) == 1
