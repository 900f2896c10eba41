"""``study.json``: what a study compares. Everything else in its folder is made from it, and can be made again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from nnunet_topomae.files import read_json, write_json
from nnunet_topomae.nnunet.data.splits import Split, check_patients
from nnunet_topomae.settings.schema import Flag, Number

VERSION = 1
FILE, SPLITS = "study.json", "splits.json"
PREPROCESSING = "preprocessing."  # of settings that decide what preprocessed images look like

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
        label_counts: numbers of labelled cases, rising.
        seeds: numbers of the repetitions.
        test_cases: cases that all runs are tested on.
        nsd_tolerance: of the normalised surface Dice, in mm.
        rows: what is compared.
        version: of the file.
        disable_tta: whether test cases are predicted without mirroring (nnUNetv2_predict --disable_tta).
        patient: a regular expression that finds the patient in the name of a case, see
            :class:`~nnunet_topomae.nnunet.data.splits.Split`; None: every case is of another patient.
        main: name of the pre-trained row whose comparison the study is made for; None: the last one that has been
            measured.
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
    disable_tta: bool = False
    patient: str | None = None
    main: str | None = None

    @property
    def baselines(self) -> dict[str, str]:
        """The row that each pre-trained row is compared with."""
        return {row.name: row.compared_with for row in self.rows if row.compared_with}

    @property
    def patients(self) -> dict[str, str]:
        """The patient of each test case; empty if every case is of another patient."""
        split = Split(patient=self.patient)
        return {case: split.patient_of(case) for case in self.test_cases} if self.patient else {}

    @property
    def titles(self) -> dict[str, str]:
        """Titles of the rows."""
        return {row.name: row.title for row in self.rows}

    @property
    def warnings(self) -> list[str]:
        """Which rows may differ from the row that they are compared with because their images do, as sentences."""
        rows, found = {row.name: row for row in self.rows}, []
        for row in self.rows:
            if row.compared_with is None:
                continue
            own, other = row.differs, rows[row.compared_with].differs
            keys = sorted({key for key in (*own, *other) if key.startswith(PREPROCESSING)})
            if different := [key for key in keys if own.get(key) != other.get(key)]:
                key = different[0]
                found.append(
                    f"{row.name} is compared with {row.compared_with}, whose images were preprocessed otherwise: "
                    f"{key.removeprefix(PREPROCESSING)} is {own.get(key)} and {other.get(key)}. The rows may differ "
                    f"for that reason."
                )
        return found

    def in_order(self) -> Iterator[tuple[Row, Run]]:
        """All runs, row by row."""
        return ((row, run) for row in self.rows for run in row.runs)

    def runs(self) -> Iterator[tuple[Row, Run]]:
        """All runs in order of information: every row at every number of labels before it is repeated."""
        return iter(sorted(self.in_order(), key=lambda each: (each[1].seed, each[1].labelled)))

    def write(self) -> None:
        """Write ``study.json``."""
        content = asdict(self)
        del content["folder"]
        write_json({"version": content.pop("version"), **content}, self.folder / FILE)


@dataclass(frozen=True)
class _Text:
    """Accepts texts that are not empty, and null if ``optional``."""

    optional: bool = False

    def accepts(self, value: Any) -> bool:
        return self.optional if value is None else isinstance(value, str) and value != ""

    def __str__(self) -> str:
        return f"{'null or ' * self.optional}a text"


@dataclass(frozen=True)
class _ListOf:
    """Accepts lists of distinct values, at least one."""

    each: Number | _Text

    def accepts(self, value: Any) -> bool:
        is_list = isinstance(value, list) and all(map(self.each.accepts, value))
        return is_list and len(set(value)) == len(value) > 0

    def __str__(self) -> str:
        return f"a list of one or more different values, each {self.each}"


class _Object:
    """Accepts objects."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict)

    def __str__(self) -> str:
        return "an object"


_KINDS: dict[str, Flag | Number | _Text | _ListOf | _Object] = {  # of values in study.json
    "labelled": Number(1, integer=True),
    "seed": Number(0, integer=True),
    "plans": _Text(),
    "fold": Number(0, integer=True),
    "name": _Text(),
    "title": _Text(),
    "pretrainer": _Text(optional=True),
    "finetuner": _Text(),
    "differs": _Object(),
    "baseline": Flag(),
    "compared_with": _Text(optional=True),
    "dataset": _Text(),
    "configuration": _Text(),
    "label_counts": _ListOf(Number(1, integer=True)),
    "seeds": _ListOf(Number(0, integer=True)),
    "test_cases": _ListOf(_Text()),
    "nsd_tolerance": Number(0, low_open=True),
    "disable_tta": Flag(),
    "patient": _Text(optional=True),
    "main": _Text(optional=True),
}


def predictions_folder(study: Path, row: str, labelled: int, seed: int) -> Path:
    """Where the predicted test cases of a run lie in the folder of its study."""
    return study / "predictions" / f"{row}_{labelled}_seed{seed}"


def read_study(folder: Path) -> Study:
    """Read the study in a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another version, or makes no sense; names the key and what is wrong.
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
    try:
        rows = []
        for where, row in _objects(content, "rows"):
            runs = [_read(Run, run, place) for place, run in _objects(row, "runs", where)]
            rows.append(_read(Row, {**row, "runs": runs}, where))
        study = _read(Study, {**content, "folder": folder.resolve(), "rows": rows})
        _check(study)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return study


def _objects(content: Mapping[str, Any], key: str, where: str = "") -> list[tuple[str, dict[str, Any]]]:
    """The objects that a list holds, each with its place, such as ``rows[0].``."""
    values = content.get(key)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{where}{key} must be a list of objects, got {json.dumps(values)}")
    return [(f"{where}{key}[{index}].", value) for index, value in enumerate(values)]


def _read(part: type[_Part], values: Mapping[str, Any], where: str = "") -> _Part:
    """Make a part of a study from the keys that it has and defaults of others; keys of other names are left alone.

    Raises:
        ValueError: names a key that is missing, or whose value is of another kind.
    """
    names = [each.name for each in fields(part) if each.name in values or each.default is MISSING]
    for name in names:
        if name not in values:
            raise ValueError(f"{where}{name} is missing")
        if name in _KINDS and not _KINDS[name].accepts(values[name]):
            raise ValueError(f"{where}{name} must be {_KINDS[name]}, got {json.dumps(values[name])}")
    return part(**{name: values[name] for name in names})


def _check(study: Study) -> None:
    """See that rows, runs, numbers of labels and the main comparison fit each other.

    Raises:
        ValueError: names what does not.
    """
    check_patients(study.patient, study.test_cases)
    check_main(study.main, study.baselines)
    names = [row.name for row in study.rows]
    for row in study.rows:
        if names.count(row.name) > 1:
            raise ValueError(f"there are two rows {row.name}; give one of them another name")
        if not row.name.isalnum():
            raise ValueError(f'the name of a row must have letters and digits only, got "{row.name}"')
        if row.compared_with is not None and row.compared_with not in names:
            raise ValueError(f"{row.name} is compared with {row.compared_with}, but there is no such row")
        runs = [(run.labelled, run.seed) for run in row.runs]
        for labelled, seed in runs:
            what = f"{row.name} has a run with {labelled} labelled cases and seed {seed}"
            if seed not in study.seeds or labelled not in study.label_counts:
                raise ValueError(
                    f"{what}, but label_counts are {list(study.label_counts)} and seeds {list(study.seeds)}"
                )
            if runs.count((labelled, seed)) > 1:
                raise ValueError(f"{what} twice; remove one of them")


def check_main(main: str | None, baselines: Mapping[str, str]) -> None:
    """See that the main row of a study is one that is compared with another.

    Raises:
        ValueError: names the rows that are.
    """
    if main is not None and main not in baselines:
        there = f"such rows are {', '.join(baselines)}" if baselines else "this study has no such row"
        raise ValueError(f'main must name a row that is compared with one from scratch, got "{main}"; {there}')
