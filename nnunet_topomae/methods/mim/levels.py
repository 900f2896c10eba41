"""Cuts the volumes of a level out of those of the coarser one, on the device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(volumes: Tensor, size: Sequence[int]) -> Tensor:
    """Trilinear interpolation to another number of voxels; volumes of that size are returned as they are.

    Both lattices fill the same space, so at half the size a voxel is the mean of the eight that it covers.

    Args:
        volumes: (B, C, D, H, W).
        size: voxels per axis.
    """
    if tuple(volumes.shape[2:]) == tuple(size):
        return volumes
    return F.interpolate(volumes, tuple(size), mode="trilinear", align_corners=False)


def cut(volumes: Tensor, grid: Sequence[int], indices: Tensor, size: Sequence[int]) -> Tensor:
    """Cut parts out of volumes and enlarge or shrink each to one size.

    Args:
        volumes: (B, C, D, H, W).
        grid: parts per axis; must divide the volumes.
        indices: (B, n) raster indices of parts.
        size: voxels per axis of the result.

    Returns:
        ``(B * n, C, *size)``, the parts of the first volume first.

    Example:
        The second half of a row of four voxels.

        >>> import torch
        >>> from nnunet_topomae.methods.mim.levels import cut
        >>> row = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(1, 1, 1, 1, 4)
        >>> cut(row, (1, 1, 2), torch.tensor([[1]]), (1, 1, 2)).flatten()
        tensor([2., 3.])
        >>> cut(row, (1, 1, 2), torch.tensor([[1]]), (1, 1, 4)).flatten()
        tensor([2.0000, 2.2500, 2.7500, 3.0000])
    """
    (u, v, w), (d, h, k) = grid, (voxels // parts for voxels, parts in zip(volumes.shape[2:], grid, strict=True))
    blocks = volumes.reshape(*volumes.shape[:2], u, d, v, h, w, k)
    sample = torch.arange(len(volumes), device=volumes.device)[:, None]
    parts = blocks[sample, :, indices // (v * w), :, indices // w % v, :, indices % w]  # (B, n, C, d, h, k)
    return resize(parts.flatten(0, 1), size)
