"""``nnUNetv2_topomae study``: does pre-training help on a dataset, and how many labels does it save?"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_topomae.commands.terminal import NUM_VAL, SPLIT_SEED, add_held_out_options, positive, say
from nnunet_topomae.settings.recipes import RECIPES
from nnunet_topomae.studies.presets import KINDS, PRESETS, TOPOMAE_PLANS

if TYPE_CHECKING:  # nnU-Net takes seconds to import, which --help can do without
    from nnunet_topomae.studies.definition import Study
    from nnunet_topomae.studies.records import Record
    from nnunet_topomae.studies.running import Runner
    from nnunet_topomae.studies.steps import Steps

_SECONDS = 3600  # in an hour


def add_options(study: argparse.ArgumentParser) -> None:
    """Add the sub-commands of ``study``."""
    commands = study.add_subparsers(required=True, metavar="COMMAND")
    new = commands.add_parser("new", help="define a study: its rows, plans and split")
    _add_new_options(new)
    new.set_defaults(run=_new)

    run = commands.add_parser("run", help="run what is missing, measure it, and print the table")
    _add_command_options(run)
    run.add_argument(
        "--hours", type=positive(float), metavar="N", help="stop after that time (default: when all is done)"
    )
    run.set_defaults(run=_run)

    listing = commands.add_parser("commands", help="print the commands that are missing, or a SLURM job array of them")
    _add_command_options(listing)
    listing.add_argument(
        "--slurm",
        metavar="OPTIONS",
        help='print a script of job arrays, with OPTIONS of sbatch: --slurm="--gres=gpu:1"',
    )
    listing.set_defaults(run=_commands)

    page = commands.add_parser("report", help="make a page about the study that can be sent and printed")
    page.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the study")
    page.add_argument("-o", type=Path, metavar="OUT.html", help="the file to write (default: FOLDER/report.html)")
    page.add_argument("--overwrite", action="store_true", help="replace an existing file")
    page.set_defaults(run=_report)

    measure = commands.add_parser("measure", help="measure what has been predicted, and print the table")
    measure.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the study")
    measure.set_defaults(run=_measure)

    compare = commands.add_parser("compare", help="compare any two rows by every measure that has been taken")
    compare.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the study")
    compare.add_argument("row", metavar="ROW", help="name of a row")
    compare.add_argument("other", metavar="OTHER", help="name of the row that it is compared with")
    compare.set_defaults(run=_compare)


def _add_command_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the study")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu", "mps"), help="of nnU-Net's commands (default: %(default)s)"
    )
    parser.add_argument(
        "--processes",
        type=positive(int),
        default=3,
        metavar="N",
        help="processes that preprocess, and that export, when test cases are predicted (default: %(default)s)",
    )


def _add_new_options(parser: argparse.ArgumentParser) -> None:
    count = positive(int)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to make; its name is part of plans' names")
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="ID of a preprocessed dataset")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="of all plans (default: %(default)s)")
    parser.add_argument(
        "-p",
        default=TOPOMAE_PLANS,
        metavar="PLANS",
        help="plans whose crop and batch all rows take, and that TopoMAE's rows start from (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="ROW",
        help=f"what is compared (this, --preset or both): {', '.join(KINDS)}, or your own, "
        f"NAME=PLANS:FINETUNER[:PRETRAINER]",
    )
    parser.add_argument(
        "--main",
        metavar="ROW",
        help="the pre-trained row whose comparison the study is made for; the answer is about it, and its p-values are "
        "not corrected for other rows (default: the answer is about the last row that has been measured)",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help="rows that belong together")
    parser.add_argument(
        "--labelled",
        type=count,
        nargs="+",
        default=[],
        metavar="N",
        help="numbers of labelled cases (default: all that are left; with --preset labels those of 5 10 20 40 that "
        "there are cases for; with --existing_split all that it has)",
    )
    parser.add_argument(
        "--seeds",
        type=count,
        default=3,
        metavar="N",
        help="repetitions, each with labelled cases of its own (default: %(default)s)",
    )
    add_held_out_options(parser, usual_test="a fifth of all cases", seed="--split_seed")
    parser.add_argument(
        "--existing_split",
        action="store_true",
        help="take the cases of the dataset's splits_final.json, in which folds differ in which are labelled only, "
        "instead of drawing them",
    )
    parser.add_argument("--iterations", type=count, metavar="N", help="steps of every fine-tuning (default: as in -p)")
    parser.add_argument(
        "--pretraining_iterations", type=count, metavar="N", help="steps of every pre-training (default: as in -p)"
    )
    parser.add_argument(
        "--recipe", default="default", choices=RECIPES, help="of every fine-tuning (default: %(default)s)"
    )
    parser.add_argument("--batch", type=count, metavar="N", help="batch of every training (default: as in -p)")
    parser.add_argument(
        "--nsd_tolerance",
        type=positive(float),
        default=1.0,
        metavar="MM",
        help="tolerance of the normalised surface Dice (default: %(default)s)",
    )
    parser.add_argument("--disable_tta", action="store_true", help="predict test cases without mirroring: faster")


def _report(options: argparse.Namespace) -> None:
    from nnunet_topomae.commands import report

    file = options.o or options.folder / "report.html"
    report.run([options.folder], file, overwrite=options.overwrite)
    say(f"Written: {file}; open it in a browser")


def _new(options: argparse.Namespace) -> None:
    from nnunet_topomae.studies.new import Wishes, make_study
    from nnunet_topomae.studies.presets import kinds_of

    kinds = kinds_of(options.rows, options.preset)
    of_drawing = ("val", "test", "patient", "split_seed")
    given = [f"--{name}" for name in of_drawing if getattr(options, name) not in (None, [])]
    if options.existing_split and given:
        raise ValueError(f"--existing_split says which cases are held out; leave {given[0]} out")
    wishes = Wishes(
        configuration=options.c,
        plans=options.p,
        labelled=options.labelled,
        num_seeds=options.seeds,
        num_val=options.val or NUM_VAL,
        num_test=options.test,
        patient=options.patient,
        split_seed=SPLIT_SEED if options.split_seed is None else options.split_seed,
        iterations=options.iterations,
        pretraining_iterations=options.pretraining_iterations,
        recipe=options.recipe,
        batch_size=options.batch,
        nsd_tolerance=options.nsd_tolerance,
        existing_split=options.existing_split,
        disable_tta=options.disable_tta,
        main=options.main,
    )
    study = make_study(options.folder, options.d, kinds, wishes, options.preset)
    counts = ", ".join(map(str, study.label_counts))
    is_drawn_anew = len({run.fold for run in study.rows[0].runs}) > len(study.label_counts)
    of_draws = " with labelled cases of their own" if is_drawn_anew else ""
    of_patients = f" of {len(set(study.patients.values()))} patients" if study.patients else ""
    say(
        f"{study.folder}: {len(study.rows)} rows, {counts} labelled cases, {len(study.seeds)} seeds{of_draws}, "
        f"{len(study.test_cases)} test cases{of_patients}"
    )
    say(f"  {_folds_used(study)}\n  {_steps_made(study)}")
    width = max(len(row.name) for row in study.rows)
    for row in study.rows:
        say(f"  {row.name:<{width}}  {row.title}")
    for warning in study.warnings:
        say(f"WARNING: {warning}")
    say(f"\nNext:\n\n    nnUNetv2_topomae study run {options.folder}")


def _folds_used(study: "Study") -> str:
    """The folds whose cases the runs of a new study use, which are those of every row."""
    from nnunet_topomae.nnunet.data.splits import SPLITS
    from nnunet_topomae.studies.steps import Steps

    folds = sorted({run.fold for run in study.rows[0].runs})
    numbers = ", ".join(map(str, folds))
    return f"cases of fold{'s' * (len(folds) > 1)} {numbers} of {Steps(study).preprocessed / SPLITS}"


def _steps_made(study: "Study") -> str:
    """How many training steps every run of a new study makes, which all of its plans say."""
    from nnunet_topomae.nnunet.planning.plans import FINETUNING, PRETRAINING
    from nnunet_topomae.studies.steps import Steps

    configuration = Steps(study).plans(study.rows[0].runs[0].plans)["configurations"][study.configuration]
    made = {
        block: configuration[block]["num_epochs"] * configuration[block]["num_iterations_per_epoch"]
        for block in (FINETUNING, PRETRAINING)
    }
    return f"{made[FINETUNING]} steps of every fine-tuning, {made[PRETRAINING]} of every pre-training"


def _steps(options: argparse.Namespace) -> "Steps":
    from nnunet_topomae.studies.definition import read_study
    from nnunet_topomae.studies.steps import Steps

    return Steps(read_study(options.folder), options.device, options.processes)


def _run(options: argparse.Namespace) -> None:
    from nnunet_topomae.studies.running import Runner, TimeIsUpError

    deadline = time.monotonic() + options.hours * _SECONDS if options.hours else None
    runner = Runner(_steps(options), say, _Progress(), deadline)
    try:
        runner.run()
    except (TimeIsUpError, KeyboardInterrupt) as stop:
        say(f"\nStopped: {str(stop) or 'interrupted; the same command goes on from here'}")
    _print_results(runner.steps)
    if runner.failed:
        logs = "".join(f"\n    {row}: {runner.log(step)}" for row, step in runner.failed.items())
        raise RuntimeError(f"{len(runner.failed)} rows have failed; mend what their logs say, and run again:{logs}")


class _Progress:
    """Shows how far a study has come: on a terminal a table that is drawn anew in place, otherwise a line a command."""

    def __init__(self) -> None:
        self.is_terminal, self.num_lines, self.started = sys.stdout.isatty(), 0, time.monotonic()

    def __call__(self, runner: "Runner", now: str) -> None:
        from nnunet_topomae.studies.tables import progress_table

        minutes = (time.monotonic() - self.started) / 60
        if not self.is_terminal:
            say(f"[{minutes:.1f} min] {now}" if now else f"[{minutes:.1f} min] done")
            return
        text = f"{progress_table(runner.steps, runner.failed)}\n\n{minutes:.1f} min  {now or 'done'}"
        if self.num_lines:
            sys.stdout.write(f"\x1b[{self.num_lines}A\x1b[J")  # up, and clear what is below
        self.num_lines = len(text.splitlines())
        say(text)


def _measure(options: argparse.Namespace) -> None:
    from nnunet_topomae.studies.definition import read_study
    from nnunet_topomae.studies.steps import Steps

    steps = Steps(read_study(options.folder))
    steps.check()
    _print_results(steps)


def _compare(options: argparse.Namespace) -> None:
    from nnunet_topomae.studies.definition import read_study
    from nnunet_topomae.studies.results import RESULTS, read_results
    from nnunet_topomae.studies.tables import comparison_table

    study = read_study(options.folder)
    for name in (options.row, options.other):
        if name not in study.titles:
            raise ValueError(f"there is no row {name} in {options.folder}; there are {', '.join(study.titles)}")
    records = read_results(study)
    for name in (options.row, options.other):
        if not any(record.row == name for record in records):
            raise ValueError(f"{study.folder / RESULTS} has nothing about {name} yet; run the study first")
    say(f"{options.row} - {options.other}\n\n{comparison_table(study, records, options.row, options.other)}")


def _print_results(steps: "Steps") -> None:
    """Measure what has not been measured yet; the table, and the answer."""
    from nnunet_topomae.files import read_json
    from nnunet_topomae.studies.results import ANSWER, RESULTS, measure_study
    from nnunet_topomae.studies.tables import results_table

    records: list[Record] = measure_study(steps, say)
    if not records:
        say("Nothing has been measured yet")
        return
    folder = steps.study.folder
    say(f"\n{results_table(steps.study, records)}\n\n{read_json(folder / ANSWER)['sentence']}")
    for warning in steps.study.warnings:
        say(f"WARNING: {warning}")
    say(f"\nEvery case and structure: {folder / RESULTS}")


def _commands(options: argparse.Namespace) -> None:
    from nnunet_topomae.studies.scripts import shell_script, slurm_script

    steps = _steps(options)
    steps.check()
    steps.link_test_images()
    say(shell_script(steps) if options.slurm is None else slurm_script(steps, options.slurm))
