"""The one set of small networks, crops and settings that all tests use."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from crop_contrast import CropContrast, CropContrastConfig
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from torch.utils.data import default_collate

from nnunet_topomae.methods import PretextTask
from nnunet_topomae.methods.alice import Alice, AliceConfig
from nnunet_topomae.methods.mae import MAE, MAEConfig
from nnunet_topomae.methods.masked import MaskedReconstruction
from nnunet_topomae.methods.masking import random_patch_mask
from nnunet_topomae.methods.mim import MiM, MiMConfig
from nnunet_topomae.methods.spark import AnatoMask, AnatoMaskConfig, SparK, SparKConfig
from nnunet_topomae.methods.topomae import TopoMAE, TopoMAEConfig
from nnunet_topomae.networks import UNETR, FusedViTUNETRPP, HybridUNETR

TINY_CROP = (16, 16, 32)
_VIT = {"width": 32, "depth": 4, "num_heads": 2}
TINY_FEATURES = {  # arguments of the fused network that fit any crop
    "features_per_stage": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "pyramid_channels": [8, 8, 16, None],
    "pyramid_blocks": [1, 1, 1, 0],
}
TINY_NETWORK = {
    "crop_size": list(TINY_CROP),
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 2]],
    "vit": {"patch_size": [4, 4, 8], **_VIT},
    **TINY_FEATURES,
}
TINY_UNETR = {
    "crop_size": list(TINY_CROP),
    "strides": [[1, 1, 1], [1, 1, 2], [2, 2, 2], [2, 2, 2]],
    "vit": TINY_NETWORK["vit"],
    "features": 4,
}
TINY_HYBRID = {
    "crop_size": list(TINY_CROP),
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 1, 2], [1, 1, 1], [1, 1, 2]],
    "encoder": {"widths": [8, 8, 16, 24], "depths": [1, 1, 1, 2], "num_heads": 2},
    "features": 4,
    "coarsest_features": 24,
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
PLANNED_CROP = [24, 32, 32]  # of the phantom dataset that trainers are tested on
_PLANNED_VIT = {"patch_size": [8, 8, 8], **_VIT, "local_start": True}
PLANNED_NETWORK = {**TINY_FEATURES, "vit": _PLANNED_VIT, "taps": [0, 1, 2]}
SCHEDULE = {"num_epochs": 3, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "warmup_epochs": 1}
SHORT_SCHEDULE = {**SCHEDULE, "num_epochs": 1, "warmup_epochs": 0}


def make_network(kind: str, channels: int = 1, classes: int = 1, deep_supervision: bool = False) -> nn.Module:
    """A network as nnU-Net would make it from plans."""
    if kind == "fused":
        network = FusedViTUNETRPP(channels, classes, deep_supervision=deep_supervision, **TINY_NETWORK)
    elif kind == "unetr":
        network = UNETR(channels, classes, deep_supervision=deep_supervision, **TINY_UNETR)
    elif kind == "hybrid":
        network = HybridUNETR(channels, classes, deep_supervision=deep_supervision, **TINY_HYBRID)
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


_ALICE = {"matcher": "position", "head_width": 32}
_ONE_VOLUME = {**_ALICE, "matcher": "same_volume", "l_dv": False, "casa": False}
METHODS = {  # by name: network, task, settings
    "TopoMAE": ("fused", TopoMAE, TopoMAEConfig()),
    "TopoMAE, AnatoMask's masks": ("fused", TopoMAE, TopoMAEConfig(mask_source="anatomask")),
    "MAE": ("unetr", MAE, MAEConfig()),
    "MAE of the fused network": ("fused", MAE, MAEConfig()),
    "SparK, PlainConvUNet": ("plain", SparK, SparKConfig(decoder_width=16)),
    "SparK, ResidualEncoderUNet": ("residual", SparK, SparKConfig(decoder_width=16)),
    "AnatoMask": ("residual", AnatoMask, AnatoMaskConfig(decoder_width=16)),
    "MiM": ("unetr", MiM, MiMConfig(projection_width=32)),
    "MiM of the fused network, likeness alone": ("fused", MiM, MiMConfig(alignment="byol", gamma=1, beta=2)),
    "MiM of the hybrid network": ("hybrid", MiM, MiMConfig(gamma=1, beta=2, projection_width=32)),
    "MiM of a PlainConvUNet": (
        "plain",
        MiM,
        MiMConfig(gamma=1, beta=2, recompute=False, decoder_width=16, projection_width=32),
    ),
    "MiM of a ResidualEncoderUNet": ("residual", MiM, MiMConfig(levels=2, decoder_width=16, projection_width=32)),
    "Alice": ("unetr", Alice, AliceConfig(**_ALICE)),
    "Alice of the fused network": ("fused", Alice, AliceConfig(**_ALICE)),
    "Alice of the hybrid network": ("hybrid", Alice, AliceConfig(**_ALICE)),
    "Alice, one volume, without CASA": ("unetr", Alice, AliceConfig(**_ONE_VOLUME)),
    "CropContrast, the worked example": ("plain", CropContrast, CropContrastConfig()),
}
MASKED_METHODS = [name for name, (_, task, _) in METHODS.items() if issubclass(task, MaskedReconstruction)]


def make_method(name: str, channels: int = 1) -> PretextTask:
    kind, task_class, config = METHODS[name]
    return task_class.build(make_network(kind, channels, channels), config, TINY_CROP)


def make_task(config: TopoMAEConfig | None = None, channels: int = 1) -> TopoMAE:
    return TopoMAE.build(make_network("fused", channels, channels), config or TopoMAEConfig(), TINY_CROP)


def make_spark(kind: str = "plain", crop_size=TINY_CROP, channels: int = 1, **settings) -> SparK:
    config = replace(SparKConfig(decoder_width=16), **settings)
    return SparK.build(make_network(kind, channels, channels), config, crop_size)


def make_masks(task: MaskedReconstruction, batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    masks = [random_patch_mask(task.mask_grid, task.config.mask_ratio, generator) for _ in range(batch_size)]
    return torch.stack(masks)


def make_crops(batch_size: int = 2, channels: int = 1, size=TINY_CROP) -> torch.Tensor:
    """Smooth crops in [0, 1], as images are; noise has far more topological features."""
    coarse = torch.rand(batch_size, channels, *(edge // 4 for edge in size))
    return nn.functional.interpolate(coarse, size, mode="trilinear")


def make_batch(task: MaskedReconstruction, crops: torch.Tensor | None = None, seed: int = 0) -> dict[str, Any]:
    """What a masked method draws, with smooth crops and random masks."""
    crops = make_crops() if crops is None else crops
    example = task.views().example(*crops.shape[:2])
    return {**example, "crop": crops, "mask": make_masks(task, len(crops), seed)}


class Volumes:
    """Smooth images of two sizes, the second of which is smaller than a crop along an axis."""

    spacing = (1.0, 2.0, 3.0)

    def __init__(self, channels: int = 1):
        sizes = {"large": (20, 24, 40), "thin": (12, 20, 36)}
        self.volumes = {case: make_crops(1, channels, size)[0].numpy() for case, size in sizes.items()}
        self.identifiers = self.partners = list(self.volumes)

    def load(self, case: str) -> np.ndarray:
        return self.volumes[case]


def draw_batch(task: PretextTask, images: Volumes, seed: int = 0, mirror: bool = True) -> dict[str, torch.Tensor]:
    """One item of every case, as the loader would draw them."""
    views = task.views()
    items = [
        views.draw(images, case, np.random.default_rng((seed, n)), mirror) for n, case in enumerate(images.identifiers)
    ]
    return default_collate(items)
