"""Measures the predictions of a study, and keeps ``results.csv`` and ``answer.json``."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

from nnunet_topomae.files import read_json, write_json
from nnunet_topomae.nnunet.data.raw import IGNORED, structures
from nnunet_topomae.studies.definition import FILE, Row, Run, Study
from nnunet_topomae.studies.measures import measure_case
from nnunet_topomae.studies.records import Record, read_records, write_records
from nnunet_topomae.studies.statistics import answer
from nnunet_topomae.studies.steps import Steps

RESULTS, ANSWER = "results.csv", "answer.json"
_TOLERANCE = "nsd_tolerance"


def measure_study(steps: Steps, say: Callable[[str], None]) -> list[Record]:
    """Measure all predictions that have not been measured yet, and write ``results.csv`` and ``answer.json``.

    Everything is measured again if ``nsd_tolerance`` has changed, and a run if it has been predicted again.

    Args:
        steps: of the study, which has been checked.
        say: told which run is measured.

    Returns:
        All records of the study, in the order of its rows.

    Raises:
        ValueError: if a file cannot be read, or ``results.csv`` is not of this study.
    """
    study = steps.study
    file = study.folder / RESULTS
    measured = read_results(study)
    check_structures(measured, study, steps.dataset[0])
    measured_runs = {(record.row, record.labelled, record.seed) for record in measured}
    known = _known(study, measured, len(structures(steps.dataset[0])))
    records: list[Record] = []
    for row, run in study.in_order():
        key, folder = (row.name, run.labelled, run.seed), steps.predictions(row, run)
        if not folder.is_dir():
            if key in measured_runs and key not in known:
                raise ValueError(
                    f"{folder} is gone, so it cannot be measured again, though nsd_tolerance or test_cases have "
                    f"changed; restore it or these, or move {file} away"
                )
            records += known.get(key, [])
        elif key in known and not _is_newer(folder, file):
            records += known[key]
        else:
            say(f"measuring {row.name}, {run.labelled} labelled, seed {run.seed}")
            records += measure_run(steps, row, run)
    if records:
        write_records(records, file)
        found = answer(records, study.baselines, study.titles, study.patients, study.main)
        write_json({**found, _TOLERANCE: study.nsd_tolerance}, study.folder / ANSWER)
    return records


def read_results(study: Study) -> list[Record]:
    """What has been measured in a study; nothing if there is no ``results.csv`` yet.

    Raises:
        ValueError: if the file cannot be read, is not of this study, or holds something twice.
    """
    file = study.folder / RESULTS
    if not file.is_file():
        return []
    runs = {(row.name, run.labelled, run.seed) for row, run in study.runs()}
    records = read_records(file)
    seen = set()
    for record in records:
        key = record.row, record.labelled, record.seed
        run = f"row {record.row}, {record.labelled} labelled, seed {record.seed}"
        what = f"{record.structure} of {record.case} in {run}"
        if key not in runs or record.case not in study.test_cases:
            raise ValueError(
                f"{file} holds {what}, which is not in {study.folder / FILE}; move the file away, and measure again"
            )
        if (*key, record.case, record.structure) in seen:
            raise ValueError(f"{file} holds {what} twice; move the file away, and measure again")
        seen.add((*key, record.case, record.structure))
    return records


def check_structures(records: Iterable[Record], study: Study, description: Mapping[str, Any]) -> None:
    """See that what has been measured are structures of the dataset.

    Args:
        records: of the study.
        study: that they belong to.
        description: the content of the raw dataset's dataset.json.

    Raises:
        ValueError: names a structure that is not.
    """
    if unknown := {record.structure for record in records}.difference(structures(description)):
        raise ValueError(
            f"{study.folder / RESULTS} has structure {min(unknown)}, which {study.dataset} has not; the results are of "
            f"another dataset, move the file away, and measure again"
        )


def _known(study: Study, measured: Iterable[Record], num_structures: int) -> dict[tuple[str, int, int], list[Record]]:
    """What has been measured already and need not be again, by run."""
    answered = study.folder / ANSWER
    if not answered.is_file() or read_json(answered).get(_TOLERANCE) != study.nsd_tolerance:
        return {}
    known: dict[tuple[str, int, int], list[Record]] = {}
    for record in measured:
        known.setdefault((record.row, record.labelled, record.seed), []).append(record)
    return {key: of_run for key, of_run in known.items() if len(of_run) == len(study.test_cases) * num_structures}


def _is_newer(folder: Path, file: Path) -> bool:
    """Whether anything in a folder is newer than a file."""
    return max(each.stat().st_mtime for each in (folder, *folder.iterdir())) > file.stat().st_mtime


def measure_run(steps: Steps, row: Row, run: Run) -> list[Record]:
    """Measure all test cases of a run.

    Raises:
        ValueError: names the file that cannot be read or does not fit its label.
    """
    description, cases = steps.dataset
    reader = determine_reader_writer_from_dataset_json(
        description, cases[steps.study.test_cases[0]]["images"][0], verbose=False
    )()
    wanted, ignored = structures(description), description["labels"].get(IGNORED)
    records = []
    for case in steps.study.test_cases:
        file, label = steps.predictions(row, run) / f"{case}{steps.file_ending}", Path(cases[case]["label"])
        (predicted, _), (labelled, properties) = (_read(reader, each) for each in (file, label))
        try:
            found = measure_case(predicted, labelled, properties["spacing"], wanted, steps.study.nsd_tolerance, ignored)
        except ValueError as error:
            raise ValueError(f"{file} does not fit {label}: {error}") from error
        records += [Record(row.name, run.labelled, run.seed, case, name, of_it) for name, of_it in found.items()]
    return records


def _read(reader: Any, file: Path) -> tuple[Any, dict[str, Any]]:
    try:
        labels, properties = reader.read_seg(str(file))
    except Exception as error:  # each reader has its own
        raise ValueError(f"{file} cannot be read: {str(error).strip().splitlines()[-1]}") from error
    return labels[0].round().astype(int), properties
