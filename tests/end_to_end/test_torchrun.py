"""Training that torchrun starts, of which a worker is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nnunet_topomae.nnunet.weights.checkpoints import read_checkpoint

TRAINER = "FusedFinetuneTrainer"
MODULE = "nnunet_topomae.distributed"


def _start(workspace, folder, plans):
    environment = {
        **os.environ,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "nnUNet_n_proc_DA": "0",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    training = [
        "-m",
        MODULE,
        workspace.dataset,
        "3d_fullres",
        "0",
        "-p",
        plans,
        "-tr",
        TRAINER,
        "-device",
        "cpu",
        "--c",
    ]
    log = folder / f"{plans}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *training], cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
    return process, log


def _workers(launcher):
    """IDs of the processes that a launcher has started to train."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children if MODULE in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.slow
def test_a_run_that_loses_a_worker_ends_as_one_that_does_not(workspace, tmp_path):
    def edit(configuration):
        configuration["batch_size"] = 2
        configuration["finetuning"] |= {"from_scratch": True, "save_every": 1, "num_epochs": 4}

    plans = workspace.write_plans("Elastic", edit), workspace.write_plans("ElasticKilled", edit)
    whole, log = _start(workspace, tmp_path, plans[0])
    assert whole.wait() == 0, log.read_text()
    killed, log = _start(workspace, tmp_path, plans[1])
    latest = workspace.checkpoint(TRAINER, plans[1], name="latest")
    while not latest.exists() and killed.poll() is None:
        time.sleep(0.05)
    os.kill(_workers(killed.pid)[-1], signal.SIGKILL)
    assert killed.wait() == 0, log.read_text()
    assert "Going on from" in log.read_text()
    expected, found = (read_checkpoint(workspace.checkpoint(TRAINER, name)) for name in plans)
    for key, tensor in expected["network_weights"].items():
        assert torch.equal(found["network_weights"][key], tensor), key
    assert latest.with_name("validation").joinpath("summary.json").is_file()
