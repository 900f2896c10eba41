"""Names pre-trainings of TopoMAE that have ended, on the command line; for the benchmarks that look at them."""

import argparse
from pathlib import Path

import torch
from nnunetv2.run.run_training import get_trainer_from_args

from nnunet_topomae.nnunet.training.pretraining import Pretrainer

TRAINER = "TopoMAEPretrainer"


def parser(batches: int, *, several: bool = False) -> argparse.ArgumentParser:
    """Options that name dataset, plans, configuration and fold.

    Args:
        batches: how many validation batches are used if the user does not say.
        several: whether more than one name of plans may be given, so that ``plans`` is a list.
    """
    options = argparse.ArgumentParser()
    options.add_argument("dataset", type=int, help="ID of the dataset")
    default = "nnUNetTopoMAEPlans"
    options.add_argument("-p", "--plans", nargs="+" if several else None, default=[default] if several else default)
    options.add_argument("-c", "--configuration", default="3d_fullres")
    options.add_argument("-f", "--fold", type=int, default=0)
    options.add_argument("--batches", type=int, default=batches, help="validation batches")
    return options


def open_trainer(options: argparse.Namespace, plans: str, device: str = "cpu", *, trained: bool = True) -> Pretrainer:
    """The trainer of a pre-training in evaluation mode, with its final weights or those before the first step."""
    trainer = get_trainer_from_args(
        str(options.dataset), options.configuration, options.fold, TRAINER, plans, device=torch.device(device)
    )
    trainer.initialize()
    if trained:
        trainer.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    trainer.network.eval()
    return trainer
