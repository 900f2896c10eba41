"""Plans with networks that a CPU can train, for the studies of docs/results.md.

    python benchmarks/small_plans.py 4 [-p nnUNetTopoMAEPlans] [--crop 32 48 32] [--prefix Small]

Reads plans of a dataset that has been planned by ``TopoMAEPlanner`` and preprocessed, and writes ``SmallTopoMAE``
(UNETR++ and a ViT), ``SmallUNETR`` and ``SmallUNet`` beside it, and the UNETR again for MiM and Alice, which have
settings of their own: ``SmallMiM`` and ``SmallAlice``. All train on the same preprocessed images, in batches of 2.
Names that go on with ``Frozen`` or ``Slow`` are the same plans, but in fine-tuning the pre-trained encoder keeps its
weights, or learns at a tenth of the rate; those with ``LowRate`` fine-tune the whole network at 8e-4. Those that end in
``NoTopology`` or ``FullTopology`` pre-train without the topological term, or with a weight of 1, those in ``HighMask``
hide three quarters of the patches in place of half. ``SmallTopoMAEFinePatches`` has patches of 4 voxels in place of 8.
"""

import argparse
import copy
import itertools
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_topomae.files import read_json, write_json

CONFIGURATION, BATCH = "3d_fullres", 2
VIT = {"patch_size": [8, 8, 8], "width": 192, "depth": 6, "num_heads": 6, "local_start": True}
CONV = {
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "conv_bias": True,
}


def strides(number: int) -> list[list[int]]:
    """The first stage keeps the resolution, each of the others halves it."""
    return [[1, 1, 1], *([2, 2, 2] for _ in range(number - 1))]


def networks(crop: list[int]) -> dict[str, tuple[str, dict[str, Any], list[str]]]:
    """Class, arguments, and arguments that nnU-Net imports, by the name of the plans."""
    unetr = (
        "nnunet_topomae.networks.unetr.UNETR",
        {"crop_size": crop, "strides": strides(4), "vit": VIT, "taps": [3, 4], "features": 8},
        [],
    )
    fused = {
        "crop_size": crop,
        "strides": strides(5),
        "features_per_stage": [8, 16, 32, 64],
        "vit": VIT,
        "taps": [1, 3, 4],
        "pyramid_channels": [8, 16, 32, None],
        "pyramid_blocks": [1, 1, 1, 0],
    }
    fine_patches = fused | {"vit": VIT | {"patch_size": [4, 4, 4]}}
    return {
        "SmallTopoMAE": ("nnunet_topomae.networks.fused.FusedViTUNETRPP", fused, []),
        "SmallTopoMAEFinePatches": ("nnunet_topomae.networks.fused.FusedViTUNETRPP", fine_patches, []),
        **dict.fromkeys(("SmallUNETR", "SmallMiM", "SmallAlice"), unetr),
        "SmallUNet": (
            "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            {
                "n_stages": 4,
                "features_per_stage": [16, 32, 64, 128],
                "kernel_sizes": [[3, 3, 3]] * 4,
                "strides": strides(4),
                "n_conv_per_stage": [2, 2, 2, 2],
                "n_conv_per_stage_decoder": [2, 2, 2],
                **CONV,
            },
            ["conv_op", "norm_op", "dropout_op", "nonlin"],
        ),
    }


TOPOMAE = {"pretraining": {"base_lr": 0.128}, "finetuning": {"base_lr": 0.256}}
BLOCKS = {  # learning rates for a batch of 2: 1e-3 and 5e-4 in pre-training, 2e-3 and 8e-4 in fine-tuning
    "SmallTopoMAE": TOPOMAE,
    "SmallTopoMAEFinePatches": TOPOMAE,
    "SmallUNETR": {"pretraining": {"base_lr": 0.064}, "finetuning": {"base_lr": 0.1}},
    "SmallMiM": {  # 7 volumes a crop in place of 21
        "pretraining": {"base_lr": 5e-4, "gamma": 2, "beta": 2, "recompute": False},
        "finetuning": {"base_lr": 0.1},
    },
    "SmallAlice": {
        "pretraining": {"base_lr": 5e-4, "landmarks": {"iterations": 1000}},
        "finetuning": {"base_lr": 0.1},
    },
    "SmallUNet": {"pretraining": {"base_lr": 0.128, "decoder_width": 64}, "finetuning": {"base_lr": 0.1}},
}


RECIPES: dict[str, dict[str, Any]] = {
    "": {},
    "Frozen": {"encoder_lr": 0.0},
    "Slow": {"encoder_lr": 0.1},
    "LowRate": {"base_lr": 0.1},
}
PRETRAININGS: dict[str, dict[str, Any]] = {
    "": {"topology": {"weight": 0.1}},
    "NoTopology": {"topology": {"enabled": False}},
    "FullTopology": {"topology": {"weight": 1.0}},
    "HighMask": {"topology": {"weight": 0.1}, "mask_ratio": 0.75},
}


def write_plans(planned: dict[str, Any], name: str, configuration: dict[str, Any], folder: Path) -> None:
    """Write plans of another name, with one configuration."""
    write_json(
        planned | {"plans_name": name, "configurations": {CONFIGURATION: configuration}}, folder / f"{name}.json"
    )


def main() -> None:
    """Write the plans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=int, help="ID of the dataset")
    parser.add_argument("-p", "--plans", default="nnUNetTopoMAEPlans", help="plans to start from")
    parser.add_argument("--prefix", default="Small", help="of the plans' names; a new one keeps the plans of before")
    parser.add_argument("--crop", type=int, nargs=3, default=[32, 48, 32], help="voxels, multiples of 16")
    options = parser.parse_args()
    folder = Path(nnUNet_preprocessed) / maybe_convert_to_dataset_name(options.dataset)
    planned = read_json(folder / f"{options.plans}.json")
    for name, (network, arguments, imported) in networks(options.crop).items():
        configuration = copy.deepcopy(planned["configurations"][CONFIGURATION])
        architecture = {"network_class_name": network, "arch_kwargs": arguments, "_kw_requires_import": imported}
        configuration.update(patch_size=options.crop, batch_size=BATCH, architecture=architecture)
        pretraining, finetuning = BLOCKS[name]["pretraining"], BLOCKS[name]["finetuning"]
        pretrainings = {"": {}}
        if BLOCKS[name] is TOPOMAE:  # the method that the planner has settings for
            pretraining = {**configuration["pretraining"], **pretraining}
            pretraining["topology"]["grid"] = [size // 2 for size in options.crop]
            pretrainings = PRETRAININGS
        for (recipe, changed), (variant, of_method) in itertools.product(RECIPES.items(), pretrainings.items()):
            configuration["pretraining"] = _changed(pretraining, of_method)
            configuration["finetuning"] = _changed(finetuning, changed)
            written = name.replace("Small", options.prefix, 1)
            write_plans(planned, f"{written}{recipe}{variant}", configuration, folder)


def _changed(block: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A block of the plans with changes, which keep what they do not name."""
    nested = {key: {**block[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
    return {**block, **nested}


if __name__ == "__main__":
    main()
