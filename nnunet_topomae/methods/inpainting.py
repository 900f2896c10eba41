"""Reconstructions that learn nothing, as yardsticks: what a network has to beat before it can be said to have learned.

The visible mean paints all hidden voxels in one grey. Harmonic inpainting solves Laplace's equation in the hidden
voxels, with the visible ones as boundary values: the smoothest continuation of what is visible.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HARMONIC, WITH_MEANS = "harmonic inpainting", "inpainting with true patch means"  # as reports call them
ITERATIONS = 150
_TINY = 1e-30  # keeps what has converged from dividing 0 by 0
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


def harmonic_inpainting(crop: Tensor, hidden: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """The crop with its hidden voxels replaced by the solution of Laplace's equation.

    Each hidden voxel is the mean of its six neighbours. At the border of the crop the outermost voxels are repeated, so
    no value flows through it. Solved by conjugate gradients, started from the visible mean. (Jacobi's method comes to
    the same, but takes thousands of sweeps where the hidden patches are large.)

    Args:
        crop: (B, C, D, H, W).
        hidden: (B, 1, D, H, W) bool, True = hidden.
        iterations: of conjugate gradients.

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
    values = visible_mean(crop.float(), hidden)
    residual = hidden * (_mean_of_neighbours(values) - values)
    direction, norm = residual, _dot(residual, residual)
    for _ in range(iterations):
        curvature = hidden * (direction - _mean_of_neighbours(direction))
        step = norm / _dot(direction, curvature).clamp(min=_TINY)
        values = values + step * direction
        residual = residual - step * curvature
        previous, norm = norm, _dot(residual, residual)
        direction = residual + norm / previous.clamp(min=_TINY) * direction
    return values


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per sample and channel."""
    return (a * b).sum(dim=_AXES, keepdim=True)


def _mean_of_neighbours(values: Tensor) -> Tensor:
    padded = F.pad(values, (1, 1, 1, 1, 1, 1), mode="replicate")
    inner = slice(1, -1)
    total = torch.zeros_like(values)
    for axis in _AXES:
        for shift in (slice(None, -2), slice(2, None)):
            where = [slice(None)] * 2 + [shift if axis == a else inner for a in _AXES]
            total += padded[tuple(where)]
    return total / 6
