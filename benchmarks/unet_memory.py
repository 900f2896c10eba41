"""GPU memory that pre-training of nnU-Net's own U-Nets takes, estimated as the planners of this package do.

    python benchmarks/unet_memory.py [--crop 128 128 128] [--batch_size 2]

No GPU is needed. Networks are those that nnU-Net plans for crops of 128^3 voxels with one channel.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from nnunet_topomae.methods import to_float32
from nnunet_topomae.methods.base import PretextTask
from nnunet_topomae.methods.mim import MiM
from nnunet_topomae.methods.spark import AnatoMask, SparK
from nnunet_topomae.nnunet.planning.memory import GIB, trace_step

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


def finetuning_loss(crop: Sequence[int], batch_size: int) -> Callable[[nn.Module], Tensor]:
    """nnU-Net's loss of all outputs that it weighs above 0."""
    options = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)

    def of_step(network: nn.Module) -> Tensor:
        outputs = network(torch.empty(batch_size, CHANNELS, *crop))[:-1]
        return sum(loss(output, torch.empty(batch_size, 1, *output.shape[2:])) for output in outputs)

    return of_step


def pretraining_loss(batch_size: int) -> Callable[[PretextTask], Tensor]:
    """The method's loss, after its teacher has chosen the mask, if it has one."""

    def of_step(task: PretextTask) -> Tensor:
        batch = task.choose(task.views().example(batch_size, CHANNELS), 0.5)
        return task.loss_terms(to_float32(task(batch)), batch)["total"]

    return of_step


def estimates(
    network_class: type[nn.Module], arguments: dict[str, Any], crop: list[int], batch_size: int
) -> list[float]:
    """GiB of a step of fine-tuning, and of one of every method with its default settings."""
    build = partial(network_class, CHANNELS, **SHARED, **arguments)
    unet = partial(build, num_classes=CLASSES, deep_supervision=True)
    needed = [trace_step(unet, finetuning_loss(crop, batch_size))]
    for method in METHODS.values():
        config = method.for_memory(method.config_class())

        def task(method: type[PretextTask] = method, config: Any = config) -> PretextTask:
            return method.build(build(num_classes=CHANNELS, deep_supervision=False), config, crop)

        needed.append(trace_step(task, pretraining_loss(batch_size)))
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
