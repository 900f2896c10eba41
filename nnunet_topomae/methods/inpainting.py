"""Reconstructions that learn nothing, as yardsticks: what a network has to beat before it can be said to have learned.

The visible mean paints all hidden voxels in one grey. Harmonic inpainting solves Laplace's equation in the hidden
voxels, with the visible ones as boundary values: the smoothest continuation of what is visible.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SWEEPS = 300
_AXES = (2, 3, 4)


def visible_mean(crop: Tensor, hidden: Tensor) -> Tensor:
    """The crop with its hidden voxels replaced by the mean of its visible ones, per sample and channel.

    Args:
        crop: (B, C, D, H, W).
        hidden: (B, 1, D, H, W) bool, True = hidden.

    Returns:
        (B, C, D, H, W).
    """
    visible = ~hidden
    count = visible.sum(dim=_AXES, keepdim=True).clamp(min=1)
    mean = (crop * visible).sum(dim=_AXES, keepdim=True) / count
    return torch.where(hidden, mean, crop)


def harmonic_inpainting(crop: Tensor, hidden: Tensor, sweeps: int = SWEEPS) -> Tensor:
    """The crop with its hidden voxels replaced by a solution of Laplace's equation.

    Jacobi's method, started from the visible mean: in every sweep each hidden voxel becomes the mean of its six
    neighbours. At the border of the crop the outermost voxels are repeated, so no value flows through it.

    Args:
        crop: (B, C, D, H, W).
        hidden: (B, 1, D, H, W) bool, True = hidden.
        sweeps: number of sweeps.

    Returns:
        (B, C, D, H, W) float32.

    Example:
        Between the visible values 0 and 3 of a row lies the straight line.

        >>> import torch
        >>> from nnunet_topomae.methods.inpainting import harmonic_inpainting
        >>> row = torch.tensor([0.0, 9.0, 9.0, 3.0]).reshape(1, 1, 1, 1, 4)
        >>> hidden = torch.tensor([False, True, True, False]).reshape(1, 1, 1, 1, 4)
        >>> harmonic_inpainting(row, hidden).flatten().round(decimals=3).tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    crop = crop.float()
    values = visible_mean(crop, hidden)
    for _ in range(sweeps):
        values = torch.where(hidden, _mean_of_neighbours(values), crop)
    return values


def _mean_of_neighbours(values: Tensor) -> Tensor:
    padded = F.pad(values, (1, 1, 1, 1, 1, 1), mode="replicate")
    inner = slice(1, -1)
    total = torch.zeros_like(values)
    for axis in _AXES:
        for shift in (slice(None, -2), slice(2, None)):
            where = [slice(None)] * 2 + [shift if axis == a else inner for a in _AXES]
            total += padded[tuple(where)]
    return total / 6
