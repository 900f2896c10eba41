"""What self-supervised pre-training needs beside nnU-Net's own commands: the command ``nnUNetv2_topomae``."""

import argparse
import inspect
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_topomae import __version__, planners, trainers
from nnunet_topomae.commands import study
from nnunet_topomae.commands.terminal import NUM_VAL, SPLIT_SEED, add_held_out_options, positive, say

if TYPE_CHECKING:  # nnU-Net takes seconds to import, which --help and trainers can do without
    from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
    from nnunet_topomae.nnunet.planning.planner import PretrainingPlanner

_PLANS = "nnUNetTopoMAEPlans"
_CONFIGURATIONS = ("3d_fullres", "3d_lowres")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; an error that a user can mend is one line on standard error, and the exit status is 2.

    Args:
        arguments: of the command line; None for those that Python was started with.

    Raises:
        ValueError, RuntimeError, OSError, AssertionError: such an error itself, with ``--traceback``.
    """
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, RuntimeError, OSError, AssertionError) as error:  # the last two are nnU-Net's, too
        if options.traceback:
            raise
        say(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All sub-commands and their options; the options of planning are those of nnU-Net."""
    parser = argparse.ArgumentParser(prog="nnUNetv2_topomae", description=__doc__.split(":")[0])
    parser.add_argument("--version", action="version", version=f"nnunet_topomae {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where in the code an error arose, instead of one line"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    folder = commands.add_parser("trainers", help="print the folder of the trainers, for nnUNet_extTrainer")
    folder.set_defaults(run=lambda _: say(trainers.FOLDER))

    both = commands.add_parser("plan_and_preprocess", help="plan and preprocess datasets for pre-training")
    _add_planning_options(both)
    _add_preprocessing_options(both)
    both.set_defaults(run=_plan_and_preprocess)

    plan = commands.add_parser("plan_experiment", help="plan datasets whose fingerprint nnU-Net has extracted")
    _add_planning_options(plan)
    plan.set_defaults(run=_plan_experiment)

    add = commands.add_parser("add_unlabelled", help="add images without labels, for pre-training")
    _add_unlabelled_options(add)
    add.set_defaults(run=_add_unlabelled)

    split = commands.add_parser("splits", help="split a dataset at random into training, validation and test cases")
    _add_split_options(split)
    split.set_defaults(run=_splits)

    adapt = commands.add_parser("adapt", help="make a pre-trained checkpoint fit other plans")
    adapt.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint_final.pth of a pre-training")
    adapt.add_argument("-d", type=int, required=True, metavar="ID", help="ID of the dataset that it is made to fit")
    adapt.add_argument("-p", default=_PLANS, metavar="PLANS", help="plans of that dataset (default: %(default)s)")
    adapt.add_argument(
        "-c", default="3d_fullres", metavar="CONFIGURATION", help="configuration of the plans (default: %(default)s)"
    )
    adapt.add_argument("-o", type=Path, required=True, metavar="OUT.pth", help="the file to write")
    adapt.set_defaults(run=_adapt)

    inspect_ = commands.add_parser(
        "inspect", help="say what is in a checkpoint, plans or zip without running any of it"
    )
    inspect_.add_argument("file", type=Path, metavar="FILE", help="checkpoint, plans, zip, or folder of export")
    inspect_.set_defaults(run=_inspect)

    export = commands.add_parser("export", help="write the weights of a checkpoint as safetensors, with a card")
    export.add_argument("checkpoint", type=Path, metavar="FILE", help="a checkpoint")
    export.add_argument("-o", type=Path, required=True, metavar="DIR", help="the folder to write")
    export.set_defaults(run=_export)

    matcher = commands.add_parser(
        "train_matcher", help="train what finds the same body part in other images, before pre-training needs it"
    )
    _add_matcher_options(matcher)
    matcher.set_defaults(run=_train_matcher)

    compare = commands.add_parser(
        "study", help="does pre-training help on a dataset, and how many labels does it save?"
    )
    study.add_options(compare)

    report = commands.add_parser("report", help="make a page about a study, or about runs of training")
    report.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="a study, the folder of a fold in nnUNet_results, or that of all its folds",
    )
    report.add_argument("-o", type=Path, required=True, metavar="OUT.html", help="the file to write")
    report.add_argument("--overwrite", action="store_true", help="replace an existing file")
    report.set_defaults(run=_report)

    demo = commands.add_parser("demo", help="train and predict a made-up dataset (under 10 minutes on 2 CPU cores)")
    demo.add_argument("--keep", type=Path, metavar="FOLDER", help="keep data, pictures and results in FOLDER")
    demo.set_defaults(run=_demo)
    return parser


def _add_planning_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", type=int, nargs="+", required=True, metavar="ID", help="IDs of the datasets")
    parser.add_argument(
        "-pl", default="TopoMAEPlanner", metavar="PLANNER", help="class of the planner (default: %(default)s)"
    )
    parser.add_argument(
        "-gpu_memory_target",
        type=positive(float),
        metavar="GB",
        help="GPU memory that training may take (default: 8, in the paper's set-ups 32)",
    )
    parser.add_argument("-preprocessor_name", default="DefaultPreprocessor", help="class of nnU-Net's preprocessor")
    parser.add_argument(
        "-overwrite_target_spacing",
        type=positive(float),
        nargs=3,
        metavar="MM",
        help="spacing of 3d_fullres in mm (z, y, x)",
    )
    parser.add_argument(
        "-overwrite_plans_name", metavar="NAME", help="name of the plans (default: that of the planner)"
    )


def _add_preprocessing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        nargs="+",
        default=_CONFIGURATIONS,
        metavar="CONFIGURATION",
        help="configurations to preprocess (default: all 3D ones)",
    )
    parser.add_argument(
        "-np",
        type=positive(int),
        nargs="+",
        metavar="N",
        help="number of processes for each configuration (default: 4, 3d_lowres: 8)",
    )
    parser.add_argument(
        "-npfp",
        type=positive(int),
        default=8,
        metavar="N",
        help="number of processes for the fingerprint (default: %(default)s)",
    )
    parser.add_argument(
        "--verify_dataset_integrity", action="store_true", help="let nnU-Net check images and labels first"
    )
    parser.add_argument("--clean", action="store_true", help="extract the fingerprint even if there is one")
    parser.add_argument("--no_pp", action="store_true", help="plan only, do not preprocess")
    parser.add_argument("--verbose", action="store_true", help="print more")
    parser.add_argument("--no_pbar", action="store_true", help="show no progress bars")


def _add_unlabelled_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="ID of the dataset")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "-i", type=Path, metavar="FOLDER", help="add the images in FOLDER, named CASE_0000.nii.gz, that are new"
    )
    action.add_argument("--list", action="store_true", help="list the images that have been added")
    action.add_argument("--remove", metavar="CASE", help="delete an added image")
    parser.add_argument("-p", default=_PLANS, metavar="PLANS", help="plans of the dataset (default: %(default)s)")
    parser.add_argument(
        "-c", nargs="+", metavar="CONFIGURATION", help="configurations of the plans (default: all 3D ones)"
    )
    parser.add_argument(
        "-np", type=positive(int), default=4, metavar="N", help="number of processes (default: %(default)s)"
    )
    parser.add_argument(
        "--update_epochs",
        action="store_true",
        help="set pretraining.num_epochs in the plans to what the planner would plan for all images",
    )
    parser.add_argument("--no_pbar", action="store_true", help="show no progress bar")


def _add_split_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="ID of the dataset")
    parser.add_argument(
        "-s",
        metavar="SHARES",
        help="training, validation and (optional) test cases: numbers, such as 18/12, or percentages, such as 80:15:5",
    )
    parser.add_argument(
        "--labelled",
        type=positive(int),
        metavar="N",
        help="in place of -s: training cases with labels; all cases that are left are unlabelled, for pre-training",
    )
    parser.add_argument(
        "--nested",
        type=positive(int),
        nargs="+",
        metavar="N",
        help="one fold for each number of labelled cases, each a part of the next; the rest is the same in all folds",
    )
    add_held_out_options(parser, usual_test="none", seed="--seed")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing split")


def _add_matcher_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="ID of a preprocessed dataset")
    parser.add_argument("-p", required=True, metavar="PLANS", help="plans of the dataset")
    parser.add_argument(
        "-c", default="3d_fullres", metavar="CONFIGURATION", help="configuration of the plans (default: %(default)s)"
    )
    parser.add_argument(
        "-f",
        type=_fold,
        default=0,
        metavar="FOLD",
        help="fold whose training images are learned from: a number or all (default: %(default)s)",
    )
    parser.add_argument(
        "-device", default="cuda", choices=("cuda", "cpu", "mps"), help="to train on (default: %(default)s)"
    )


def _fold(text: str) -> int | str:
    """A fold as it stands on the command line.

    Raises:
        ValueError: for anything but a number and ``all``.
    """
    return text if text == "all" else int(text)


def _train_matcher(options: argparse.Namespace) -> None:
    from nnunet_topomae.commands import train_matcher

    train_matcher.run(options)


def _add_unlabelled(options: argparse.Namespace) -> None:
    from nnunet_topomae.nnunet.data import unlabelled
    from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset

    dataset = PlannedDataset.of(options.d, options.p)
    configurations = dataset.configurations(options.c)
    problems: dict[str, str] = {}
    if options.remove:
        unlabelled.remove(dataset, options.remove, configurations)
        say(f"Removed {options.remove}")
    elif options.list:
        for name in configurations:
            cases = dataset.unlabelled_cases(name)
            say(f"{name}: {len(cases)} unlabelled cases in {dataset.unlabelled_folder(name)}")
            for case in cases:
                say(f"    {case}")
    else:
        added, problems = unlabelled.add(
            dataset,
            options.i,
            configurations,
            options.np,
            show_progress=not options.no_pbar,
            warn=lambda said: say(f"WARNING: {said}"),
        )
        for name, count in added.items():
            total = len(dataset.unlabelled_cases(name))
            say(f"{name}: {count} cases added, {total} unlabelled cases in all")
    _follow_images(dataset, configurations, options)
    if problems:
        listing = "".join(f"\n    {case} {problem}" for case, problem in sorted(problems.items()))
        raise ValueError(f"{len(problems)} cases were left out:{listing}")


def _follow_images(dataset: "PlannedDataset", configurations: Sequence[str], options: argparse.Namespace) -> None:
    """Say how many epochs the images ask for, by the planner that made the plans, or else by our rule for any."""
    from nnunet_topomae.nnunet.finding import find_class
    from nnunet_topomae.nnunet.planning import epochs
    from nnunet_topomae.nnunet.planning.planner import PretrainingPlanner

    name = dataset.plans.experiment_planner_name
    found = find_class(name, Path(planners.__path__[0]), PretrainingPlanner, planners.__name__)
    file = dataset.folder / f"{options.p}.json"
    for configuration in configurations:
        said = epochs.follow_images(
            dataset, configuration, found or PretrainingPlanner, file, update=options.update_epochs
        )
        say(f"{configuration}: {said}")


def _plan_and_preprocess(options: argparse.Namespace) -> None:
    from nnunet_topomae.nnunet.planning import preprocessing

    _check_configurations(options.c)
    _check_processes(options.np, options.c)
    planner = _checked_planner(options)
    for dataset_id in options.d:
        preprocessing.extract_fingerprint(
            dataset_id,
            options.npfp,
            verify=options.verify_dataset_integrity,
            clean=options.clean,
            verbose=options.verbose,
            show_progress=not options.no_pbar,
        )
    plans_name = _plan(options, planner)
    if not options.no_pp:
        for dataset_id in options.d:
            preprocessing.preprocess(
                dataset_id,
                plans_name,
                options.c,
                options.np,
                verbose=options.verbose,
                show_progress=not options.no_pbar,
            )
    _print_next_commands(planner, options.d[0], options.c[0], plans_name, preprocessed=not options.no_pp)


def _plan_experiment(options: argparse.Namespace) -> None:
    planner = _checked_planner(options)
    plans_name = _plan(options, planner)
    _print_next_commands(planner, options.d[0], _CONFIGURATIONS[0], plans_name, preprocessed=False)


def _checked_planner(options: argparse.Namespace) -> "type[PretrainingPlanner]":
    """The planner that is asked for, once it is known that all datasets are such as it plans."""
    from nnunet_topomae.nnunet.planning import preprocessing

    planner = find_planner(options.pl)
    preprocessing.check_preprocessor(options.preprocessor_name)
    for dataset_id in options.d:
        planner.check_dataset(dataset_id)
    return planner


def _plan(options: argparse.Namespace, planner: "type[PretrainingPlanner]") -> str:
    from nnunet_topomae.nnunet.planning import preprocessing

    return [
        preprocessing.plan(
            dataset_id,
            planner,
            options.gpu_memory_target,
            options.preprocessor_name,
            options.overwrite_target_spacing,
            options.overwrite_plans_name,
        )
        for dataset_id in options.d
    ][-1]


def find_planner(name: str) -> "type[PretrainingPlanner]":
    """The planner class of that name in planners/.

    Raises:
        ValueError: if there is none.
    """
    from nnunet_topomae.nnunet.finding import find_class
    from nnunet_topomae.nnunet.planning.planner import PretrainingPlanner

    planner = find_class(name, Path(planners.__path__[0]), PretrainingPlanner, planners.__name__)
    if planner is None or inspect.isabstract(planner):
        raise ValueError(
            f"-pl {name}: there is no such planner in {planners.__path__[0]}; for nnU-Net's own planners use "
            f"nnUNetv2_plan_experiment"
        )
    return planner


def _splits(options: argparse.Namespace) -> None:
    from nnunet_topomae.nnunet.data import splits

    counts = {*(options.nested or ()), *([options.labelled] if options.labelled else ())}
    if bool(counts) == bool(options.s) or (options.s and (options.val or options.test or options.patient)):
        raise ValueError(
            "splits takes either -s SHARES, or --labelled N or --nested N N ..., and only with these --val, --test and "
            "--patient"
        )
    seed = SPLIT_SEED if options.seed is None else options.seed
    if options.s:
        file, folds = splits.write_split(options.d, options.s, seed, overwrite=options.overwrite)
    else:
        num_val, num_test = options.val or NUM_VAL, options.test or 0
        file, folds = splits.write_label_counts(
            options.d, counts, num_val, num_test, seed, options.patient, overwrite=options.overwrite
        )
    for fold, split in enumerate(folds):
        say(f"{file}: {split}; train with fold {fold}")
    if len(folds) > 1:
        say("Pre-train fold 0 only: fine-tuning of the other folds finds it, as the images are the same")


def _adapt(options: argparse.Namespace) -> None:
    from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
    from nnunet_topomae.nnunet.training import adapting
    from nnunet_topomae.nnunet.training.pretraining import external_folders, find_pretrainer

    _clean_up_when_ended()
    checkpoint = adapting.read_pretrained(options.checkpoint)
    folders = [trainers.FOLDER, *external_folders()]
    trainer = find_pretrainer(checkpoint["trainer_name"], folders)
    if trainer is None:
        raise ValueError(
            f"{options.checkpoint} was written by {checkpoint['trainer_name']}, which is none of the trainers in "
            f"{' and '.join(map(str, dict.fromkeys(folders)))}"
        )
    dataset = PlannedDataset.of(options.d, options.p)
    say(adapting.adapt(options.checkpoint, checkpoint, trainer, dataset, options.c, options.o))
    say(f"Written: {options.o}; pass it to nnUNetv2_train with -pretrained_weights {shlex.quote(str(options.o))}")


def _clean_up_when_ended() -> None:
    """Let SIGTERM end a command that writes one result as an error does, so that nothing half-written stays."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _inspect(options: argparse.Namespace) -> None:
    from nnunet_topomae.nnunet.weights.inspecting import inspect_file

    for name, value in inspect_file(options.file):
        say(f"{name}: {value}")


def _export(options: argparse.Namespace) -> None:
    from nnunet_topomae.nnunet.weights.exporting import export

    _clean_up_when_ended()
    say(f"Written: {export(options.checkpoint, options.o)}; nnUNetv2_topomae adapt reads it back")


def _report(options: argparse.Namespace) -> None:
    from nnunet_topomae.commands import report

    for folder in report.run(options.folders, options.o, overwrite=options.overwrite):
        say(f"WARNING: {folder} is left out, as it holds no checkpoint")
    say(f"Written: {options.o}; open it in a browser")


def _demo(options: argparse.Namespace) -> None:
    from nnunet_topomae.commands import demo

    demo.run(options.keep)


def _check_configurations(names: Sequence[str]) -> None:
    if "2d" in names:
        raise ValueError("-c 2d: these plans are for 3D images and have no 2d configuration; use 3d_fullres")
    if unknown := sorted(set(names) - set(_CONFIGURATIONS)):
        raise ValueError(f"-c {unknown[0]}: there is no such configuration; use {' or '.join(_CONFIGURATIONS)}")


def _check_processes(numbers: Sequence[int] | None, configurations: Sequence[str]) -> None:
    if numbers and len(numbers) not in (1, len(configurations)):
        raise ValueError(
            f"-np {' '.join(map(str, numbers))}: give one number for all configurations, or one for each of "
            f"{' '.join(configurations)}"
        )


def _print_next_commands(
    planner: "type[PretrainingPlanner]", dataset_id: int, configuration: str, plans_name: str, preprocessed: bool
) -> None:
    plans_name = shlex.quote(plans_name)
    train = f"nnUNetv2_train {dataset_id} {configuration} 0 -p {plans_name} -tr"
    commands = [
        'export nnUNet_extTrainer="$(nnUNetv2_topomae trainers)"',
        f"{train} {planner.pretrainer}",
        f"{train} {planner.finetuner}",
        f"nnUNetv2_predict -d {dataset_id} -c {configuration} -f 0 -p {plans_name} -tr {planner.finetuner} "
        "-i IN -o OUT",
    ]
    if not preprocessed:
        commands.insert(0, f"nnUNetv2_preprocess -d {dataset_id} -plans_name {plans_name} -c {configuration}")
    say("\nNext:\n")
    for command in commands:
        say(f"    {command}")


if __name__ == "__main__":
    sys.exit(main())
