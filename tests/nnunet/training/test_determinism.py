"""What a training asks of a GPU so that it computes the same again, and that nothing of it is left behind."""

import os

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.backends import cudnn

from nnunet_topomae.nnunet.training.determinism import deterministic_algorithms

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def flags():
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cuDNN chooses by timing": cudnn.benchmark,
        "cuDNN is deterministic": cudnn.deterministic,
        "cuBLAS": os.environ.get(WORKSPACE),
        "fused attention": torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled(),
        "attention step by step": torch.backends.cuda.math_sdp_enabled(),
    }


DETERMINISTIC = {
    "algorithms": True,
    "warn only": True,
    "cuDNN chooses by timing": False,
    "cuDNN is deterministic": True,
    "cuBLAS": ":4096:8",
    "fused attention": False,
    "attention step by step": True,
}


@pytest.fixture
def as_nnunet_sets_it(monkeypatch):
    """What nnU-Net's command sets before it trains; the state of PyTorch is put back after the test."""
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    monkeypatch.delenv(WORKSPACE, raising=False)
    return flags()


def test_everything_is_as_before_afterwards_after_an_error_too(as_nnunet_sets_it):
    assert flags() != DETERMINISTIC
    within = []

    def fail():
        with deterministic_algorithms():
            within.append(flags())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert within == [DETERMINISTIC]
    assert flags() == as_nnunet_sets_it


def test_a_workspace_that_was_chosen_stays(as_nnunet_sets_it, monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic_algorithms():
        assert flags()["cuBLAS"] == ":16:8"
    assert flags() == {**as_nnunet_sets_it, "cuBLAS": ":16:8"}


def test_what_was_deterministic_already_stays_so(as_nnunet_sets_it):
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic_algorithms():
            assert flags() == DETERMINISTIC
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["TopoMAEPretrainer", "FusedFinetuneTrainer"])
@pytest.mark.parametrize(
    ("deterministic", "device", "is_set"), [(True, "cuda", True), (True, "cpu", False), (False, "cuda", False)]
)
def test_a_training_asks_for_it_where_the_plans_do(
    workspace, as_nnunet_sets_it, monkeypatch, name, deterministic, device, is_set
):
    def edit(configuration):
        for block in ("pretraining", "finetuning"):
            configuration[block]["deterministic"] = deterministic

    trainer = workspace.trainer(name, workspace.write_plans(f"Deterministic{deterministic}", edit))
    trainer.device = torch.device(device)
    seen = []
    monkeypatch.setattr(nnUNetTrainer, "run_training", lambda self: seen.append(flags()))
    trainer.run_training()
    assert seen == [DETERMINISTIC if is_set else as_nnunet_sets_it]
    assert flags() == as_nnunet_sets_it
