"""Views of a crop that were moved, turned, scaled and mirrored, and where each of their voxels comes from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform, create_affine_matrix_3d
from torch import Tensor

SMALLEST_SHARE = 0.2  # of a crop that is resized to a whole one; MAE's, there of the area
LARGEST_ANGLE = np.pi / 6  # this and the next: nnU-Net's
LARGEST_SCALING = 1.4
SMALLEST_FACTOR = 0.75  # of intensities: nnU-Net's, for its brightness
LARGEST_SHIFT = 0.25  # of intensities, in standard deviations of the crop
_ANISOTROPIC = 3  # spacings that differ by more are turned about the coarse axis only; nnU-Net asks the crop's size


class Placement(NamedTuple):
    """Where the voxels of a view lie in a volume; everything in voxels, z, y, x.

    Attributes:
        start: first voxel of the upright crop that has the same middle as the view; may be negative.
        size: voxels of the view per axis.
        angles: by which it is turned about each axis, in radians.
        scale: edge of what is shown, in edges of the view.
        mirrored: whether each axis is mirrored.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]
    angles: tuple[float, ...] = (0.0, 0.0, 0.0)
    scale: float = 1.0
    mirrored: tuple[bool, ...] = (False, False, False)

    @property
    def is_upright(self) -> bool:
        """Whether the view is a crop as it stands in the volume, mirrored or not."""
        return not any(self.angles) and self.scale == 1

    @property
    def middle(self) -> npt.NDArray[np.float64]:
        """The middle of the view in the volume, (3,)."""
        return np.array(self.start) + (np.array(self.size) - 1) / 2

    @property
    def matrix(self) -> npt.NDArray[np.float64]:
        """Turns steps in the view into steps in the volume, (3, 3).

        batchgeneratorsv2 before 0.3.4 turned by the transpose of its own matrix.
        """
        turned = create_affine_matrix_3d(self.angles, [self.scale] * 3)
        return turned @ np.diag([-1.0 if m else 1.0 for m in self.mirrored])

    def to_volume(self, voxels: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Where voxels of the view lie in the volume, (..., 3)."""
        return self.middle + (voxels - (np.array(self.size) - 1) / 2) @ self.matrix.T

    def from_volume(self, voxels: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Where voxels of the volume lie in the view, (..., 3)."""
        return (voxels - self.middle) @ np.linalg.inv(self.matrix).T + (np.array(self.size) - 1) / 2


def view_of(volume: Any, placement: Placement) -> Tensor:
    """Cut a view out of a volume, by linear interpolation; 0 outside of it.

    Args:
        volume: array (C, D, H, W); only the part that is needed is read.
        placement: where the view lies.

    Returns:
        ``(C, *placement.size)`` float32.
    """
    size = np.array(placement.size)
    reach = np.abs(placement.matrix) @ (size - 1) / 2
    margin = np.zeros(3, dtype=int) if placement.is_upright else np.ceil(reach - (size - 1) / 2).clip(0).astype(int) + 1
    box = [[int(s - m), int(s + n + m)] for s, n, m in zip(placement.start, size, margin, strict=True)]
    view = torch.from_numpy(crop_and_pad_nd(volume, box, 0).astype(np.float32))
    if not placement.is_upright:
        transform = SpatialTransform(
            placement.size,
            0,
            random_crop=False,
            p_rotation=1,
            rotation=lambda image, dim: placement.angles[dim],
            p_scaling=1,
            scaling=placement.scale,
        )
        view = transform(image=view)["image"]
    return view.flip([axis + 1 for axis, mirrored in enumerate(placement.mirrored) if mirrored]).contiguous()


def resized_crop(start: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> Placement:
    """A part of a crop, resized to the size of the crop, and mirrored (He et al., MAE, section 4).

    Args:
        start: first voxel of the crop.
        size: voxels per axis of the crop.
        rng: source of randomness.

    Returns:
        The placement of a view that shows 20 to 100 % of the crop.
    """
    scale = float(rng.uniform(SMALLEST_SHARE, 1)) ** (1 / 3)
    room = (1 - scale) / 2 * np.array(size)
    moved = tuple(int(s + round(rng.uniform(-r, r))) for s, r in zip(start, room, strict=True))
    return Placement(moved, tuple(size), scale=scale, mirrored=_mirrored(rng))


def turned_crop(
    start: Sequence[int], size: Sequence[int], spacing: Sequence[float], rng: np.random.Generator
) -> Placement:
    """A crop that is turned by up to 30 degrees about each axis, scaled by 1 / 1.4 to 1.4, and mirrored.

    Args:
        start: first voxel of the crop.
        size: voxels per axis.
        spacing: mm per voxel. If one axis is more than three times as coarse as another, views are turned about it
            only, as nnU-Net does, because turning them about the others would distort them.
        rng: source of randomness.
    """
    angles = rng.uniform(-LARGEST_ANGLE, LARGEST_ANGLE, 3)
    if max(spacing) > _ANISOTROPIC * min(spacing):
        angles[np.arange(3) != int(np.argmax(spacing))] = 0
    scale = float(LARGEST_SCALING ** rng.uniform(-1, 1))
    return Placement(tuple(start), tuple(size), tuple(angles.tolist()), scale, _mirrored(rng))


def changed_intensities(view: Tensor, rng: np.random.Generator) -> Tensor:
    """The view with its intensities scaled and shifted, every channel in its own way."""
    factors = rng.uniform(SMALLEST_FACTOR, 2 - SMALLEST_FACTOR, len(view))
    shifts = rng.uniform(-LARGEST_SHIFT, LARGEST_SHIFT, len(view))
    factor, shift = (torch.from_numpy(v).float()[:, None, None, None] for v in (factors, shifts))
    deviation = view.flatten(1).std(dim=1, correction=0)[:, None, None, None]
    return view * factor + shift * deviation


def _mirrored(rng: np.random.Generator) -> tuple[bool, ...]:
    return tuple(bool(flip) for flip in rng.random(3) < 0.5)
