"""Tensors that lie on a grid of tokens or voxels, and how they are brought to another grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_topomae.networks.geometry import size_of


class GridTensor(Protocol):
    """How a tensor that lies on a grid is brought to another grid; networks describe theirs in ``resizing()``.

    If the descriptions that two networks give of a tensor are equal, it need not be resized.
    """

    def resize(self, values: Tensor, target: Any) -> Tensor:
        """Bring values to the grid that ``target``, of the same class, describes."""


@dataclass(frozen=True)
class Positions:
    """Positions of tokens, (1, N, width).

    Attributes:
        grid: tokens per axis.
    """

    grid: Sequence[int]

    def resize(self, values: Tensor, target: "Positions") -> Tensor:
        """Interpolate along axes that grow, average along axes that shrink."""
        return resize(values.transpose(1, 2), self.grid, target.grid).transpose(1, 2)


@dataclass(frozen=True)
class TokenProjection:
    """The weight (outputs, N) of a linear layer over tokens.

    Attributes:
        grid: tokens per axis.
    """

    grid: Sequence[int]

    def resize(self, values: Tensor, target: "TokenProjection") -> Tensor:
        """Resize, then divide by the growth in tokens, so that sums over all tokens stay what they were."""
        return resize(values, self.grid, target.grid) * (prod(self.grid) / prod(target.grid))


@dataclass(frozen=True)
class PatchVoxels:
    """Weight (C * voxels, width) or bias (C * voxels) of the layer that predicts the voxels of a patch.

    Attributes:
        patch_size: voxels per axis.
        channels: number C of channels.
    """

    patch_size: Sequence[int]
    channels: int

    def resize(self, values: Tensor, target: "PatchVoxels") -> Tensor:
        """Interpolate or average over the patch; repeat channels, or average them if a single one is wanted."""
        by_channel = values.reshape(self.channels, prod(self.patch_size), -1).transpose(1, 2)
        resized = resize(by_channel, self.patch_size, target.patch_size).transpose(1, 2)
        if self.channels != target.channels:
            resized = repeat_channels(resized, target.channels)
        return resized.reshape(target.channels * prod(target.patch_size), *values.shape[1:])


def resize(values: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Resize values on a grid: averages along axes that shrink, linear interpolation along those that grow.

    Args:
        values: (..., N) with N the product of ``before``.
        before: cells per axis of the values.
        after: cells per axis of the result.

    Returns:
        (..., M) with M the product of ``after``.
    """
    grid = values.reshape(1, -1, *before).float()
    coarse = F.adaptive_avg_pool3d(grid, size_of(map(min, before, after)))
    resized = F.interpolate(coarse, tuple(after), mode="trilinear", align_corners=False)
    return resized.reshape(*values.shape[:-1], prod(after)).to(values.dtype)


def repeat_channels(values: Tensor, count: int) -> Tensor:
    """Repeat values (n, ...) in turn until there are ``count``; the mean of all where ``count`` is 1."""
    if count == 1:
        return values.mean(dim=0, keepdim=True)
    return values[torch.arange(count) % len(values)]
