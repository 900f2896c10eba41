"""A preprocessed phantom dataset and trainers on it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset, preprocess_dataset
from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.run import run_training
from nnunetv2.utilities import utils

from nnunet_topomae.commands import cli
from nnunet_topomae.commands.demo import shrink_configuration
from nnunet_topomae.commands.phantom import write_dataset
from tiny import PLANNED_CROP, PLANNED_NETWORK, SCHEDULE

DATASET = "Dataset998_Phantom"
PLANS = "nnUNetTopoMAEPlans"
SETTINGS = {"pretraining": {**SCHEDULE, "topology": {"grid": [12, 16, 16]}}, "finetuning": SCHEDULE}
PLAN = ["plan_and_preprocess", "-c", "3d_fullres", "-np", "1", "-npfp", "1", "--no_pbar", "-d"]  # an ID follows


class Workspace:
    """nnU-Net's three folders with a planned and preprocessed phantom dataset."""

    def __init__(self, folder: Path, dataset: str = DATASET):
        self.folder, self.dataset = folder, dataset
        self.raw = folder / "raw" / dataset
        self.preprocessed = folder / "preprocessed" / dataset
        self.results = folder / "results" / dataset

    def plans(self, name: str = PLANS) -> dict:
        return json.loads((self.preprocessed / f"{name}.json").read_text())

    def write_plans(self, name: str, edit=lambda configuration: None, like: str = PLANS) -> str:
        """Plans of another name, edited by ``edit(configuration)``. Tests share the folder: each has its own names."""
        plans = deepcopy(self.plans(like))
        plans["plans_name"] = name
        edit(plans["configurations"]["3d_fullres"])
        (self.preprocessed / f"{name}.json").write_text(json.dumps(plans))
        return name

    def trainer(
        self, name: str, plans: str = PLANS, fold: int | str = 0, continue_training: bool = False, pictures: int = 0
    ):
        """A trainer as nnU-Net's command makes it.

        Args:
            pictures: the number of last epochs after which it draws ``progress.png``, which takes longer than an epoch.
        """
        trainer = run_training.get_trainer_from_args(
            self.dataset, "3d_fullres", fold, name, plans, continue_training, torch.device("cpu")
        )
        draw = trainer.logger.plot_progress_png

        def draw_after_last_epochs(folder: str) -> None:
            if trainer.current_epoch >= trainer.num_epochs - pictures:
                draw(folder)

        trainer.logger.plot_progress_png = draw_after_last_epochs
        return trainer

    def checkpoint(self, trainer: str, plans: str = PLANS, fold: int | str = 0, name: str = "final") -> Path:
        return self.results / f"{trainer}__{plans}__3d_fullres" / f"fold_{fold}" / f"checkpoint_{name}.pth"


@contextmanager
def nothing_to_wait_for() -> Iterator[pytest.MonkeyPatch]:
    """Replaces what nnU-Net does in other processes or over and over; tests/end_to_end has the real thing.

    Starting a process takes as long as importing PyTorch, and nnU-Net searches all of its files for each trainer.
    """
    threads = SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint_extractor, "multiprocessing", threads)
        patch.setattr(default_preprocessor, "multiprocessing", threads)
        patch.setattr(utils, "Pool", ThreadPool)  # 12 processes, whenever the files of a dataset are listed
        find = run_training.recursive_find_trainer_class_by_name
        patch.setattr(run_training, "recursive_find_trainer_class_by_name", cache(find))
        yield patch


def set_folders(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make nnU-Net's folders and let its environment point to them."""
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        patch.setenv(f"nnUNet_{name}", str(folder / name))


def plan_phantoms(folder: Path) -> None:
    """Make, plan and preprocess a phantom dataset: with our planner and a tiny network, and with nnU-Net's planners."""
    space = Workspace(folder)
    with nothing_to_wait_for() as patch:
        set_folders(patch, folder)
        write_dataset(space.raw, num_training=5, num_test=0)
        assert cli.main([*PLAN, "998"]) == 0
        for planner in (ExperimentPlanner, nnUNetPlannerResEncM):
            plan_experiment_dataset(998, planner)
        preprocess_dataset(998, "nnUNetPlans", ("3d_fullres",), (1,))  # ResEnc shares its folder
    space.write_plans(PLANS, lambda c: shrink_configuration(c, PLANNED_CROP, PLANNED_NETWORK, SETTINGS))


def snapshot(folder: Path) -> dict[Path, int]:
    """When each file of a folder was written, to show that a command left all as it was."""
    return {file: file.stat().st_mtime_ns for file in sorted(folder.rglob("*")) if file.is_file()}


def truncate(file: Path) -> None:
    """Cut off the second half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


ANYTHING = "<what the library says>"


def says(said: str, expected: str) -> bool:
    """Whether a message is the expected one as a whole.

    Texts of libraries, such as those of nibabel and PyTorch, differ from version to version, so ``ANYTHING`` stands
    for them in ``expected``; what is ours before and after them must be as expected.
    """
    if ANYTHING not in expected:
        return said == expected
    before, after = expected.split(ANYTHING)
    return said.startswith(before) and said.endswith(after) and len(said) > len(before) + len(after)


def refused(arguments, capsys) -> str:
    """What a command line that must fail prints on standard error."""
    try:
        status = cli.main(list(map(str, arguments)))
    except SystemExit as stop:  # argparse
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in said
    assert said.strip()
    return said
