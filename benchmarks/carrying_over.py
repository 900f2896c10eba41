"""What ``nnUNetv2_topomae adapt`` keeps: errors right after carrying a checkpoint over, before any further training.

    python benchmarks/carrying_over.py 4 -p nnUNetTopoMAEPlans [-c 3d_fullres] [-f 0] [--batches 12]

Takes a pre-training of TopoMAE that has ended, and variants of its plans with another crop or other patches. Prints
the skill of both branches on the variant's validation crops, for fresh weights and for the weights carried over.
Variants are written as plans beside the others and deleted afterwards. nnU-Net's environment variables name the
folders.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from ended_pretraining import TRAINER, parser
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_topomae.commands import cli
from nnunet_topomae.files import read_json, write_json
from nnunet_topomae.nnunet.planning.geometry import fit_strides
from nnunet_topomae.nnunet.training.pretraining import Pretrainer
from nnunet_topomae.nnunet.weights.checkpoints import WEIGHTS, read_checkpoint

_VARIANT = "carrying_over"  # name of the plans


def variants(configuration: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Configurations by name: the given one, and others that differ in one thing each."""
    arguments = configuration["architecture"]["arch_kwargs"]
    patch = arguments["vit"]["patch_size"]
    smaller = [max(size - p, 2 * p) for size, p in zip(arguments["crop_size"], patch, strict=True)]
    larger = [size + p for size, p in zip(arguments["crop_size"], patch, strict=True)]
    return {
        "the same": configuration,
        f"crop {smaller}": _with(configuration, crop_size=smaller),
        f"crop {larger}": _with(configuration, crop_size=larger),
        f"ViT patches {[patch[0] // 2, *patch[1:]]}": _with(
            configuration, vit={**arguments["vit"], "patch_size": [patch[0] // 2, *patch[1:]]}
        ),
    }


def _with(configuration: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    changed = copy.deepcopy(configuration)
    known = changed["architecture"]["arch_kwargs"]
    known.update(arguments)
    changed["patch_size"] = known["crop_size"]
    known["strides"] = fit_strides(changed["spacing"], known["crop_size"])[1]
    changed["pretraining"]["topology"] = {"enabled": False}
    return changed


def skills(trainer: Pretrainer, batches: int) -> dict[str, float]:
    """Skill by branch on the trainer's first validation batches."""
    trainer.network.eval()
    _, validation = trainer.get_dataloaders()
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        terms = [trainer.validation_step(next(validation)) for _ in range(batches)]
    trainer.log_terms(terms, "val")
    return {branch: values[-1] for branch, values in trainer.logger.local_logger.skills().items()}


def carry_over(options: argparse.Namespace, checkpoint: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Skills on the variant's plans, fresh and carried over, by branch."""
    with tempfile.TemporaryDirectory() as output:
        adapted = Path(output, "adapted.pth")
        arguments = ["adapt", str(checkpoint), "-d", str(options.dataset), "-p", _VARIANT]
        if status := cli.main([*arguments, "-c", options.configuration, "-o", str(adapted)]):
            raise SystemExit(status)
        weights = read_checkpoint(adapted)[WEIGHTS]
    trainer = get_trainer_from_args(
        str(options.dataset), options.configuration, options.fold, TRAINER, _VARIANT, device=torch.device("cpu")
    )
    trainer.initialize()
    fresh = skills(trainer, options.batches)
    trainer.task.load_state_dict(weights)
    return fresh, skills(trainer, options.batches)


def main() -> None:
    """Adapt to every variant, and print the table."""
    options = parser(batches=12).parse_args()
    dataset = maybe_convert_to_dataset_name(options.dataset)
    run = f"{TRAINER}__{options.plans}__{options.configuration}"
    checkpoint = Path(nnUNet_results, dataset, run, f"fold_{options.fold}", "checkpoint_final.pth")
    folder = Path(nnUNet_preprocessed, dataset)
    plans, file = read_json(folder / f"{options.plans}.json"), folder / f"{_VARIANT}.json"
    lines = []
    try:
        for name, configuration in variants(plans["configurations"][options.configuration]).items():
            variant = {"plans_name": _VARIANT, "configurations": {options.configuration: configuration}}
            write_json({**plans, **variant}, file)
            fresh, carried = carry_over(options, checkpoint)
            lines += [f"{name:<28}{b:<10}{fresh[b]:>10.3f}{value:>10.3f}" for b, value in carried.items()]
    finally:
        file.unlink(missing_ok=True)
    print(f"\n{'plans':<28}{'branch':<10}{'fresh':>10}{'carried':>10}", *lines, sep="\n")


if __name__ == "__main__":
    main()
