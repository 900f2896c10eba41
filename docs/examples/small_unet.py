"""A network in one file that plans can name: a U-Net of three scales with learned positions at the coarsest.

It is the worked example of docs/adding_a_network.md, and the tests build, resize and segment with it.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_topomae.networks.blocks import residual_block, upsampling
from nnunet_topomae.networks.geometry import grid_of
from nnunet_topomae.networks.grids import GridTensor, Positions


class SmallEncoder(nn.Module):
    """A stage per scale, and positions that are added at the coarsest.

    Args:
        input_channels: channels of the crop.
        grid: voxels per axis of the coarsest feature map.
        strides: per stage and axis, first 1.
        features: channels of the stages.
    """

    def __init__(self, input_channels: int, grid: Sequence[int], strides: Sequence, features: Sequence[int]):
        super().__init__()
        self.grid, self.output_channels = tuple(grid), list(features)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv3d(before, after, tuple(stride), tuple(stride)), residual_block(after, after))
            for before, after, stride in zip((input_channels, *features[:-1]), features, strides, strict=True)
        )
        self.positions = nn.Parameter(torch.zeros(1, prod(grid), features[-1]))

    def forward(self, crop: Tensor) -> list[Tensor]:
        """(B, C, D, H, W) to a feature map per stage, finest first."""
        maps = []
        for stage in self.stages:
            crop = stage(crop)
            maps.append(crop)
        maps[-1] = maps[-1] + self.positions.transpose(1, 2).unflatten(2, self.grid)
        return maps

    def no_weight_decay(self) -> set[str]:
        """The positions."""
        return {"positions"}

    def resizing(self) -> dict[str, GridTensor]:
        """The positions, which lie on the grid of the coarsest feature map."""
        return {"positions": Positions(self.grid)}


class SmallDecoder(nn.Module):
    """Upsampling with skips; nnU-Net looks for the names ``deep_supervision`` and ``seg_layers``."""

    def __init__(self, num_classes: int, strides: Sequence, features: Sequence[int], deep_supervision: bool):
        super().__init__()
        self.deep_supervision = deep_supervision
        pairs = list(zip(features[:-1], features[1:], strides[1:], strict=True))
        self.upsample = nn.ModuleList(upsampling(coarse, fine, stride) for fine, coarse, stride in pairs)
        self.seg_layers = nn.ModuleList(nn.Conv3d(fine, num_classes, 1) for fine in features[:-1])

    def forward(self, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Feature maps, finest first, to logits at full resolution, or to those of all scales but the coarsest."""
        x, logits = maps[-1], []
        for upsample, head, skip in reversed(list(zip(self.upsample, self.seg_layers, maps[:-1], strict=True))):
            x = upsample(x) + skip
            logits.insert(0, head(x))
        return logits if self.deep_supervision else logits[0]


class SmallUNet(nn.Module):
    """The network.

    Args:
        input_channels, num_classes, deep_supervision: given by nnU-Net.
        crop_size: voxels per axis; equals the configuration's ``patch_size`` in the plans.
        strides: per stage and axis, first 1.
        features_per_stage: channels of the stages.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        crop_size: Sequence[int],
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int] = (16, 32, 64),
        deep_supervision: bool = True,
    ):
        super().__init__()
        total_stride = [prod(steps) for steps in zip(*strides, strict=True)]
        grid = grid_of(crop_size, total_stride, "total stride")
        self.encoder = SmallEncoder(input_channels, grid, strides, features_per_stage)
        self.decoder = SmallDecoder(num_classes, strides, features_per_stage, deep_supervision)

    def forward(self, crop: Tensor) -> Tensor | list[Tensor]:
        """(B, C, D, H, W) to logits (B, K, D, H, W), or to a list of them with deep supervision."""
        return self.decoder(self.encoder(crop))

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Called by nnU-Net on every part of the network."""
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=0.01)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, in timm's form; others belong to the last."""
        return {"blocks": [(r"^encoder\.stages\.(\d+)", None), (r"^encoder\.positions", (len(self.encoder.stages),))]}
