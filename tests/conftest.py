import os

os.environ.setdefault("nnUNet_n_proc_DA", "1")  # read by nnU-Net when it is imported
os.environ.setdefault("nnUNet_def_n_proc", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # each process has one core; read by PyTorch when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_topomae.files import take_lock

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"  # a user's own trainers


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run tests that take minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --runslow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--runslow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --runslow"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _signals():
    """Leaves the handlers of signals as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def planned(tmp_path_factory):
    """nnU-Net's folders with a planned dataset, made once for all processes of pytest-xdist; only to be copied."""
    from workspace import plan_phantoms  # here, as importing nnU-Net takes seconds that other tests need not wait

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of the folders of all processes
    folder = root / "planned"
    with (root / "planned.lock").open("ab") as stream:
        take_lock(stream, print, wait=True)
        if not folder.is_dir():
            unfinished = root / "unfinished"
            plan_phantoms(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def workspace(planned, tmp_path_factory):
    """A planned and preprocessed dataset for all tests of trainers; nnU-Net's environment points to it."""
    from nnunet_topomae import trainers
    from workspace import Workspace, nothing_to_wait_for, set_folders

    folder = tmp_path_factory.mktemp("nnunet")
    shutil.copytree(planned, folder, dirs_exist_ok=True)
    with nothing_to_wait_for() as patch:
        set_folders(patch, folder)
        patch.setenv("nnUNet_extTrainer", os.pathsep.join((str(trainers.FOLDER), str(EXAMPLES))))
        patch.setenv("nnUNet_n_proc_DA", "0")  # batches are made in this process; test_stream.py has others
        yield Workspace(folder)


@pytest.fixture
def no_split(workspace):
    """The file of the split, set aside for a test if other tests have made it."""
    file = workspace.preprocessed / "splits_final.json"
    content = file.read_bytes() if file.exists() else None
    file.unlink(missing_ok=True)
    yield file
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)


@pytest.fixture
def other_dataset(workspace):
    """A second dataset with the same plans and cases."""
    folder = workspace.preprocessed.with_name("Dataset997_Other")
    shutil.copytree(workspace.preprocessed, folder)
    (workspace.folder / "raw" / folder.name).mkdir()
    yield folder
    shutil.rmtree(folder)
    (workspace.folder / "raw" / folder.name).rmdir()


@pytest.fixture(scope="session")
def pretrained(workspace):
    """A finished pre-training of fold 0."""
    trainer = workspace.trainer("TopoMAEPretrainer", pictures=3)
    trainer.run_training()
    trainer.perform_actual_validation()
    return trainer
