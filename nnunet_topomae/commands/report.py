"""``nnUNetv2_topomae report``: a page about a study, or about runs of pre-training and fine-tuning."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nnunetv2.paths import nnUNet_preprocessed

from nnunet_topomae import __version__
from nnunet_topomae.nnunet.results import RawCases, read_run
from nnunet_topomae.nnunet.training.checkpointing import checkpoints_in
from nnunet_topomae.reporting import runs as of_runs
from nnunet_topomae.reporting.charts import Style, styles
from nnunet_topomae.reporting.page import Page, Picture, Pictures, Section, Table
from nnunet_topomae.reporting.runs import Drawn, Run
from nnunet_topomae.reporting.slices import slices
from nnunet_topomae.studies import report as of_study
from nnunet_topomae.studies.definition import FILE, Row, Study, predictions_folder, read_study
from nnunet_topomae.studies.records import Record
from nnunet_topomae.studies.results import RESULTS, check_structures, read_results
from nnunet_topomae.studies.statistics import equivalent_labels, sentence
from nnunet_topomae.studies.steps import Steps
from nnunet_topomae.studies.tables import dice_comparisons

_FOLD = "fold_"
_NO_RAW = "Pictures of cases are left out, because nnUNet_raw is not set or has no {}."
_NO_PREDICTION = (
    "Pictures of cases are left out, because {} does not exist; move away what is left of its folder, and "
    "nnUNetv2_topomae study run predicts again."
)
_NO_PLANS = "Pre-trainings are left out, because nnUNet_preprocessed is not set or lacks plans of the study."
_LINES = (
    "Tinted: the label. Outlined: the prediction. Each plane is that with most labelled voxels; of several channels, "
    "the first is shown."
)


def run(folders: Sequence[Path], output: Path, *, overwrite: bool = False) -> list[Path]:
    """Write a page about study folders, folders of folds, or both.

    Args:
        folders: each holds study.json, a checkpoint, or folders of folds.
        output: the HTML file to write.
        overwrite: replace a file that is there.

    Returns:
        Folders of folds that were left out, as they hold no checkpoint.

    Raises:
        FileNotFoundError, ValueError: if a folder is none of these, if no fold has a checkpoint, or something in it is
            broken or of another dataset; if ``output`` exists or lies in no folder. Nothing has been written then.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; add --overwrite to replace it")
    if not output.resolve().parent.is_dir():
        raise FileNotFoundError(f"{output.resolve().parent} does not exist; make it first")
    folders, empty = _with_something(folders)
    parts = [_about_study(read_study(folder)) for folder in folders if _is_study(folder)]
    if runs := [read_run(folder) for folder in folders if not _is_study(folder)]:
        parts.append(_about_runs(runs))
    datasets = dict.fromkeys(name for part in parts for name in part.datasets)
    answers = [answer for part in parts for answer in part.answers]
    sections = [section for part in parts for section in part.sections]
    made_by = f"Made by nnunet_topomae {__version__}."
    Page(f"Report on {' and '.join(datasets)}", answers, sections, made_by).save(output)
    return empty


class _Part(NamedTuple):
    """What the page says of a study, or of runs."""

    datasets: Sequence[str]
    answers: Sequence[str]
    sections: Sequence[Section]


def _with_something(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Folders to report on, those of a trained model replaced by its folds; and folds that hold no checkpoint."""
    each: list[Path] = []
    for folder in folders:
        folds = [] if (folder / FILE).is_file() else sorted(folder.glob(f"{_FOLD}*"))
        each += folds or [folder]
    empty = [f for f in each if f.name.startswith(_FOLD) and f.is_dir() and not checkpoints_in(f)]
    if len(empty) == len(each):  # then the first is refused, by its name
        return each, []
    return [folder for folder in each if folder not in empty], empty


def _is_study(folder: Path) -> bool:
    """Whether a folder is a study's, and not that of a fold.

    Raises:
        ValueError: if it is neither.
    """
    if (folder / FILE).is_file():
        return True
    if not checkpoints_in(folder):
        what = "holds neither study.json nor a checkpoint" if folder.is_dir() else "does not exist"
        raise ValueError(
            f"{folder} {what}; name the folder of a study, or that of a fold, such as "
            "nnUNet_results/Dataset004_Hippocampus/TopoMAEPretrainer__nnUNetTopoMAEPlans__3d_fullres/fold_0"
        )
    return False


def _about_study(study: Study) -> _Part:
    records, runs = read_results(study), _finetunings(study)
    compared = dice_comparisons(study, records)
    labels = equivalent_labels(records, study.baselines, study.patients)
    results, over_cases = Section("Results"), Section("Curves and boxes")
    if records:
        tables = [
            of_study.main_table(study, records, compared),
            *([of_study.seeds_table(study, compared)] if compared else []),
            of_study.measures_table(study, records),
            of_study.structures_table(study, records),
        ]
        results = Section("Results", tables, [*of_study.labels_saved(study, labels), *study.warnings])
        over_cases = Section("Curves and boxes", [of_study.curves(study, records), of_study.box_plots(study, records)])
    pretrainings = _pretrainings(study)
    finetunings = [
        of_runs.loss_charts(f"Losses with {count} labelled cases", chosen)
        for count in study.label_counts
        if (chosen := [each for each in runs if each.labelled == count])
    ]
    settings, everything = of_study.settings_table(study), [each.run for each in (*(pretrainings or ()), *runs)]
    sections = [
        results,
        over_cases,
        _test_cases(study, records),
        Section("Pre-training", (), [_NO_PLANS]) if pretrainings is None else _pretraining_section(pretrainings),
        Section("Fine-tuning", finetunings),
        Section("Settings", [settings] if settings.rows else []),
        Section("Runs, versions, hardware, hours", [of_runs.runs_table(everything)] if everything else []),
    ]
    said = sentence(compared, labels, study.baselines, study.titles, study.main)
    return _Part([study.dataset], [said], sections)


def _pretrainings(study: Study) -> list[Drawn] | None:
    """Every pre-training of a study that has left a checkpoint, named after the rows that start from it.

    None if the plans that say so are not there.

    Raises:
        ValueError: if a checkpoint is broken or of another dataset.
    """
    if not nnUNet_preprocessed.is_set():
        return None
    steps, drawn = Steps(study), of_study.styles_of(study)
    if not all((steps.preprocessed / f"{run.plans}.json").is_file() for _, run in study.runs()):
        return None
    starting: dict[tuple[Path, int], dict[str, Row]] = {}  # rows by name, by their pre-training and its seed
    for row, run in study.runs():
        if row.pretrainer:
            starting.setdefault((steps.pretraining_fold(row, run), run.seed), {})[row.name] = row
    found = []
    for (fold, seed), rows in starting.items():
        if checkpoints_in(fold):
            titles = ", ".join(row.title for row in rows.values())
            found.append(Drawn(_run_of(study, fold, f"{titles}: pre-training, seed {seed}"), drawn[next(iter(rows))]))
    return found


def _finetunings(study: Study) -> list[Drawn]:
    """Every fine-tuning of a study that has left a checkpoint.

    Raises:
        ValueError: if a checkpoint is broken or of another dataset.
    """
    steps, drawn = Steps(study), of_study.styles_of(study)
    return [
        Drawn(_run_of(study, fold, f"{row.title}, {run.labelled} labelled cases, seed {run.seed}"),
              drawn[row.name], run.labelled)
        for row, run in study.runs()
        if checkpoints_in(fold := steps.finetuning_fold(row, run))
    ]  # fmt: skip


def _run_of(study: Study, fold: Path, title: str) -> Run:
    run = read_run(fold, title)
    if run.dataset != study.dataset:
        raise ValueError(f"{fold} is of {run.dataset}, but {study.folder / FILE} is about {study.dataset}")
    return run


def _test_cases(study: Study, records: Sequence[Record]) -> Section:
    """The best, median and worst case in three planes."""
    shown = of_study.chosen_cases(study, records)
    if shown is None:
        return Section("Test cases")
    if not RawCases.are_there(study.dataset):
        return Section("Test cases", (), [_NO_RAW.format(study.dataset)])
    raw = RawCases(study.dataset)
    check_structures(records, study, raw.description)
    if missing := {record.case for record in records if record.case not in raw}:
        raise ValueError(
            f"{study.folder / RESULTS} has case {min(missing)}, which {raw.folder} has not; the results are of another "
            "dataset"
        )
    folders = {row.name: predictions_folder(study.folder, row.name, shown.labelled, shown.seed) for row in shown.rows}
    files = (folder / f"{case}{raw.file_ending}" for folder in folders.values() for case in shown.cases.values())
    if gone := [file for file in files if not file.is_file()]:
        return Section("Test cases", (), [_NO_PREDICTION.format(gone[0].relative_to(study.folder))])
    blocks = []
    for kind, case in shown.cases.items():
        for row in shown.rows:
            what = f"{kind.capitalize()} case, {case}: {row.title}, Dice {shown.dice[row.name, case]:.3f}"
            blocks.append(_planes(what, raw, case, folders[row.name]))
    which = (
        f"Test cases ranked by the Dice of {shown.rows[-1].title} with {shown.labelled} labelled cases, seeds "
        f"averaged; the predictions are of seed {shown.seed}. {_LINES}"
    )
    return Section("Test cases", blocks, [which], list(_structures(raw).values()))


def _structures(raw: RawCases) -> dict[str, Style]:
    """How the structures of a dataset are drawn, by their names: all outlines are solid."""
    drawn = styles(list(dict.fromkeys(raw.structures.values())))
    return {name: style._replace(dashes="") for name, style in drawn.items()}


def _planes(title: str, raw: RawCases, case: str, predictions: Path) -> Pictures:
    found = raw.read(case, predictions / f"{case}{raw.file_ending}")
    drawn_as = _structures(raw)
    colors = {value: drawn_as[name].color for value, name in raw.structures.items()}
    drawn = slices(found.image, found.label, found.prediction, found.geometry, colors)
    alt = "{} plane of {} with label and prediction. {}"
    pictures = [Picture(png, alt.format(plane.capitalize(), case, title), plane) for plane, png in drawn.items()]
    return Pictures(title, pictures, columns=3)


def _pretraining_section(runs: Sequence[Drawn]) -> Section:
    """Losses, skill, figures and pictures of pre-trainings; of each row the pictures of the first run."""
    if not runs:
        return Section("Pre-training")
    first = {each.style: each.run for each in reversed(runs)}
    pictures = [block for run in first.values() for block in of_runs.pictures(run)]
    return Section(
        "Pre-training",
        [
            of_runs.loss_charts("Loss terms of pre-training", runs),
            of_runs.course_charts("Skill, learning rate and time of pre-training", runs),
            *_figures(runs),
            *pictures,
        ],
    )


def _figures(runs: Sequence[Drawn]) -> list[Table]:
    return [table for each in runs if (table := each.run.figures())]


def _about_runs(runs: Sequence[Run]) -> _Part:
    drawn = [Drawn(run, style) for run, style in zip(runs, styles([run.title for run in runs]).values(), strict=True)]
    settings = of_runs.settings_table(runs)
    sections = [
        _pretraining_section([each for each in drawn if each.run.pretraining]),
        _finetuning_section([each for each in drawn if not each.run.pretraining]),
        *(_validation_cases(run) for run in runs if run.summary and not run.pretraining),
        Section("Settings", [settings] if settings else []),
        Section("Runs, versions, hardware, hours", [of_runs.runs_table(runs)]),
    ]
    return _Part([run.dataset for run in runs], [run.outcome() for run in runs], sections)


def _finetuning_section(runs: Sequence[Drawn]) -> Section:
    if not runs:
        return Section("Fine-tuning")
    boxes = of_runs.validation_boxes(runs)
    return Section(
        "Fine-tuning",
        [
            of_runs.loss_charts("Losses of fine-tuning", runs),
            of_runs.course_charts("Dice, learning rate and time of fine-tuning", runs),
            *_figures(runs),
            *([boxes] if boxes.charts else []),
        ],
    )


def _validation_cases(run: Run) -> Section:
    """The best, median and worst validation case of a fine-tuning in three planes."""
    heading = f"Validation cases of {run.title}"
    if not RawCases.are_there(run.dataset):
        return Section(heading, (), [_NO_RAW.format(run.dataset)])
    raw = RawCases(run.dataset)
    values = run.dice
    ranked = sorted(values, key=lambda case: values[case])
    if not ranked:
        return Section(heading)
    blocks = []
    kinds: dict[str, str] = {}  # of one or two cases, the same one would be shown several times
    for kind, case in (("best", ranked[-1]), ("worst", ranked[0]), ("median", ranked[len(ranked) // 2])):
        kinds.setdefault(case, kind)
    for case, kind in kinds.items():
        if case not in raw:
            raise ValueError(f"{run.folder} has validated case {case}, which {raw.folder} has not")
        title = f"{kind.capitalize()} case, {case}: Dice {values[case]:.3f}"
        blocks.append(_planes(title, raw, case, run.folder / "validation"))
    return Section(heading, blocks, [_LINES], list(_structures(raw).values()))
