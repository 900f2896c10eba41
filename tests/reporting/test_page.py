import base64
from html.parser import HTMLParser

import pytest

from nnunet_topomae.reporting import page as pages
from nnunet_topomae.reporting.charts import Chart, Style
from nnunet_topomae.reporting.page import Charts, Page, Picture, Pictures, Section, Table, plain

PNG = b"\x89PNG\r\n"


class Elements(HTMLParser):
    """Start tags with their attributes, and the text that follows each."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict, str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), ""))

    def handle_data(self, data):
        if self.found:
            tag, attributes, text = self.found[-1]
            self.found[-1] = (tag, attributes, text + data.strip())

    def of(self, tag):
        return [(attributes, text) for name, attributes, text in self.found if name == tag]

    def texts(self, tag):
        return [text for _, text in self.of(tag)]


ANSWER = "Better <with> 5 labels."


def _page(*sections, answers=(ANSWER,)):
    return Elements(Page("Report on A & B", answers, sections, "Made by us.").html())


@pytest.mark.parametrize(("answers", "look"), [([ANSWER], "answer"), ([ANSWER, "Fold 1: 0.5"], "answer of-several")])
def test_title_answers_and_foot_are_text(answers, look):
    found = _page(answers=answers)
    assert found.texts("title") == found.texts("h1") == ["Report on A & B"]
    assert [text for attributes, text in found.of("p") if attributes.get("class") == look] == answers
    assert found.texts("p")[-1] == "Made by us."
    assert found.of("html")[0][0] == {"lang": "en"}


def test_a_table_has_a_heading_for_every_column_and_row():
    found = _page(Section("Results", [Table("Dice", ["row", "mean"], [["a<b", "0.5"], ["c", "0.75"]], "A note.")]))
    assert [(attributes["scope"], text) for attributes, text in found.of("th")] == [
        ("col", "row"), ("col", "mean"), ("row", "a<b"), ("row", "c"),
    ]  # fmt: skip
    assert found.texts("td") == ["0.5", "0.75"]
    assert found.of("table")[0][0]["aria-label"] == found.texts("h3")[0] == "Dice"
    assert "A note." in found.texts("p")


def test_charts_and_their_legend():
    chart = Chart('<svg viewBox="0 0 1 1"><path d="M0 0"/></svg>', 'a chart of "x" & y')
    found = _page(Section("Curves", [Charts("Over labels", [chart], [Style("TopoMAE", "#123456", "6 2")])]))
    (drawn,) = [attributes for attributes, _ in found.of("div") if attributes.get("role") == "img"]
    assert drawn["aria-label"] == 'a chart of "x" & y'
    assert found.of("path") == [({"d": "M0 0"}, "")]  # as it is, not as text
    (line,) = found.of("line")
    assert (line[0]["stroke"], line[0]["stroke-dasharray"]) == ("#123456", "6 2")


def test_a_section_has_a_legend_of_its_pictures():
    found = _page(Section("Cases", paragraphs=["Tinted: the label."], legend=[Style("liver", "#123456")]))
    (line,) = found.of("line")
    assert line[0]["stroke"] == "#123456"
    assert [attributes["aria-label"] for attributes, _ in found.of("ul") if "aria-label" in attributes] == ["Legend"]


@pytest.mark.parametrize("columns", [1, 3])
def test_pictures_are_in_the_page(columns):
    pictures = [Picture(PNG, "axial plane", "axial"), Picture(PNG + b"2", "coronal plane", "coronal")]
    found = _page(Section("Cases", [Pictures("Worst", pictures, columns)]))
    images = [attributes for attributes, _ in found.of("img")]
    assert [image["alt"] for image in images] == ["axial plane", "coronal plane"]
    assert [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images] == [
        PNG, PNG + b"2",
    ]  # fmt: skip
    assert found.texts("figcaption") == ["axial", "coronal"]
    grid = [attributes.get("style") for attributes, _ in found.of("div") if attributes.get("class") == "pictures"]
    assert grid == ([] if columns == 1 else ["--columns: 3"])


def test_empty_sections_are_left_out_and_contents_lead_to_the_others():
    found = _page(Section("One", (), ["said"]), Section("Nothing"), Section("Two", [Table("t", ["a"], [])]))
    assert found.texts("h2") == ["One", "Two"]
    links = {attributes["href"][1:]: text for attributes, text in found.of("a") if attributes["href"] != "#main"}
    assert {attributes["id"]: text for attributes, text in found.of("h2")} == links


def test_a_page_that_is_too_large_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "_MAX_BYTES", 1_000_000)
    section = Section("Cases", [Pictures("Worst", [Picture(bytes(2_000_000), "x")])])
    with pytest.raises(ValueError, match=r"report.html would have 3 MB, .* name fewer folders"):
        Page("Report", ["Yes."], [section], "").save(tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "yes"), (False, "no"), (None, "none"), (0.1 + 0.2, "0.3"), (1e-6, "1e-06"), (3, "3"), ("sgd", "sgd"),
        ([16, 16, 8], "16, 16, 8"), ([], "none"), ({"grid": [8, 8], "on": True}, "grid 8, 8, on yes"), ({}, "none"),
    ],
)  # fmt: skip
def test_settings_as_people_write_them(value, expected):
    assert plain(value) == expected
