"""Random crops of a volume."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch import Tensor

_SPATIAL_AXES = (0, 1, 2)


class Place(NamedTuple):
    """Where a crop lies in its volume; voxels per axis (z, y, x).

    Attributes:
        start: first voxel of the crop; negative where the crop is padded.
        crop_shape: size of the crop.
        volume_shape: size of the volume.
    """

    start: tuple[int, ...]
    crop_shape: tuple[int, ...]
    volume_shape: tuple[int, ...]


def random_crop(volume: Any, crop_size: Sequence[int], rng: np.random.Generator, mirror: bool) -> tuple[Tensor, Place]:
    """Cut a crop from a random place, uniform over all places inside the volume.

    A volume that is smaller than the crop is centred and padded with 0.

    Args:
        volume: array (C, D, H, W).
        crop_size: voxels per axis.
        rng: source of randomness.
        mirror: flip each axis with probability 1/2.

    Returns:
        The crop, ``(C, *crop_size)`` float32, and its place. If the crop is mirrored, its place is that in a volume
        mirrored in the same way.

    Example:
        A volume of 4 x 4 x 2 voxels leaves one place for a crop of 4 x 4 x 4: centred, with a 0 on either side.

        >>> import numpy as np
        >>> from nnunet_topomae.methods.crops import random_crop
        >>> rng = np.random.default_rng(0)
        >>> crop, place = random_crop(np.ones((1, 4, 4, 2)), (4, 4, 4), rng, mirror=False)
        >>> crop[0, 0, 0]
        tensor([0., 1., 1., 0.])
        >>> place.start
        (0, 0, -1)
    """
    shape = tuple(volume.shape[1:])
    start = random_start(shape, crop_size, rng)
    box = [[s, s + size] for s, size in zip(start, crop_size, strict=True)]
    crop = crop_and_pad_nd(volume, box, 0).astype(np.float32)
    axes = [axis for axis in _SPATIAL_AXES if mirror and rng.random() < 0.5]
    crop = np.ascontiguousarray(np.flip(crop, tuple(axis + 1 for axis in axes)))
    return torch.from_numpy(crop), Place(mirrored_start(start, crop_size, shape, axes), tuple(crop_size), shape)


def random_start(volume_shape: Sequence[int], crop_size: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    """First voxel of a crop, uniform over all places inside the volume; a volume smaller than the crop is centred."""
    return tuple(
        int(rng.integers(volume - crop + 1)) if volume >= crop else -((crop - volume) // 2)
        for volume, crop in zip(volume_shape, crop_size, strict=True)
    )


def mirrored_start(
    crop_start: Sequence[int], crop_shape: Sequence[int], volume_shape: Sequence[int], axes: Sequence[int]
) -> tuple[int, ...]:
    """Where a crop starts once its volume has been mirrored along ``axes``."""
    return tuple(
        volume - start - shape if axis in axes else start
        for axis, (start, shape, volume) in enumerate(zip(crop_start, crop_shape, volume_shape, strict=True))
    )
