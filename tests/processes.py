"""Processes that train, forked from one that has imported everything once."""

import multiprocessing
import os

from nnunetv2.run import run_training

MODULES = [
    "nnunetv2.run.run_training",
    "nnunet_topomae.methods.spark.task",
    "nnunet_topomae.methods.topomae.task",
    "nnunet_topomae.nnunet.training.finetuning",
    "pytest",
]


def forking():
    """How such processes are made."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    return context


def environment():
    """What such a process must be told of nnU-Net's folders, as it was made before they were."""
    return {key: value for key, value in os.environ.items() if key.startswith("nnUNet")}


def make_trainer(device, dataset, name, plans, *, go_on=False):
    """A trainer as nnU-Net's command makes it, with the checkpoint that it goes on from, if any."""
    trainer = run_training.get_trainer_from_args(dataset, "3d_fullres", 0, name, plans, go_on, device)
    run_training.maybe_load_checkpoint(trainer, go_on, False)
    return trainer
