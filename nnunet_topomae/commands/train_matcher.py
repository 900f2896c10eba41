"""``nnUNetv2_topomae train_matcher``: trains the landmark network that Alice finds the same body part with."""

import argparse

import torch

from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from nnunet_topomae.trainers.alice_pretrainer import AlicePretrainer


def run(options: argparse.Namespace) -> None:
    """Do what a pre-training does before its first epoch, for the images of a fold.

    Args:
        options: of the command line: dataset ``d``, plans ``p``, configuration ``c``, fold ``f``, ``device``.

    Raises:
        ValueError: if the plans are not such as Alice can pre-train, or ask for another matcher.
    """
    dataset = PlannedDataset.of(options.d, options.p)
    (configuration,) = dataset.configurations([options.c])
    plans = {**dataset.plans.plans, "continue_training": False}
    config = AlicePretrainer.check_plans(plans, configuration)[AlicePretrainer.block]
    if config.matcher != "embedding":
        raise ValueError(
            f"pretraining.matcher in {options.p} is {config.matcher}, which needs no training; set it to embedding"
        )
    trainer = AlicePretrainer(plans, configuration, options.f, dataset.description, torch.device(options.device))
    trainer.initialize()
    trainer.prepare()
