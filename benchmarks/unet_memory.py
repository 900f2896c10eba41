"""GPU memory that pre-training of nnU-Net's own U-Nets takes, estimated as the planners of this package do.

    python benchmarks/unet_memory.py [--crop 128 128 128] [--batch_size 2]

No GPU is needed. Networks are those that nnU-Net plans for crops of 128^3 voxels with one channel.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunet_topomae.methods.base import PretextTask
from nnunet_topomae.methods.mim import MiM
from nnunet_topomae.methods.spark import AnatoMask, SparK
from nnunet_topomae.nnunet.planning.memory import GIB
from nnunet_topomae.nnunet.planning.traces import StepSizes, trace_finetuning, trace_pretraining

CHANNELS, CLASSES = 1, 2
SHARED: dict[str, Any] = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": nn.Conv3d,
    "kernel_sizes": 3,
    "strides": [1, 2, 2, 2, 2, 2],
    "conv_bias": True,
    "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
}
NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "default": (PlainConvUNet, {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2}),
    "ResEnc M": (ResidualEncoderUNet, {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "n_conv_per_stage_decoder": 1}),
}
METHODS: dict[str, type[PretextTask]] = {"SparK": SparK, "AnatoMask": AnatoMask, "MiM": MiM}


def unet(
    network_class: type[nn.Module],
    arguments: dict[str, Any],
    num_channels: int,
    num_classes: int,
    crop_size: Sequence[int],
    **kwargs: Any,
) -> nn.Module:
    """A U-Net, which unlike the networks of this package does not ask for the size of the crop."""
    return network_class(num_channels, num_classes=num_classes, **SHARED, **arguments, **kwargs)


def estimates(
    network_class: type[nn.Module], arguments: dict[str, Any], crop: list[int], batch_size: int
) -> list[float]:
    """GiB of a step of fine-tuning, and of one of every method with its default settings."""
    build = partial(unet, network_class, arguments)
    sizes = StepSizes(build, json.dumps({"crop_size": crop}), CHANNELS, CLASSES, batch_size)
    needed = [trace_finetuning(sizes), *(trace_pretraining(method, sizes) for method in METHODS.values())]
    return [each / GIB for each in needed]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--crop", type=int, nargs=3, default=[128, 128, 128], help="voxels")
    parser.add_argument("--batch_size", type=int, default=2)
    options = parser.parse_args()
    print(f"GiB, {options.batch_size} crops of {' x '.join(map(str, options.crop))}")
    print(f"{'plans':<12}{'fine-tuning':>14}" + "".join(f"{name:>12}" for name in METHODS))
    for plans, network in NETWORKS.items():
        finetuning, *methods = estimates(*network, options.crop, options.batch_size)
        print(f"{plans:<12}{finetuning:>14.1f}" + "".join(f"{each:>12.1f}" for each in methods), flush=True)


if __name__ == "__main__":
    main()
