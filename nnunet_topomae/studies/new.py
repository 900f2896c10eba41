"""``nnUNetv2_topomae study new``: checks everything, then writes the plans of all runs, the split and study.json."""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnunetv2
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_topomae import trainers
from nnunet_topomae.files import read_json, write_json
from nnunet_topomae.networks import UNETRPP
from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from nnunet_topomae.nnunet.data.raw import dataset_name, read_dataset
from nnunet_topomae.nnunet.data.splits import SPLITS as SPLIT_FILE
from nnunet_topomae.nnunet.data.splits import Split, as_entries, check_all_added, existing_label_counts, label_counts
from nnunet_topomae.nnunet.finding import find_class
from nnunet_topomae.nnunet.planning.plans import FINETUNING, PRETRAINING, check_strides
from nnunet_topomae.nnunet.training.pretraining import Pretrainer, external_folders
from nnunet_topomae.nnunet.training.stage import StageTrainer
from nnunet_topomae.settings import FinetuningConfig, PretrainingConfig, StageConfig, flatten, to_block
from nnunet_topomae.studies.definition import FILE, PREPROCESSING, SPLITS, Row, Run, Study, check_main
from nnunet_topomae.studies.presets import LABEL_COUNTS, RowKind, baseline_of
from nnunet_topomae.studies.statistics import labelled_cases

_FIRST_SEED = 12345  # nnU-Net's split seed, the default of both blocks
_MOST_ITERATIONS, _LEAST_ITERATIONS, _TRAINING_PER_VALIDATION = 250, 10, 5  # per epoch: nnU-Net's; ours; nnU-Net's
_LEAST_EPOCHS = 10
_WARMUP_SHARE = 0.05  # MAE
_IN_EPOCHS = ("warmup_epochs", "freeze_epochs")  # belong to the num_epochs that the plans had
_OF_FUSION = ("vit", "taps", "pyramid_channels", "pyramid_blocks", "fusion_gain", "drop_path")
_OF_OTHERS = ("inherits_from", "next_stage")  # name configurations that the plans of a study do not have
_NAME = re.compile(r"[A-Za-z0-9]+(?:[-_.][A-Za-z0-9]+)*")


@dataclass(frozen=True)
class Wishes:
    """What the user asks for. None: what the plans that the study is made with have.

    Attributes:
        configuration: of all plans.
        plans: name of the plans that crop and batch are taken from, and that rows of the fused network start from.
        labelled: numbers of labelled cases; none for all cases that are left, with the preset ``labels`` for those of
            5, 10, 20 and 40 that there are cases for, and with an existing split for those that it has.
        num_seeds: how often every run is repeated with other seeds.
        num_val, num_test: numbers of validation and test cases; None for a fifth of the cases to test on.
        patient: see :class:`~nnunet_topomae.nnunet.data.splits.Split`.
        split_seed: by which cases are drawn.
        iterations, pretraining_iterations: training steps of all fine-tunings and of all pre-trainings.
        recipe: of all fine-tunings.
        batch_size: of all trainings.
        nsd_tolerance: of the normalised surface Dice, in mm.
        existing_split: whether the cases are those of the dataset's split; then ``num_val``, ``num_test``, ``patient``
            and ``split_seed`` are not used.
        disable_tta: whether test cases are predicted without mirroring.
        main: name of the row whose comparison the study is made for; None to name none.
    """

    configuration: str
    plans: str
    labelled: Sequence[int]
    num_seeds: int
    num_val: int
    num_test: int | None
    patient: str | None
    split_seed: int
    iterations: int | None
    pretraining_iterations: int | None
    recipe: str
    batch_size: int | None
    nsd_tolerance: float
    existing_split: bool
    disable_tta: bool
    main: str | None


def make_study(
    folder: Path, dataset_id: int, kinds: Mapping[str, RowKind], wishes: Wishes, preset: str | None
) -> Study:
    """Check, then write a study; nothing is written if anything is wrong.

    Args:
        folder: to make; must not exist or be empty.
        dataset_id: of a preprocessed dataset.
        kinds: the rows by name.
        wishes: what the user asks for.
        preset: decides which numbers of labels are the default.

    Raises:
        FileNotFoundError, ValueError: one sentence that says what is missing or wrong.
    """
    _check_folder(folder)
    check_main(wishes.main, {name: other for name in kinds if (other := baseline_of(name, kinds))})
    dataset = dataset_name(dataset_id)
    cases = sorted(read_dataset(Path(nnUNet_raw) / dataset)[1])
    base = _PlansFiles(dataset_id, dataset, wishes.configuration)
    splits = existing_label_counts(base.folder, cases) if wishes.existing_split else _splits(cases, wishes, preset)
    draws = _draws(splits, wishes, base.folder / SPLIT_FILE)
    check_all_added(base.folder, splits[0])
    common = _Common.of(base.read(wishes.plans), wishes)
    planned = {name: common.plan(base.read(kind.plans or wishes.plans), kind) for name, kind in kinds.items()}
    settings = {
        name: {**check_row(plans, wishes.configuration, kinds[name]), **base.images(kinds[name], wishes.plans)}
        for name, plans in planned.items()
    }
    for name, kind in kinds.items():
        if kind.pretrainer:
            base.check_others(kind.plans or wishes.plans, settings[name])
    differing = differences(settings)
    rows = [
        Row(
            name,
            kind.title,
            kind.pretrainer,
            kind.finetuner,
            differing[name],
            kind.pretrainer is None,
            baseline_of(name, kinds),
            [
                Run(len(splits[fold].train), seed, f"{folder.resolve().name}_{name}_seed{seed}", fold)
                for seed, folds in enumerate(draws)
                for fold in folds
            ],
        )
        for name, kind in kinds.items()
    ]
    study = Study(
        folder,
        dataset,
        wishes.configuration,
        [len(splits[fold].train) for fold in draws[0]],
        list(range(wishes.num_seeds)),
        splits[0].test,
        wishes.nsd_tolerance,
        rows,
        disable_tta=wishes.disable_tta,
        main=wishes.main,
        patient=splits[0].patient,
    )
    files = {
        base.file(run.plans): seeded(planned[row.name], run.plans, wishes.configuration, run.seed)
        for row in rows
        for run in row.runs
    }
    _write(study, as_entries(splits), files, base.folder / SPLIT_FILE)
    return study


def _check_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already, and is not empty; name a new folder")
    if not _NAME.fullmatch(folder.resolve().name):
        raise ValueError(
            f'the plans of a study are named after its folder, so "{folder.resolve().name}" must have letters, digits '
            f"and single - _ . only"
        )


def _splits(cases: Sequence[str], wishes: Wishes, preset: str | None) -> list[Split]:
    num_test = wishes.num_test or max(round(len(cases) / 5), 1)
    left = len(cases) - num_test - wishes.num_val
    if left < 1:
        raise ValueError(
            f"{wishes.num_val} validation and {num_test} test cases leave none of {len(cases)} to train on"
        )
    usual = [count for count in LABEL_COUNTS if count <= left] if preset == "labels" else []
    counts = wishes.labelled or usual or [left]
    num_draws = wishes.num_seeds if min(counts) < left else 1
    return label_counts(cases, counts, wishes.num_val, num_test, wishes.split_seed, wishes.patient, num_draws)


def _draws(splits: Sequence[Split], wishes: Wishes, file: Path) -> list[list[int]]:
    """The folds of each seed: every seed has its own draw of labelled cases, or all have the only one.

    Raises:
        ValueError: if an existing split has several draws, but not for every seed, or not the wished numbers of
            labelled cases.
    """
    num_seeds, counts = wishes.num_seeds, {len(split.train) for split in splits}
    chosen = set(wishes.labelled) or counts
    if missing := chosen - counts:
        raise ValueError(
            f"{file} has no fold with {labelled_cases(min(missing))}; give --labelled some of "
            f"{' '.join(map(str, sorted(counts)))}, or leave it out"
        )
    wanted = [fold for fold, split in enumerate(splits) if len(split.train) in chosen]
    draws = [wanted[first : first + len(chosen)] for first in range(0, len(wanted), len(chosen))]
    if 1 < len(draws) < num_seeds:
        raise ValueError(
            f"{file} draws labelled cases {len(draws)} times, but the study has {num_seeds} seeds; make it with "
            f"--seeds {len(draws)}, or add draws to the file"
        )
    return draws[:num_seeds] if len(draws) > 1 else draws * num_seeds


class _PlansFiles:
    """The plans of a preprocessed dataset."""

    def __init__(self, dataset_id: int, dataset: str, configuration: str):
        self.dataset_id, self.configuration = dataset_id, configuration
        self.folder = Path(nnUNet_preprocessed) / dataset

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def read(self, name: str) -> dict[str, Any]:
        """Plans whose configuration has been preprocessed, with the keys that it inherits.

        Raises:
            FileNotFoundError, ValueError: if they have not been made or preprocessed; names the command that does it.
        """
        commands = "nnUNetv2_topomae plan_and_preprocess, or nnUNetv2_plan_experiment and nnUNetv2_preprocess"
        if not self.file(name).is_file():
            raise FileNotFoundError(f"{self.file(name)} does not exist; plan dataset {self.dataset_id} with {commands}")
        plans = read_json(self.file(name))
        dataset = PlannedDataset.of(self.dataset_id, name)
        (configuration,) = dataset.configurations([self.configuration])
        resolved = dataset.plans.get_configuration(configuration).configuration
        plans["configurations"] = {configuration: {k: v for k, v in resolved.items() if k not in _OF_OTHERS}}
        missing = set(read_dataset(Path(nnUNet_raw) / self.folder.name)[1]).difference(
            dataset.labelled_cases(configuration)
        )
        if missing:
            raise ValueError(
                f"{min(missing)} is not in {dataset.labelled_folder(configuration)}; preprocess it with "
                f"nnUNetv2_preprocess -d {self.dataset_id} -plans_name {name} -c {configuration}"
            )
        return plans

    def images(self, kind: RowKind, plans: str) -> dict[str, Any]:
        """How the images of a row were preprocessed, flat, and how many without labels its pre-training has."""
        dataset = PlannedDataset.of(self.dataset_id, kind.plans or plans)
        found = flatten(dataset.preprocessing(self.configuration), PREPROCESSING)
        if kind.pretrainer:
            found[f"{PRETRAINING}.added_images"] = len(dataset.unlabelled_cases(self.configuration))
        return found

    def check_others(self, plans: str, settings: Mapping[str, Any]) -> None:
        """See that the other datasets that a row is pre-trained on are there, preprocessed like this one.

        Raises:
            FileNotFoundError, ValueError: see :meth:`PlannedDataset.open_others`.
        """
        others, of_others = (settings[f"{PRETRAINING}.{key}"] for key in ("datasets", "datasets_plans"))
        PlannedDataset.of(self.dataset_id, plans).open_others(others, of_others, self.configuration)


@dataclass(frozen=True)
class _Common:
    """What all rows have in common, so that nothing else than what they compare makes a difference."""

    configuration: str
    crop: list[int]
    batch_size: int
    pretraining: dict[str, Any]
    finetuning: dict[str, Any]

    @classmethod
    def of(cls, plans: dict[str, Any], wishes: Wishes) -> "_Common":
        configuration = plans["configurations"][wishes.configuration]
        pretraining = schedule(
            wishes.pretraining_iterations or _iterations(configuration.get(PRETRAINING, {}), PretrainingConfig)
        )
        finetuning = schedule(wishes.iterations or _iterations(configuration.get(FINETUNING, {}), FinetuningConfig))
        return cls(
            wishes.configuration,
            configuration["patch_size"],
            wishes.batch_size or configuration["batch_size"],
            {**pretraining, "warmup_epochs": round(_WARMUP_SHARE * pretraining["num_epochs"], 2)},
            {"recipe": wishes.recipe, **finetuning},
        )

    def plan(self, plans: dict[str, Any], kind: RowKind) -> dict[str, Any]:
        """Plans of a row."""
        plans = deepcopy(plans)
        configuration = plans["configurations"][self.configuration]
        architecture = configuration["architecture"]
        configuration.update(patch_size=self.crop, batch_size=self.batch_size)
        if "crop_size" in architecture["arch_kwargs"]:
            architecture["arch_kwargs"]["crop_size"] = self.crop
        if kind.without_vit:
            architecture["network_class_name"] = f"{UNETRPP.__module__}.{UNETRPP.__name__}"
            architecture["arch_kwargs"] = {
                key: value for key, value in architecture["arch_kwargs"].items() if key not in _OF_FUSION
            }
        pretraining = configuration[PRETRAINING] = {**configuration.get(PRETRAINING, {}), **self.pretraining}
        if pretraining.get("datasets"):  # which have no plans of the study
            pretraining["datasets_plans"] = pretraining.get("datasets_plans") or plans["plans_name"]
        own = {key: value for key, value in configuration.get(FINETUNING, {}).items() if key not in _IN_EPOCHS}
        configuration[FINETUNING] = {**own, **self.finetuning, "from_scratch": kind.pretrainer is None}
        for key, value in kind.settings.items():
            *parents, last = key.split(".")
            block = configuration
            for parent in parents:
                block = block.setdefault(parent, {})
            block[last] = value
        return plans


def _iterations(block: Mapping[str, Any], config: type[StageConfig]) -> int:
    """Training steps that a block of plans asks for, defaults filled in."""
    return block.get("num_epochs", config.num_epochs) * block.get(
        "num_iterations_per_epoch", config.num_iterations_per_epoch
    )


def schedule(iterations: int) -> dict[str, int]:
    """Divide training steps into epochs: of 250 steps as in nnU-Net, or of fewer if that would be below 10 epochs.

    Epochs are a little shorter where that divides the number of steps; where no length of at least 10 steps does, a few
    steps more or fewer are made.

    Example:
        >>> schedule(5000)
        {'num_epochs': 20, 'num_iterations_per_epoch': 250, 'num_val_iterations_per_epoch': 50}
        >>> schedule(2600)
        {'num_epochs': 13, 'num_iterations_per_epoch': 200, 'num_val_iterations_per_epoch': 40}
        >>> schedule(100)
        {'num_epochs': 10, 'num_iterations_per_epoch': 10, 'num_val_iterations_per_epoch': 2}
    """
    most = min(_MOST_ITERATIONS, max(iterations // _LEAST_EPOCHS, 1))
    per_epoch = next((each for each in range(most, _LEAST_ITERATIONS - 1, -1) if iterations % each == 0), most)
    return {
        "num_epochs": round(iterations / per_epoch),
        "num_iterations_per_epoch": per_epoch,
        "num_val_iterations_per_epoch": max(per_epoch // _TRAINING_PER_VALIDATION, 1),
    }


def seeded(plans: dict[str, Any], name: str, configuration: str, seed: int) -> dict[str, Any]:
    """Plans of a run: those of its row under another name and with other seeds."""
    plans = deepcopy(plans)
    plans["plans_name"] = name
    for block in (PRETRAINING, FINETUNING):
        plans["configurations"][configuration][block]["seed"] = _FIRST_SEED + seed
    return plans


def check_row(plans: dict[str, Any], configuration_name: str, kind: RowKind) -> dict[str, Any]:
    """See that both trainers of a row can train its plans.

    Returns:
        The settings of the row, flat: its network, the arguments of that, and those of both blocks that are used.

    Raises:
        ValueError: names the trainer that there is not, or the setting that is wrong.
    """
    configuration = PlansManager(plans).get_configuration(configuration_name)
    try:
        check_strides(configuration)
    except ValueError as error:
        raise ValueError(
            f"{kind.title}: {error}; all rows share the crop, so make the study with other plans (-p)"
        ) from error
    settings: dict[str, Any] = {"network": configuration.network_arch_class_name.split(".")[-1]}
    settings |= flatten(configuration.network_arch_init_kwargs, "architecture.")
    for name, block, parent in (
        (kind.pretrainer, PRETRAINING, Pretrainer),
        (kind.finetuner, FINETUNING, nnUNetTrainer),
    ):
        if name is None:
            continue
        trainer = find_trainer(name, parent)
        settings[f"{block}.trainer"] = name
        if issubclass(trainer, StageTrainer):
            settings |= flatten(to_block(trainer.check_plans(plans, configuration_name)[block]), f"{block}.")
    settings.pop(f"{FINETUNING}.from_scratch", None)  # which having no pre-training trainer says
    return settings


def find_trainer(name: str, parent: type) -> Any:
    """A trainer of ours, of ``nnUNet_extTrainer`` or of nnU-Net.

    Raises:
        ValueError: if there is none that is a ``parent``.
    """
    found: Iterable[Any] = (find_class(name, folder, parent) for folder in (trainers.FOLDER, *external_folders()))
    own = next((trainer for trainer in found if trainer), None)
    if own is None and parent is nnUNetTrainer:
        folder = Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer"
        own = recursive_find_python_class(str(folder), name, "nnunetv2.training.nnUNetTrainer")
    if own is None:
        kind = "pre-training trainer" if parent is Pretrainer else "trainer"
        raise ValueError(f"there is no {kind} {name}, neither in {trainers.FOLDER} nor in nnUNet_extTrainer")
    return own


def differences(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings in which rows differ, by row.

    Settings of pre-training are compared among pre-trained rows, arguments of networks among rows of the same network.
    """
    rows = settings.items()

    def differs(key: str, value: Any, network: str) -> bool:
        others = (o for _, o in rows if key in o and (not key.startswith("architecture.") or o["network"] == network))
        return any(other[key] != value for other in others)

    return {
        name: {key: value for key, value in own.items() if differs(key, value, own["network"])} for name, own in rows
    }


def _write(study: Study, splits: list[dict[str, Any]], plans: Mapping[Path, dict[str, Any]], split_file: Path) -> None:
    """Write all files of a new study; if one cannot be written, none stays.

    A split that is there stays if it begins with the folds of the study; further draws are appended to one that has the
    first of them.
    """
    there = read_json(split_file, list) if split_file.exists() else []
    if there[: len(splits)] != splits[: len(there)]:
        raise ValueError(
            f"{split_file} is there already with other cases than those of the study, and trainings may rest on it; "
            f"move it away, or make the study with the options that it was made with"
        )
    if existing := [file for file in plans if file.exists()]:
        raise ValueError(f"{existing[0]} is there already; name another folder, after which the plans are named")
    study.folder.mkdir(parents=True, exist_ok=True)
    try:
        for file, content in plans.items():
            write_json(content, file)
        write_json(splits, study.folder / SPLITS)
        study.write()
        if len(splits) > len(there):
            write_json(splits, split_file)
    except BaseException:
        for file in (*plans, study.folder / SPLITS, study.folder / FILE):
            file.unlink(missing_ok=True)
        raise
