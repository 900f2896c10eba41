"""``study.json``: what a study compares. Everything else in its folder is made from it, and can be made again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from nnunet_topomae.files import read_json, write_json

VERSION = 1
FILE, SPLITS = "study.json", "splits.json"

_Part = TypeVar("_Part", "Run", "Row", "Study")


@dataclass(frozen=True)
class Run:
    """A fine-tuning of a row, with a number of labelled cases and a seed.

    Attributes:
        labelled: number of labelled cases.
        seed: number of the repetition, from 0 on.
        plans: name of the run's plans, which hold its seed.
        fold: of the split, which has as many labelled cases.
    """

    labelled: int
    seed: int
    plans: str
    fold: int


@dataclass(frozen=True)
class Row:
    """What is compared: a network with its pre-training, or from scratch.

    Attributes:
        name: of letters and digits; names files.
        title: what stands in tables.
        pretrainer: trainer of the pre-training; None for a row from scratch.
        finetuner: trainer of the segmentation.
        differs: settings in which the rows differ, by dotted key; for tables.
        baseline: whether the row is from scratch, so that others are compared with it.
        compared_with: name of the row from scratch that a pre-trained row is compared with.
        runs: one for each number of labelled cases and seed.
    """

    name: str
    title: str
    pretrainer: str | None
    finetuner: str
    differs: Mapping[str, Any]
    baseline: bool
    compared_with: str | None
    runs: Sequence[Run]


@dataclass(frozen=True)
class Study:
    """A study; see ``docs/studies.md``.

    Attributes:
        folder: of the study.
        dataset: name of nnU-Net's dataset.
        configuration: of all plans.
        label_counts: numbers of labelled cases, rising; number n is fold n of the split.
        seeds: numbers of the repetitions.
        test_cases: cases that all runs are tested on.
        nsd_tolerance: of the normalised surface Dice, in mm.
        rows: what is compared.
        version: of the file.
    """

    folder: Path
    dataset: str
    configuration: str
    label_counts: Sequence[int]
    seeds: Sequence[int]
    test_cases: Sequence[str]
    nsd_tolerance: float
    rows: Sequence[Row] = field(default_factory=list)
    version: int = VERSION

    @property
    def baselines(self) -> dict[str, str]:
        """The row that each pre-trained row is compared with."""
        return {row.name: row.compared_with for row in self.rows if row.compared_with}

    @property
    def titles(self) -> dict[str, str]:
        """Titles of the rows."""
        return {row.name: row.title for row in self.rows}

    def runs(self) -> Iterator[tuple[Row, Run]]:
        """All runs in order of information: every row at every number of labels before it is repeated."""
        ordered = sorted(
            ((run.seed, run.labelled, index) for index, row in enumerate(self.rows) for run in row.runs),
        )
        runs = {(run.seed, run.labelled, index): run for index, row in enumerate(self.rows) for run in row.runs}
        return ((self.rows[key[2]], runs[key]) for key in ordered)

    def write(self) -> None:
        """Write ``study.json``."""
        content = asdict(self)
        del content["folder"]
        write_json({"version": content.pop("version"), **content}, self.folder / FILE)


def predictions_folder(study: Path, row: str, labelled: int, seed: int) -> Path:
    """Where the predicted test cases of a run lie in the folder of its study."""
    return study / "predictions" / f"{row}_{labelled}_seed{seed}"


def read_study(folder: Path) -> Study:
    """Read the study in a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another version, or makes no sense; names what is wrong.
    """
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; make a study with nnUNetv2_topomae study new {folder}")
    content = read_json(file)
    if content.get("version") != VERSION:
        raise ValueError(
            f"{file} is of version {content.get('version')!r}, but this nnunet_topomae reads version {VERSION}; use "
            f"the nnunet_topomae that wrote it, or make a new study"
        )
    rows = [
        _read(Row, {**row, "runs": [_read(Run, run, f"{file}, a run") for run in _list(row, "runs", file)]}, f"{file}")
        for row in _list(content, "rows", file)
    ]
    study = _read(Study, {**content, "folder": folder.resolve(), "rows": rows}, f"{file}")
    _check(study, file)
    return study


def _list(content: Any, key: str, file: Path) -> list:
    values = content.get(key) if isinstance(content, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f'{file}: "{key}" must be a list of objects')
    return values


def _read(part: type[_Part], values: Mapping[str, Any], where: str) -> _Part:
    """Make a part of a study from the keys that it has; others are left alone.

    Raises:
        ValueError: names a key that is missing.
    """
    names = [each.name for each in fields(part)]
    if missing := [name for name in names if name not in values]:
        raise ValueError(f'{where}: "{missing[0]}" is missing; every {part.__name__.lower()} has one')
    return part(**{name: values[name] for name in names})


def _check(study: Study, file: Path) -> None:
    """See that rows, runs and numbers of labels fit each other.

    Raises:
        ValueError: names what does not.
    """
    names = [row.name for row in study.rows]
    for row in study.rows:
        if names.count(row.name) > 1:
            raise ValueError(f"{file}: there are two rows {row.name}; give one of them another name")
        if not row.name.isalnum():
            raise ValueError(f'{file}: the name of a row must have letters and digits only, got "{row.name}"')
        if row.compared_with is not None and row.compared_with not in names:
            raise ValueError(f"{file}: {row.name} is compared with {row.compared_with}, but there is no such row")
        for run in row.runs:
            if run.seed not in study.seeds or run.labelled not in study.label_counts:
                raise ValueError(
                    f"{file}: {row.name} has a run with {run.labelled} labelled cases and seed {run.seed}, but "
                    f"label_counts are {list(study.label_counts)} and seeds {list(study.seeds)}"
                )
    if not isinstance(study.nsd_tolerance, int | float) or not study.nsd_tolerance > 0:
        raise ValueError(f"{file}: nsd_tolerance must be a number of mm above 0, got {study.nsd_tolerance!r}")
