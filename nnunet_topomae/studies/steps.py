"""The commands that a study consists of, and what their files say about how far it has come.

Nothing else is remembered: a command whose files are there is done, and any other one is run, or continued.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results

from nnunet_topomae.files import read_json
from nnunet_topomae.nnunet.data.raw import read_dataset
from nnunet_topomae.nnunet.data.splits import SPLITS as SPLIT_FILE
from nnunet_topomae.nnunet.data.splits import read_splits
from nnunet_topomae.nnunet.planning.plans import FINETUNING
from nnunet_topomae.nnunet.training.checkpointing import FINAL, checkpoints_in
from nnunet_topomae.studies.definition import FILE, SPLITS, Row, Run, Study, predictions_folder

SUMMARY = "validation/summary.json"
_PRETRAINING_FOLD = 0  # all folds have the same images
PRETRAIN, FINETUNE, PREDICT = "pre-training", "fine-tuning", "prediction"


@dataclass(frozen=True)
class Step:
    """A command of a study; what its files say is looked up whenever it is asked for.

    Attributes:
        stage: ``PRETRAIN``, ``FINETUNE`` or ``PREDICT``.
        name: names its log.
        command: nnU-Net's command and the arguments that it always has.
        folder: of the fold that is trained; of a prediction the folder that ``partial``, into which it is written, is
            renamed to.
        weights: the checkpoint that a training starts from; None if it starts from its seed.
    """

    stage: str
    name: str
    command: tuple[str, ...]
    folder: Path
    weights: Path | None = None

    @property
    def partial(self) -> Path | None:
        """The folder of a prediction that is not finished."""
        return unfinished(self.folder) if self.stage == PREDICT else None

    @property
    def is_done(self) -> bool:
        """Whether its files are there."""
        if self.stage == PREDICT:
            return self.folder.is_dir()
        return (self.folder / FINAL).is_file() and (self.folder / SUMMARY).is_file()

    @property
    def words(self) -> tuple[str, ...]:
        """The command line: a training that has begun goes on, one that lacks its validation is validated.

        ``train`` in ``scripts.py`` says the same as a function of shell.
        """
        if self.stage == PREDICT:
            return self.command
        if (self.folder / FINAL).is_file():
            return (*self.command, "--val")
        if checkpoints_in(self.folder):
            return (*self.command, "--c")
        return (*self.command, "-pretrained_weights", str(self.weights)) if self.weights else self.command


def unfinished(predictions: Path) -> Path:
    """The folder that predictions are written into until they are complete."""
    return predictions.with_name(f".{predictions.name}.partial")


class Steps:
    """The steps of a study.

    Args:
        study: as it was read.
        device: of nnU-Net's commands: cuda, cpu or mps.
        num_processes: of each, preprocessing and export, in prediction.
    """

    def __init__(self, study: Study, device: str = "cuda", num_processes: int = 3):
        self.study, self.device, self.num_processes = study, device, num_processes
        self.results = Path(nnUNet_results) / study.dataset
        self._plans: dict[str, dict[str, Any]] = {}

    @property
    def preprocessed(self) -> Path:
        """The folder of the plans and of the split."""
        return Path(nnUNet_preprocessed) / self.study.dataset

    def check(self) -> None:
        """See that the study still is what it was when its runs were made.

        Raises:
            FileNotFoundError, ValueError: one sentence that names the file that is missing or has changed.
        """
        where = self.study.folder / FILE
        ours, now = self.study.folder / SPLITS, self.preprocessed / SPLIT_FILE
        kept = read_json(ours, list)
        if not now.is_file() or read_json(now, list)[: len(kept)] != kept:
            raise ValueError(f"{now} is not the split of this study any more; copy {ours} there, or make a new study")
        splits = read_splits(self.preprocessed)[: len(kept)]
        for fold, split in enumerate(splits):
            if sorted(split.test) != sorted(self.study.test_cases):
                raise ValueError(f"{where}: test_cases are not those of fold {fold} in {ours}; restore them")
            if seen := {*split.train, *split.val, *split.unlabelled}.intersection(split.test):
                raise ValueError(f"{ours}: {min(seen)} is a test case, and is trained or validated on in fold {fold}")
        for row, run in self.study.runs():
            if run.fold >= len(splits) or len(splits[run.fold].train) != run.labelled:
                raise ValueError(f"{where}: {row.name}: fold {run.fold} has not {run.labelled} labelled cases")
            self._check_plans(row, run)
            self._check_predictions(row, run)

    def plans(self, name: str) -> dict[str, Any]:
        """The content of a plans file.

        Raises:
            FileNotFoundError, ValueError: if it is missing, or has not the study's configuration.
        """
        if name not in self._plans:
            file = self.preprocessed / f"{name}.json"
            plans, wanted = read_json(file), self.study.configuration
            configurations = plans.get("configurations")
            if not isinstance(configurations, dict) or not isinstance(configurations.get(wanted), dict):
                raise ValueError(f"{file} has no configuration {wanted}, which {self.study.folder / FILE} is about")
            self._plans[name] = plans
        return self._plans[name]

    def _check_plans(self, row: Row, run: Run) -> None:
        plans = self.plans(run.plans)
        if plans.get("dataset_name") != self.study.dataset or plans.get("plans_name") != run.plans:
            raise ValueError(
                f"{self.preprocessed / run.plans}.json are the plans {plans.get('plans_name')} of "
                f"{plans.get('dataset_name')}; restore those of {row.name}, seed {run.seed}"
            )
        for trainer, ignored in ((row.pretrainer, (FINETUNING,)), (row.finetuner, ())):
            file = self._output(trainer, run.plans) / "plans.json"
            if trainer is None or not file.is_file():
                continue
            written, present = (self._without(content, ignored) for content in (read_json(file), plans))
            if written != present:
                raise ValueError(
                    f"{self.preprocessed / run.plans}.json has changed since {row.name} was trained with it "
                    f"({_first_difference(written, present)}); restore it from {file}, or add the changed plans to a "
                    f"new study"
                )

    def _check_predictions(self, row: Row, run: Run) -> None:
        folder = self.predictions(row, run)
        if not folder.is_dir():
            return
        cases = {file.name.removesuffix(self.file_ending) for file in folder.glob(f"*{self.file_ending}")}
        if others := cases.symmetric_difference(self.study.test_cases):
            case = min(others)
            what = f"holds {case}, which is no test case of this study" if case in cases else f"lacks test case {case}"
            raise ValueError(f"{folder} {what}; move the folder away, and it is predicted again")

    def _without(self, plans: Mapping[str, Any], blocks: tuple[str, ...]) -> dict[str, Any]:
        configuration = plans["configurations"][self.study.configuration]
        kept = {key: value for key, value in configuration.items() if key not in blocks}
        return {**plans, "configurations": {self.study.configuration: kept}}

    @cached_property
    def dataset(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Description and files of the raw dataset; see :func:`~nnunet_topomae.nnunet.data.raw.read_dataset`."""
        return read_dataset(Path(nnUNet_raw) / self.study.dataset)

    @property
    def file_ending(self) -> str:
        """Of images and labels."""
        return self.dataset[0]["file_ending"]

    def _output(self, trainer: str | None, plans: str) -> Path:
        return self.results / f"{trainer}__{plans}__{self.study.configuration}"

    def pretraining_fold(self, row: Row, run: Run) -> Path:
        """The folder of the pre-training that a run starts from, which other rows may start from, too."""
        return self._output(row.pretrainer, self._pretraining(row, run)[1]) / f"fold_{_PRETRAINING_FOLD}"

    def finetuning_fold(self, row: Row, run: Run) -> Path:
        """The folder of the fine-tuning of a run."""
        return self._output(row.finetuner, run.plans) / f"fold_{run.fold}"

    def predictions(self, row: Row, run: Run) -> Path:
        """The folder of the predicted test cases of a run."""
        return predictions_folder(self.study.folder, row.name, run.labelled, run.seed)

    @property
    def test_images(self) -> Path:
        """The folder that holds links to the images of the test cases, for nnUNetv2_predict."""
        return self.study.folder / "test_images"

    def link_test_images(self) -> None:
        """Make that folder.

        Raises:
            ValueError: if a test case is no longer in the dataset.
        """
        _, cases = self.dataset
        if missing := set(self.study.test_cases).difference(cases):
            raise ValueError(f"{min(missing)} is a test case of {self.study.folder}, but not in {self.study.dataset}")
        wanted = {
            f"{case}_{channel:04d}{self.file_ending}": Path(file).resolve()
            for case in self.study.test_cases
            for channel, file in enumerate(cases[case]["images"])
        }
        self.test_images.mkdir(exist_ok=True)
        for link in self.test_images.iterdir():
            if link.is_symlink() and wanted.get(link.name) != link.resolve():
                link.unlink()
        for name, file in wanted.items():
            if not (self.test_images / name).exists():
                (self.test_images / name).symlink_to(file)

    def of_run(self, row: Row, run: Run) -> Iterator[Step]:
        """The steps of a run, in their order."""
        name = f"{row.name}_{run.labelled}_seed{run.seed}"
        weights = None
        if row.pretrainer:
            owner, plans = self._pretraining(row, run)
            weights = self.pretraining_fold(row, run) / FINAL
            pretraining = f"{owner.name}_seed{run.seed}_pretraining"
            yield self._training(PRETRAIN, pretraining, row.pretrainer, plans, _PRETRAINING_FOLD)
        yield self._training(FINETUNE, f"{name}_finetuning", row.finetuner, run.plans, run.fold, weights)
        yield self._prediction(name, row, run)

    def _pretraining(self, row: Row, run: Run) -> tuple[Row, str]:
        """The first row with the same pre-training, and its plans: they differ in names and fine-tuning only."""

        def of(other: Row, plans: str) -> tuple:
            kept = self._without(self.plans(plans), (FINETUNING,))
            return other.pretrainer, json.dumps({**kept, "plans_name": ""}, sort_keys=True)

        wanted = of(row, run.plans)
        candidates = ((other, each.plans) for other in self.study.rows for each in other.runs if other.pretrainer)
        return next((other, plans) for other, plans in candidates if of(other, plans) == wanted)

    def _training(
        self, stage: str, name: str, trainer: str, plans: str, fold: int, weights: Path | None = None
    ) -> Step:
        study = self.study
        words = ("nnUNetv2_train", study.dataset, study.configuration, str(fold), "-p", plans, "-tr", trainer)
        folder = self._output(trainer, plans) / f"fold_{fold}"
        return Step(stage, name, (*words, "-device", self.device), folder, weights)

    def _prediction(self, name: str, row: Row, run: Run) -> Step:
        folder = self.predictions(row, run)
        model = ("-d", self.study.dataset, "-c", self.study.configuration, "-f", str(run.fold), "-p", run.plans)
        places = ("-i", str(self.test_images), "-o", str(unfinished(folder)))
        words = (
            "nnUNetv2_predict", *model, "-tr", row.finetuner, *places,
            "-device", self.device, "-npp", str(self.num_processes), "-nps", str(self.num_processes),
            *(("--disable_tta",) if self.study.disable_tta else ()),
        )  # fmt: skip
        return Step(PREDICT, f"{name}_prediction", words, folder)


def _first_difference(written: Any, present: Any, key: str = "") -> str:
    """Where two nested settings differ first, in words."""
    if isinstance(written, Mapping) and isinstance(present, Mapping):
        for name in dict.fromkeys([*written, *present]):
            if written.get(name) != present.get(name):
                return _first_difference(written.get(name), present.get(name), f"{key}.{name}".lstrip("."))
    return f"{key} was {written}, is {present}"
