"""Persistence diagrams of the super-level sets of a volume (Gu et al., section II-A)."""

from collections.abc import Sequence

import cripser
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DIMENSIONS = (0, 1, 2)

_DIMENSION, _DEATH, _BIRTH_VOXEL, _DEATH_VOXEL = 0, 2, slice(3, 6), slice(6, 9)  # columns of Cubical Ripser's answer


def persistence_diagrams(volume: Tensor, dimensions: Sequence[int] = DIMENSIONS) -> list[Tensor]:
    """Diagrams of the super-level set filtration of a volume, computed by Cubical Ripser.

    The cubical complex has the voxels as its vertices (V-construction). A feature is born at a high value and dies at
    a lower one, so birth > death. The component born at the maximum never dies; its death is set to the minimum of the
    volume, and it passes gradients to both voxels. A constant volume has empty diagrams.

    Args:
        volume: (D, H, W), floating point, on any device. Computed on the CPU.
        dimensions: homology dimensions: 0 components, 1 loops, 2 voids.

    Returns:
        One (N, 2) tensor of (birth, death) per dimension, on the volume's device and of its type. Births and deaths
        are values of voxels, so gradients flow to exactly those voxels.

    Raises:
        ValueError: if the volume is not 3D, not floating point, or holds NaN or inf; for an unknown dimension.

    Example:
        Two bright spots in a row of voxels. That of value 2 merges with the brighter one at the value between them, 1;
        that of value 3 lasts to the minimum, 0. There are neither loops nor voids.

        >>> import torch
        >>> from nnunet_topomae.topology import persistence_diagrams
        >>> components, loops, voids = persistence_diagrams(torch.tensor([[[3.0, 1.0, 2.0, 0.0]]]))
        >>> sorted(components.tolist())
        [[2.0, 1.0], [3.0, 0.0]]
        >>> len(loops), len(voids)
        (0, 0)
    """
    return values_at(volume, persistence_pairs(volume, dimensions))


def values_at(volume: Tensor, pairs: Sequence[npt.NDArray[np.int64]]) -> list[Tensor]:
    """Values of a volume at voxels of :func:`persistence_pairs`, differentiable: (N, 2) per dimension."""
    values = volume.reshape(-1)
    return [values[torch.from_numpy(voxels).to(volume.device)] for voxels in pairs]


def persistence_pairs(volume: Tensor, dimensions: Sequence[int] = DIMENSIONS) -> list[npt.NDArray[np.int64]]:
    """The voxels at which features are born and die; arguments and errors of :func:`persistence_diagrams`.

    Returns:
        One (N, 2) int64 array of indices into the flattened volume per dimension.
    """
    _check(volume, dimensions)
    sublevel = np.ascontiguousarray(-volume.detach().to("cpu", torch.float64).numpy())
    table = cripser.computePH(sublevel, maxdim=max(dimensions), location="yes")
    birth = np.ravel_multi_index(table[:, _BIRTH_VOXEL].astype(np.int64).T, sublevel.shape)
    essential = table[:, _DEATH] == np.finfo(np.float64).max
    death_voxels = table[:, _DEATH_VOXEL].astype(np.int64)
    death_voxels[essential] = np.unravel_index(sublevel.argmax(), sublevel.shape)
    death = np.ravel_multi_index(death_voxels.T, sublevel.shape)
    pairs = np.stack([birth, death], axis=1)
    persistent = sublevel.ravel()[birth] != sublevel.ravel()[death]
    return [pairs[persistent & (table[:, _DIMENSION] == dimension)] for dimension in dimensions]


def _check(volume: Tensor, dimensions: Sequence[int]) -> None:
    if volume.ndim != 3 or not volume.is_floating_point():
        raise ValueError(
            f"a volume must be a floating point tensor of shape (D, H, W), got {volume.dtype} of {tuple(volume.shape)}"
        )
    if not torch.isfinite(volume).all():
        raise ValueError("the volume holds NaN or inf; persistence diagrams are defined for finite values only")
    if not dimensions or not set(dimensions) <= set(DIMENSIONS):
        raise ValueError(f"dimensions must be chosen from {DIMENSIONS}, got {tuple(dimensions)}")
