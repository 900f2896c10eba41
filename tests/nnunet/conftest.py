import json
import os
import shutil
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset, preprocess_dataset
from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.run import run_training

from nnunet_topomae import trainers
from nnunet_topomae.commands import cli
from nnunet_topomae.commands.demo import shrink_configuration
from nnunet_topomae.commands.phantom import write_dataset
from workspace import CROP, DATASET, NETWORK, PLANS, SETTINGS, Workspace

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"  # a user's own trainers
FOLDERS = ("raw", "preprocessed", "results")


@pytest.fixture(scope="session", autouse=True)
def _nothing_to_wait_for():
    """Replaces what nnU-Net does in other processes or over and over; tests/end_to_end has the real thing.

    Starting a process takes as long as importing PyTorch, and nnU-Net searches all of its files for each trainer.
    """
    with pytest.MonkeyPatch.context() as patch:
        threads = SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool))
        patch.setattr(fingerprint_extractor, "multiprocessing", threads)
        patch.setattr(default_preprocessor, "multiprocessing", threads)
        find = run_training.recursive_find_trainer_class_by_name
        patch.setattr(run_training, "recursive_find_trainer_class_by_name", cache(find))
        yield


def _set_folders(patch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        patch.setenv(f"nnUNet_{name}", str(folder / name))


def _plan(folder: Path) -> None:
    """Make, plan and preprocess a phantom dataset: with our planner and a tiny network, and with nnU-Net's planners."""
    with pytest.MonkeyPatch.context() as patch:
        _set_folders(patch, folder)
        write_dataset(folder / "raw" / DATASET, num_training=5, num_test=0)
        arguments = ["-d", "998", "-c", "3d_fullres", "-np", "1", "-npfp", "1", "--no_pbar"]
        assert cli.main(["plan_and_preprocess", *arguments]) == 0
        for planner in (ExperimentPlanner, nnUNetPlannerResEncM):
            plan_experiment_dataset(998, planner)
        preprocess_dataset(998, "nnUNetPlans", ("3d_fullres",), (1,))  # ResEnc shares its folder
    space = Workspace(folder)
    plans = space.plans()
    shrink_configuration(plans["configurations"]["3d_fullres"], CROP, NETWORK, SETTINGS)
    (space.preprocessed / f"{PLANS}.json").write_text(json.dumps(plans))


@pytest.fixture(scope="session")
def planned(tmp_path_factory):
    """nnU-Net's folders with a planned dataset, made once for all processes of pytest-xdist; only to be copied."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of the folders of all processes
    folder = root / "planned"
    with FileLock(root / "planned.lock"):
        if not folder.is_dir():
            unfinished = root / "unfinished"
            _plan(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def workspace(planned, tmp_path_factory):
    """A planned and preprocessed dataset for all tests of trainers; nnU-Net's environment points to it."""
    folder = tmp_path_factory.mktemp("nnunet")
    shutil.copytree(planned, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        _set_folders(patch, folder)
        patch.setenv("nnUNet_extTrainer", os.pathsep.join((str(trainers.FOLDER), str(EXAMPLES))))
        patch.setenv("nnUNet_n_proc_DA", "0")  # batches are made in this process; test_stream.py has others
        yield Workspace(folder)


@pytest.fixture(scope="session")
def pretrained(workspace):
    """A finished pre-training of fold 0."""
    trainer = workspace.trainer("TopoMAEPretrainer")
    trainer.run_training()
    trainer.perform_actual_validation()
    return trainer
