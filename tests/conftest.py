import os

os.environ.setdefault("nnUNet_n_proc_DA", "1")  # read by nnU-Net when it is imported
os.environ.setdefault("nnUNet_def_n_proc", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # each process has one core; read by PyTorch when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch


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
