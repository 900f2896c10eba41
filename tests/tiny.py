"""Networks and crops small enough for tests."""

from dataclasses import replace

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunet_topomae.config import AnatoMaskConfig, MAEConfig, PretrainingConfig, SparKConfig, TopoMAEConfig
from nnunet_topomae.masking import random_patch_mask
from nnunet_topomae.networks import UNETR, FusedViTUNETRPP
from nnunet_topomae.pretext import MAE, AnatoMask, PretextTask, SparK, TopoMAE

TINY_CROP = (16, 16, 32)
TINY_NETWORK = {
    "crop_size": list(TINY_CROP),
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 2]],
    "features_per_stage": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "vit": {"patch_size": [4, 4, 8], "width": 32, "depth": 4, "num_heads": 2},
    "pyramid_channels": [8, 8, 16, None],
    "pyramid_blocks": [1, 1, 1, 0],
}
TINY_UNETR = {
    "crop_size": list(TINY_CROP),
    "strides": [[1, 1, 1], [1, 1, 2], [2, 2, 2], [2, 2, 2]],
    "vit": TINY_NETWORK["vit"],
    "features": 4,
}
TINY_UNET = {
    "n_stages": 4,
    "features_per_stage": [4, 8, 16, 16],
    "conv_op": nn.Conv3d,
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
    "n_conv_per_stage_decoder": [1, 1, 1],
    "conv_bias": True,
    "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
}


def make_network(kind: str, channels: int = 1, classes: int = 1, deep_supervision: bool = False) -> nn.Module:
    """A network as nnU-Net would make it from plans."""
    if kind == "fused":
        network = FusedViTUNETRPP(channels, classes, deep_supervision=deep_supervision, **TINY_NETWORK)
    elif kind == "unetr":
        network = UNETR(channels, classes, deep_supervision=deep_supervision, **TINY_UNETR)
    elif kind == "plain":
        network = PlainConvUNet(
            channels, num_classes=classes, n_conv_per_stage=2, deep_supervision=deep_supervision, **TINY_UNET
        )
    else:
        network = ResidualEncoderUNet(
            channels, num_classes=classes, n_blocks_per_stage=1, deep_supervision=deep_supervision, **TINY_UNET
        )
    network.apply(network.initialize)
    return network


METHODS = {  # by name: network, task, settings
    "TopoMAE": ("fused", TopoMAE, TopoMAEConfig()),
    "TopoMAE, AnatoMask's masks": ("fused", TopoMAE, TopoMAEConfig(mask_source="anatomask")),
    "MAE": ("unetr", MAE, MAEConfig()),
    "MAE of the fused network": ("fused", MAE, MAEConfig()),
    "SparK, PlainConvUNet": ("plain", SparK, SparKConfig(decoder_width=16)),
    "SparK, ResidualEncoderUNet": ("residual", SparK, SparKConfig(decoder_width=16)),
    "AnatoMask": ("residual", AnatoMask, AnatoMaskConfig(decoder_width=16)),
}


def make_method(name: str, channels: int = 1) -> PretextTask:
    kind, task_class, config = METHODS[name]
    return task_class.build(make_network(kind, channels, channels), config, TINY_CROP)


def make_task(config: TopoMAEConfig | None = None, channels: int = 1) -> TopoMAE:
    return TopoMAE.build(make_network("fused", channels, channels), config or TopoMAEConfig(), TINY_CROP)


def make_spark(kind: str = "plain", crop_size=TINY_CROP, channels: int = 1, **settings) -> SparK:
    config: PretrainingConfig = replace(SparKConfig(decoder_width=16), **settings)
    return SparK.build(make_network(kind, channels, channels), config, crop_size)


def make_masks(task: PretextTask, batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    masks = [random_patch_mask(task.mask_grid, task.config.mask_ratio, generator) for _ in range(batch_size)]
    return torch.stack(masks)


def make_crops(batch_size: int = 2, channels: int = 1) -> torch.Tensor:
    """Smooth crops in [0, 1], as images are; noise has far more topological features."""
    coarse = torch.rand(batch_size, channels, *(size // 4 for size in TINY_CROP))
    return nn.functional.interpolate(coarse, TINY_CROP, mode="trilinear")
