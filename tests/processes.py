"""Processes that train, forked from one that has imported everything once."""

import multiprocessing
import os
import sys
from pathlib import Path
from types import ModuleType

from nnunetv2.run import run_training

MODULES = [
    "nnunetv2.run.run_training",
    "nnunet_topomae.methods.spark.task",
    "nnunet_topomae.methods.topomae.task",
    "nnunet_topomae.nnunet.training.finetuning",
    "pytest",
]


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(MODULES)


def pipe():
    """The receiving end of a pipe, and the sending one, for such a process."""
    return _CONTEXT.Pipe(duplex=False)


def process(function, *arguments):
    """Such a process, not started yet, that calls a function of a test file."""
    return _CONTEXT.Process(target=call, args=(function, *arguments))


def call(function, *arguments):
    """Call a function. It is sent by the name ``tests.folder.file.function``; see the end of this file."""
    function(*arguments)


def environment():
    """What such a process must be told of nnU-Net's folders, as it was made before they were."""
    return {key: value for key, value in os.environ.items() if key.startswith("nnUNet")}


def make_trainer(device, dataset, name, plans, *, go_on=False):
    """A trainer as nnU-Net's command makes it, with the checkpoint that it goes on from, if any; it draws nothing."""
    trainer = run_training.get_trainer_from_args(dataset, "3d_fullres", 0, name, plans, go_on, device)
    trainer.logger.plot_progress_png = lambda folder: None  # takes longer than an epoch
    run_training.maybe_load_checkpoint(trainer, go_on, False)
    return trainer


def _name_tests():
    """Let the other process import test files by the names that pytest gives them, wherever pytest was started."""
    package = ModuleType("tests")
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules.setdefault("tests", package)


_name_tests()
