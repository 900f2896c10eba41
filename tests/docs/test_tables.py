"""The tables in the documentation that are made from settings and from results of studies."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import made_up
from nnunet_topomae.settings.schema import Choice, Number, block, setting

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Inner:
    weight: float = setting(1e-5, Number(0), "a weight", "ours")


@dataclass(frozen=True)
class Outer:
    count: int = setting(3, Number(1, 2**31 - 1, integer=True), "how many | of what", "a paper")
    kind: str = setting("plain", Choice(("plain", "fancy")), "which", "ours")
    inner: Inner = block(Inner)


def region(request: str, content: str = "") -> str:
    return f"# Page\n\n<!-- settings: {request} -->\n{content}<!-- end of settings -->\n\nText.\n"


def test_pages_agree_with_what_they_show(tables):
    assert tables.update(DOCS, write=False) == []


def test_there_are_tables_in_the_reference_and_on_the_methods_pages(tables):
    with_tables = {
        file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md") if "<!-- settings" in file.read_text()
    }
    pages = {"reference.md", *(f"methods/{method}.md" for method in ("topomae", "spark", "anatomask", "mae"))}
    assert pages <= with_tables


def test_rows_of_a_class(tables):
    assert tables.markdown(["a", "b"], []) == "| a | b |\n|---|---|\n"
    lines = tables.markdown(tables.Row._fields, (row.cells for row in tables.rows_of(Outer))).splitlines(keepends=True)
    assert lines[2:] == [
        "| `count` | how many \\| of what | a whole number of at least 1 and at most 2,147,483,647 | `3` | a paper |\n",
        '| `kind` | which | one of plain, fancy | `"plain"` | ours |\n',
        "| `inner.weight` | a weight | a number of at least 0 | `1e-5` | ours |\n",
    ]


@pytest.mark.parametrize(
    ("default", "expected"),
    [
        (None, "null"),
        (True, "true"),
        ((), "[]"),
        (("vit", "unetrpp"), '["vit", "unetrpp"]'),
        (0.0, "0"),
        (0.0064, "0.0064"),
        (1e-10, "1e-10"),
        (1e-05, "1e-5"),
        (250, "250"),
    ],
)
def test_defaults_are_written_as_in_plans(tables, default, expected):
    assert tables.as_written(default) == expected


def test_only_what_differs_from_a_parent(tables):
    text = tables.settings_table(
        "nnunet_topomae.settings.UNetFinetuningConfig only what differs from nnunet_topomae.settings.FinetuningConfig"
    )
    assert [line.split("`")[1] for line in text.splitlines()[2:]] == ["base_lr", "weight_decay"]


def test_only_some_fields_and_blocks(tables):
    text = tables.settings_table("nnunet_topomae.methods.topomae.TopoMAEConfig only lambda3, spatial")
    assert [line.split("`")[1] for line in text.splitlines()[2:]] == ["lambda3", "spatial.enabled"]


def test_an_edited_table_is_noticed_and_mended(tables, tmp_path, capsys):
    page = tmp_path / "methods" / "page.md"
    page.parent.mkdir()
    page.write_text(region("nnunet_topomae.methods.mae.MAEConfig only mask_ratio"))
    assert tables.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "methods/page.md rewritten\n"
    assert "| `0.75` | SelfMedMAE's configuration file |" in page.read_text()
    assert tables.main(["--check", str(tmp_path)]) == 0

    page.write_text(page.read_text().replace("0.75", "0.7"))
    assert tables.main(["--check", str(tmp_path)]) == 1
    said = "methods/page.md differs from what it shows; run python docs/tables.py\n"
    assert capsys.readouterr().out == said
    assert "`0.7`" in page.read_text()


@pytest.fixture
def results(tables, tmp_path, monkeypatch):
    """The name of a study with results."""
    folder = made_up.write_study(tmp_path, with_runs=False)
    monkeypatch.setattr(tables, "STUDIES", folder.parent)
    return folder.name


def test_results_of_a_study(tables, results):
    header, _, first, *_ = tables.study_table(f"{results} comparisons").splitlines()
    assert header.startswith("| row | labelled cases | seeds | mean Dice |")
    file = tables.STUDIES / results / "results.csv"
    table = np.genfromtxt(file, delimiter=",", names=True, dtype=None, encoding=None)
    of_row = table[(table["row"] == "scratch") & (table["labelled"] == table["labelled"].min())]
    scores = [
        of_row[(of_row["seed"] == seed) & (of_row["case"] == case)]["dice"].mean()
        for seed in set(of_row["seed"])
        for case in set(of_row["case"])
    ]
    assert first.split(" | ")[3] == f"{np.mean(scores):.3f}"
    for name, row in (("seeds", "SparK"), ("measures", "UNETR++ with ViT from scratch")):
        assert tables.study_table(f"{results} {name}").splitlines()[2].startswith(f"| {row} | ")
    assert tables.study_table(f"{results} topomae against scratch").splitlines()[2].startswith("| Dice | ")


def test_rows_that_have_not_been_measured_are_not_compared(tables, results):
    file = tables.STUDIES / results / "results.csv"
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if "spark," not in line))
    with pytest.raises(ValueError, match="topomae and spark of study have not been measured with the same cases yet"):
        tables.study_table(f"{results} topomae against spark")


def test_a_page_with_results_is_filled(tables, results, tmp_path):
    page = tmp_path / "pages" / "page.md"
    page.parent.mkdir()
    page.write_text(f"<!-- study: {results} seeds -->\n<!-- end of study -->\n")
    assert tables.main([str(page.parent)]) == 0
    assert "| SparK | " in page.read_text()
    assert tables.main(["--check", str(page.parent)]) == 0
    page.write_text(f"<!-- study: {results} seeds -->\n<!-- end of settings -->\n")
    assert tables.main([str(page.parent)]) == 2


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("nothing comparisons", "does not exist"),
        ("study pictures", "study has no table pictures; there are comparisons, seeds, measures and ROW against OTHER"),
        ("study topomae against nothing", "study has no table topomae against nothing; there are"),
    ],
)
def test_results_that_there_are_not(tables, results, wanted, message):
    assert results == "study"
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        tables.study_table(wanted)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (region("nnunet_topomae.settings.NoConfig"), "there is no class of settings nnunet_topomae.settings.NoConfig"),
        (region("nnunet_topomae.methods.mae.MAE"), "there is no class of settings nnunet_topomae.methods.mae.MAE"),
        (
            region("nnunet_topomae.methods.topomae.SpatialConfig only weight"),
            "nnunet_topomae.methods.topomae.SpatialConfig has no setting weight; it has enabled",
        ),
        (
            "<!-- settings: nnunet_topomae.methods.mae.MAEConfig -->\n\ntext\n",
            'the table "settings: nnunet_topomae.methods.mae.MAEConfig" has no line <!-- end of settings --> after it',
        ),
    ],
)
def test_what_cannot_be_filled_is_named(tables, tmp_path, capsys, text, message):
    (tmp_path / "page.md").write_text(text)
    assert tables.main(["--check", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"Error: page.md: {message}\n"
