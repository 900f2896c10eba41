"""``nnUNetv2_topomae report``: a page about a study, or about runs of pre-training and fine-tuning."""

from collections.abc import Sequence
from pathlib import Path

from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_topomae import __version__
from nnunet_topomae.nnunet.results import RawCases, find_checkpoint, read_run
from nnunet_topomae.reporting import runs as of_runs
from nnunet_topomae.reporting import study as of_study
from nnunet_topomae.reporting.charts import Style, styles
from nnunet_topomae.reporting.page import Page, Picture, Pictures, Section, Table
from nnunet_topomae.reporting.runs import Drawn, Run
from nnunet_topomae.reporting.slices import slices
from nnunet_topomae.reporting.study import MEASURES, SCORES, STUDY, Study, read_study
from nnunet_topomae.studies.definition import predictions_folder

_NO_ANSWER = "No answer yet: the study has not been evaluated."
_NO_RAW = "Pictures of cases are left out, because nnUNet_raw is not set or has no {}."
_LINES = "Orange: the label. Blue, dashed: the prediction. Each plane is that with most labelled voxels."


def run(folders: Sequence[Path], output: Path, *, overwrite: bool = False) -> None:
    """Write a page about a study folder, or about folders of folds, or both.

    Args:
        folders: each holds study.json or a checkpoint.
        output: the HTML file to write.
        overwrite: replace a file that is there.

    Raises:
        FileNotFoundError, ValueError: if a folder is neither, or something in it is broken or of another dataset; if
            ``output`` exists or lies in no folder. Nothing has been written then.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; add --overwrite to replace it")
    if not output.resolve().parent.is_dir():
        raise FileNotFoundError(f"{output.resolve().parent} does not exist; make it first")
    studies = [read_study(folder) for folder in folders if _is_study(folder)]
    runs = [read_run(folder) for folder in folders if not _is_study(folder)]
    sections = [section for study in studies for section in _about_study(study)]
    sections += _about_runs(runs)
    datasets = dict.fromkeys([*(study.dataset for study in studies), *(each.dataset for each in runs)])
    answer = " ".join(
        [*(study.answer.get("sentence", _NO_ANSWER) for study in studies), *(each.outcome() for each in runs)]
    )
    made_by = f"Made by nnunet_topomae {__version__}."
    Page(f"Report on {' and '.join(datasets)}", answer, sections, made_by).save(output)


def _is_study(folder: Path) -> bool:
    """Whether a folder is a study's, and not that of a fold.

    Raises:
        ValueError: if it is neither.
    """
    if (folder / STUDY).is_file():
        return True
    if find_checkpoint(folder) is None:
        what = "holds neither study.json nor a checkpoint" if folder.is_dir() else "does not exist"
        raise ValueError(
            f"{folder} {what}; name the folder of a study, or that of a fold, such as "
            "nnUNet_results/Dataset004_Hippocampus/TopoMAEPretrainer__nnUNetTopoMAEPlans__3d_fullres/fold_0"
        )
    return False


def _about_study(study: Study) -> list[Section]:
    runs = _runs_of(study)
    results, over_cases = Section("Results"), Section("Curves and boxes")
    if study.scores:
        tables = [of_study.main_table(study), of_study.measures_table(study), of_study.structures_table(study)]
        results = Section("Results", tables, of_study.equivalent_labels(study))
        over_cases = Section("Curves and boxes", [of_study.curves(study), of_study.box_plots(study)])
    pretrainings = [each for each in runs if each.run.pretraining]
    finetunings = [
        of_runs.loss_charts(f"Losses with {count} labelled cases", chosen)
        for count in study.label_counts
        if (chosen := [each for each in runs if not each.run.pretraining and each.labelled == count])
    ]
    settings = of_study.settings_table(study)
    return [
        results,
        over_cases,
        _test_cases(study),
        _pretraining_section(pretrainings),
        Section("Fine-tuning", finetunings),
        Section("Settings", [settings] if settings.rows else []),
        Section("Runs, versions, hardware, hours", [of_runs.runs_table([each.run for each in runs])] if runs else []),
    ]


def _runs_of(study: Study) -> list[Drawn]:
    """Every run of a study that has left a checkpoint, pre-trainings first; one that rows share is of the first row.

    Raises:
        ValueError: if a checkpoint is broken or of another dataset.
    """
    found: dict[Path, Drawn] = {}
    for row in study.rows.values():
        style = study.styles[row.name]
        for plans in dict.fromkeys(run["plans"] for run in row.runs) if row.pretrainer else ():
            folder = Path(get_output_folder(study.dataset, row.pretrainer, plans, study.configuration))
            for fold in sorted(folder.glob("fold_*")):
                _add(found, fold, f"{row.title}, pre-training of {fold.name.replace('_', ' ')}", style, study)
        for run in row.runs:
            folder = Path(
                get_output_folder(study.dataset, row.finetuner, run["plans"], study.configuration, run["fold"])
            )
            title = f"{row.title}, {run['labelled']} labelled cases, seed {run['seed']}"
            _add(found, folder, title, style, study, run["labelled"])
    return sorted(found.values(), key=lambda each: not each.run.pretraining)


def _add(
    found: dict[Path, Drawn], folder: Path, title: str, style: Style, study: Study, labelled: int | None = None
) -> None:
    if folder in found or find_checkpoint(folder) is None:
        return
    run = read_run(folder, title)
    if run.dataset != study.dataset:
        raise ValueError(f"{folder} is of {run.dataset}, but {study.folder / STUDY} is about {study.dataset}")
    found[folder] = Drawn(run, style, labelled)


def _test_cases(study: Study) -> Section:
    """The best, median and worst case in three planes."""
    shown = of_study.chosen_cases(study)
    if shown is None:
        return Section("Test cases")
    if not RawCases.are_there(study.dataset):
        return Section("Test cases", (), [_NO_RAW.format(study.dataset)])
    raw = RawCases(study.dataset)
    _check_scores(study, raw)
    measure, best = MEASURES[study.measure], study.rows[shown.rows[-1]].title
    blocks = []
    for kind, case in shown.cases.items():
        for row in shown.rows:
            folder = predictions_folder(study.folder, row, shown.labelled, shown.seed)
            what = f"{kind.capitalize()} case, {case}: {study.rows[row].title}, {measure} {shown.values[row, case]:.3f}"
            blocks.append(_planes(what, raw, case, folder))
    which = (
        f"Test cases ranked by the {measure} of {best} with {shown.labelled} labelled cases, seeds averaged; "
        f"the predictions are of seed {shown.seed}. {_LINES}"
    )
    return Section("Test cases", blocks, [which])


def _check_scores(study: Study, raw: RawCases) -> None:
    """Refuse results of another dataset."""
    for score in study.scores:
        if score.case not in raw or score.structure not in raw.structures:
            what = f"case {score.case}" if score.case not in raw else f"structure {score.structure}"
            raise ValueError(
                f"{study.folder / SCORES} has {what}, which {raw.folder} has not; the results are of another dataset"
            )


def _planes(title: str, raw: RawCases, case: str, predictions: Path) -> Pictures:
    found = raw.read(case, predictions / f"{case}{raw.file_ending}")
    drawn = slices(found.image, found.label, found.prediction, found.geometry)
    alt = "{} plane of {} with the contours of label and prediction. {}"
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


def _about_runs(runs: Sequence[Run]) -> list[Section]:
    if not runs:
        return []
    drawn = [Drawn(run, style) for run, style in zip(runs, styles([run.title for run in runs]).values(), strict=True)]
    settings = of_runs.settings_table(runs)
    return [
        _pretraining_section([each for each in drawn if each.run.pretraining]),
        _finetuning_section([each for each in drawn if not each.run.pretraining]),
        *(_validation_cases(run) for run in runs if run.summary and not run.pretraining),
        Section("Settings", [settings] if settings else []),
        Section("Runs, versions, hardware, hours", [of_runs.runs_table(runs)]),
    ]


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
    for kind, case in (("best", ranked[-1]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[0])):
        if case not in raw:
            raise ValueError(f"{run.folder} has validated case {case}, which {raw.folder} has not")
        title = f"{kind.capitalize()} case, {case}: Dice {values[case]:.3f}"
        blocks.append(_planes(title, raw, case, run.folder / "validation"))
    return Section(heading, blocks, [_LINES])
