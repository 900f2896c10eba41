"""What ``python -m nnunet_topomae.distributed`` refuses."""

import sys

import pytest
import torch

from nnunet_topomae import distributed


def test_more_processes_than_gpus_are_refused_before_they_wait_for_each_other(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["distributed", "4", "3d_fullres", "0"])
    with pytest.raises(SystemExit, match=r"more processes than this machine has GPUs \(1\): lower --nproc_per_node"):
        distributed.main()
