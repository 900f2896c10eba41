"""Fills tables in the pages of this folder from what they show: settings, and results of studies.

A page says where a table belongs and what it shows:

    <!-- settings: nnunet_topomae.settings.PretrainingConfig -->
    <!-- end of settings -->

Between the two lines stands a row for every field of the class. ``only what differs from CLASS`` after the name leaves
out the rows that another class has just so; ``only mask_source, anatomask`` keeps the fields and blocks that are named.

    <!-- study: leftatrium comparisons -->
    <!-- end of study -->

shows how the rows of ``benchmarks/results/leftatrium`` do in Dice, and against their baselines; ``seeds`` in the place
of ``comparisons`` shows the difference with each seed, ``measures`` means of all measures, and ``topomae against
scratch`` compares two rows by every measure.

``python docs/tables.py`` rewrites the pages; ``--check`` changes nothing and exits with 1 if one differs.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc import locate
from typing import Any, NamedTuple

from nnunet_topomae.studies.definition import read_study
from nnunet_topomae.studies.report import main_table, measures_table, seeds_table
from nnunet_topomae.studies.results import read_results
from nnunet_topomae.studies.tables import compared_by_measure, dice_comparisons

FOLDER = Path(__file__).resolve().parent
STUDIES = FOLDER.parent / "benchmarks" / "results"

_END = r"<!-- end of (?:settings|study) -->"
_REGION = re.compile(rf"(<!-- (settings|study): (.+?) -->\n)(.*?)({_END}|<!-- (?:settings|study): |\Z)", re.DOTALL)
_REQUEST = re.compile(r"(\S+)(?: only (?:what differs from (\S+)|(.+)))?")


class Row(NamedTuple):
    """A setting; ``key`` is that of the plans, such as ``topology.grid``."""

    key: str
    meaning: str
    accepted: str
    default: str
    source: str

    @property
    def cells(self) -> tuple[str, ...]:
        """As they stand in the table."""
        return (f"`{self.key}`", self.meaning, self.accepted, f"`{self.default}`", self.source)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    head, *body = ("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in (header, *rows))
    return "".join([head, "|", "---|" * len(header), "\n", *body])


def rows_of(config_class: type, prefix: str = "") -> Iterator[Row]:
    """A row for each field of a settings class, blocks within it included."""
    for field in dataclasses.fields(config_class):
        key = f"{prefix}{field.name}"
        if "block" in field.metadata:
            yield from rows_of(field.metadata["block"], f"{key}.")
        else:
            described = (str(field.metadata[name]) for name in ("meaning", "accepted"))
            yield Row(key, *described, as_written(field.default), field.metadata["source"])


def as_written(default: Any) -> str:
    """A default as JSON, with numbers as people write them: 0 rather than 0.0, 1e-5 rather than 1e-05."""
    if isinstance(default, float):
        return re.sub(r"e(-?)0+", r"e\1", f"{default!r}".removesuffix(".0"))
    return json.dumps(default)


def settings_table(request: str) -> str:
    """The table of settings that a page asks for.

    Args:
        request: what stands after ``settings:`` in the page.

    Raises:
        ValueError: if it names a class or a field that does not exist.
    """
    name, parent, keys = _REQUEST.fullmatch(request).groups()
    rows = list(rows_of(find_class(name)))
    if parent:
        others = set(rows_of(find_class(parent)))
        rows = [row for row in rows if row not in others]
    if keys:
        wanted = [key.strip() for key in keys.split(",")]
        present = {row.key.split(".")[0] for row in rows}
        if unknown := [key for key in wanted if key not in present]:
            raise ValueError(f"{name} has no setting {unknown[0]}; it has {', '.join(sorted(present))}")
        rows = [row for row in rows if row.key.split(".")[0] in wanted]
    return markdown(Row._fields, (row.cells for row in rows))


def find_class(name: str) -> type:
    """A class of settings by its full name.

    Raises:
        ValueError: if there is none of that name.
    """
    found = locate(name)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(f"there is no class of settings {name}")
    return found


def study_table(request: str) -> str:
    """The table of results that a page asks for.

    Args:
        request: what stands after ``study:`` in the page.

    Raises:
        FileNotFoundError, ValueError: if there is no such study, or it has no such row or table.
    """
    name, *words = request.split()
    study = read_study(STUDIES / name)
    records = read_results(study)
    compared = dice_comparisons(study, records)
    match words:
        case ["comparisons"]:
            found = main_table(study, records, compared)
        case ["seeds"]:
            found = seeds_table(study, compared)
        case ["measures"]:
            found = measures_table(study, records)
        case [row, "against", other] if {row, other} <= study.titles.keys():
            header, *lines = compared_by_measure(study, records, row, other)
            if not lines:
                raise ValueError(f"{row} and {other} of {name} have not been measured with the same cases yet")
            return markdown(header, lines)
        case _:
            raise ValueError(
                f"{name} has no table {' '.join(words)}; there are comparisons, seeds, measures and ROW against OTHER"
            )
    return markdown(found.header, found.rows)


def fill(page: str) -> str:
    """The text of a page with its tables filled.

    Raises:
        ValueError: if a table is not ended, or asks for what does not exist.
    """

    def filled(region: re.Match) -> str:
        start, kind, request, _, end = region.groups()
        if end != (expected := f"<!-- end of {kind} -->"):
            raise ValueError(f'the table "{kind}: {request}" has no line {expected} after it')
        made = settings_table(request) if kind == "settings" else study_table(request)
        return f"{start}\n{made}\n{end}"

    return _REGION.sub(filled, page)


def update(folder: Path, *, write: bool) -> list[Path]:
    """Fill the tables of all pages in a folder.

    Args:
        folder: of Markdown files, searched with its subfolders.
        write: whether to change the pages.

    Returns:
        The pages that differ from what they show, or did.

    Raises:
        ValueError: names the page and what is wrong with it.
    """
    different = []
    for file in sorted(folder.rglob("*.md")):
        page = file.read_text(encoding="utf-8")
        try:
            filled = fill(page)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{file.relative_to(folder)}: {error}") from error
        if filled != page:
            different.append(file)
            if write:
                file.write_text(filled, encoding="utf-8")
    return different


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fill the tables in docs/ from settings and results of studies")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page differs")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="of the pages (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        different = update(options.folder, write=not options.check)
    except ValueError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    for file in different:
        page = file.relative_to(options.folder)
        said = "differs from what it shows; run python docs/tables.py" if options.check else "rewritten"
        sys.stdout.write(f"{page} {said}\n")
    return 1 if options.check and different else 0


if __name__ == "__main__":
    sys.exit(main())
