"""What ``python -m nnunet_topomae.distributed`` refuses."""

import sys

import pytest
import torch

from nnunet_topomae import distributed


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        (1, r"more processes than this machine has GPUs \(1\): lower --nproc_per_node"),
        (0, "this machine has no GPU that PyTorch can use: train on its cores with -device cpu"),
    ],
)
def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch, gpus, said):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(sys, "argv", ["distributed", "4", "3d_fullres", "0"])
    with pytest.raises(SystemExit, match=said):
        distributed.main()
