"""``torchrun ... -m nnunet_topomae.distributed``: nnUNetv2_train on several GPUs, several machines, or CPUs.

The arguments are those of ``nnUNetv2_train``, whose code runs. nnU-Net itself distributes a training among the GPUs of
one machine (``-num_gpus``); where it counts on that, functions of it are replaced here.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_topomae.nnunet.training.distribution import distribute, place, unwrap
from nnunet_topomae.nnunet.weights.checkpoints import read_checkpoint
from nnunet_topomae.nnunet.weights.handover import hand_over

_make_trainer = run_training.get_trainer_from_args
_load_checkpoint = run_training.maybe_load_checkpoint
_CHECKPOINTS = "checkpoint_*.pth"


def main() -> None:
    """Join the other processes, then train as ``nnUNetv2_train`` does.

    Raises:
        SystemExit: if this process was not started by ``torchrun``, or has no GPU of its own.
    """
    if "RANK" not in os.environ:
        raise SystemExit(
            "start this with torchrun, such as: torchrun --nproc_per_node 4 -m nnunet_topomae.distributed 4 "
            "3d_fullres 0 -p PLANS -tr TRAINER"
        )
    on_cpu = _device() == "cpu"
    if not on_cpu:
        torch.cuda.set_device(_own_gpu())
    dist.init_process_group("gloo" if on_cpu else "nccl")
    run_training.get_trainer_from_args = _trainer_on_own_device
    run_training.maybe_load_checkpoint = _go_on_or_start
    run_training.load_pretrained_weights = _load_weights
    run_training.run_training_entry()
    dist.destroy_process_group()


def _own_gpu() -> int:
    """The number of this process's GPU; two processes cannot share one, as NCCL refuses."""
    gpu, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus == 0:
        raise SystemExit("this machine has no GPU that PyTorch can use: train on its cores with -device cpu")
    if gpu >= gpus:
        raise SystemExit(
            f"torchrun has started more processes than this machine has GPUs ({gpus}): lower --nproc_per_node, or "
            f"train on its cores with -device cpu"
        )
    return gpu


def _device() -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-device", default="cuda")
    return parser.parse_known_args()[0].device


def _trainer_on_own_device(*arguments: Any, device: torch.device, **options: Any) -> nnUNetTrainer:
    trainer = _make_trainer(*arguments, device=device, **options)
    place(trainer, device)
    trainer_module.DDP = partial(_distribute, trainer.device)  # used by trainers that are not of this package
    return trainer


def _load_weights(network: nn.Module, file: str, verbose: bool = False) -> None:
    """As nnU-Net does for trainers that are not of this package, but on any device, and without unpickling."""
    hand_over(read_checkpoint(Path(file)), unwrap(network), Path(file))


def _distribute(device: torch.device, network: nn.Module, device_ids: Any) -> nn.Module:
    return distribute(network, device, sync_batch_norm=True)


def _go_on_or_start(
    trainer: nnUNetTrainer, continue_training: bool, validation_only: bool, pretrained_weights_file: str | None = None
) -> None:
    """With ``--c`` and ``-pretrained_weights``, which a restart repeats: the latter only if there is no checkpoint."""
    if continue_training and pretrained_weights_file:
        if any(Path(trainer.output_folder).glob(_CHECKPOINTS)):
            pretrained_weights_file = None
        else:
            continue_training = False
    _load_checkpoint(trainer, continue_training, validation_only, pretrained_weights_file)


if __name__ == "__main__":
    main()
