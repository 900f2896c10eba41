"""``results.csv``: every measure of every case, structure, row and seed, from which all else can be recomputed."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nnunet_topomae.files import write_file
from nnunet_topomae.studies.measures import Measures

_KEYS = ("row", "labelled", "seed", "case", "structure")
MEASURES = tuple(field.name for field in fields(Measures))
COLUMNS = (*_KEYS, *MEASURES)


@dataclass(frozen=True)
class Record:
    """What was measured of a structure of a test case in a run.

    Attributes:
        row: name of the row.
        labelled: number of labelled cases that the run was trained on.
        seed: of the run.
        case: name of the test case.
        structure: name of the label.
        measures: how the prediction differs from the label.
    """

    row: str
    labelled: int
    seed: int
    case: str
    structure: str
    measures: Measures


def write_records(records: Iterable[Record], file: Path) -> None:
    """Write records as CSV, a line each; an empty field stands for a measure that is not defined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in records:
        values = (getattr(record.measures, name) for name in MEASURES)
        written = ["" if value is None else f"{value:.7g}" for value in values]
        writer.writerow([*(getattr(record, key) for key in _KEYS), *written])
    write_file(file, lambda stream: stream.write(text.getvalue().encode()))


def read_records(file: Path) -> list[Record]:
    """Read what :func:`write_records` has written.

    Raises:
        ValueError: names the file and the line that cannot be read.
    """
    with file.open(newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{file} must have the columns {', '.join(COLUMNS)}; move it away, and measure again")
        try:
            return [_record(line) for line in reader]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{file}, line {reader.line_num}, cannot be read ({error}); move it away, and measure again"
            ) from error


def _record(line: dict[str, Any]) -> Record:
    measures = {name: float(line[name]) if line[name] != "" else None for name in MEASURES}
    return Record(
        line["row"], int(line["labelled"]), int(line["seed"]), line["case"], line["structure"], Measures(**measures)
    )
