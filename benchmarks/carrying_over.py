"""What ``nnUNetv2_topomae adapt`` keeps: errors right after carrying a checkpoint over, before any further training.

    python benchmarks/carrying_over.py 4 -p nnUNetTopoMAEPlans [-c 3d_fullres] [-f 0] [--batches 12]

Takes a pre-training of TopoMAE that has ended, and variants of its plans with another crop, other patches or another
stem. Prints the skill of both branches on the variant's validation crops, for fresh weights and for the weights carried
over. Variants are written as plans beside the others and deleted afterwards. nnU-Net's environment variables name the
folders.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_topomae.commands import cli
from nnunet_topomae.files import read_json, write_json
from nnunet_topomae.nnunet.planning.geometry import fit_strides
from nnunet_topomae.nnunet.training.pretraining import Pretrainer
from nnunet_topomae.nnunet.weights.checkpoints import WEIGHTS, read_checkpoint

_TRAINER, _VARIANT = "TopoMAEPretrainer", "carrying_over"


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


def main() -> None:
    """Adapt to every variant, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset")
    parser.add_argument("-p", "--plans", default="nnUNetTopoMAEPlans")
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("-f", "--fold", type=int, default=0)
    parser.add_argument("--batches", type=int, default=12)
    options = parser.parse_args()
    dataset = maybe_convert_to_dataset_name(int(options.dataset))
    run = f"{_TRAINER}__{options.plans}__{options.configuration}"
    checkpoint = Path(nnUNet_results, dataset, run, f"fold_{options.fold}", "checkpoint_final.pth")
    folder = Path(nnUNet_preprocessed, dataset)
    plans = read_json(folder / f"{options.plans}.json")
    lines = []
    for name, configuration in variants(plans["configurations"][options.configuration]).items():
        variant = {**plans, "plans_name": _VARIANT, "configurations": {options.configuration: configuration}}
        write_json(variant, folder / f"{_VARIANT}.json")
        with tempfile.TemporaryDirectory() as output:
            adapted = Path(output, "adapted.pth")
            arguments = ["adapt", str(checkpoint), "-d", options.dataset, "-p", _VARIANT]
            status = cli.main([*arguments, "-c", options.configuration, "-o", str(adapted)])
            if status:
                raise SystemExit(status)
            trainer = get_trainer_from_args(
                options.dataset, options.configuration, options.fold, _TRAINER, _VARIANT, device=torch.device("cpu")
            )
            trainer.initialize()
            fresh = skills(trainer, options.batches)
            trainer.task.load_state_dict(read_checkpoint(adapted)[WEIGHTS])
            carried = skills(trainer, options.batches)
        lines += [f"{name:<28}{branch:<10}{fresh[branch]:>10.3f}{value:>10.3f}" for branch, value in carried.items()]
    (folder / f"{_VARIANT}.json").unlink()
    print(f"\n{'plans':<28}{'branch':<10}{'fresh':>10}{'carried':>10}", *lines, sep="\n")


if __name__ == "__main__":
    main()
