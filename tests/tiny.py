"""Networks and crops small enough for tests."""

import torch

from nnunet_topomae.config import PretrainingConfig
from nnunet_topomae.masking import random_patch_mask
from nnunet_topomae.networks import FusedViTUNETRPP
from nnunet_topomae.pretext import TopoMAE

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


def make_task(config: PretrainingConfig | None = None, channels: int = 1) -> TopoMAE:
    network = FusedViTUNETRPP(channels, channels, deep_supervision=False, **TINY_NETWORK)
    network.apply(network.initialize)
    return TopoMAE(network, config or PretrainingConfig())


def make_masks(task: TopoMAE, batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    masks = [random_patch_mask(task.mask_grid, task.config.mask_ratio, generator) for _ in range(batch_size)]
    return torch.stack(masks)


def make_crops(batch_size: int = 2, channels: int = 1) -> torch.Tensor:
    """Smooth crops in [0, 1], as images are; noise has far more topological features."""
    coarse = torch.rand(batch_size, channels, *(size // 4 for size in TINY_CROP))
    return torch.nn.functional.interpolate(coarse, TINY_CROP, mode="trilinear")
