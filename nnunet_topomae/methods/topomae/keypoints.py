"""Where a crop lies in its volume: nine key points (Gu et al., section II-B)."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

NUM_KEYPOINTS = 9


def crop_keypoints(
    crop_start: Sequence[int], crop_shape: Sequence[int], volume_shape: Sequence[int]
) -> npt.NDArray[np.float32]:
    """The eight corners and the centre of a crop, relative to the volume it was taken from.

    Coordinates are those of voxel borders: a crop that covers the whole volume has its corners at exactly -1 and 1.
    Along an axis where a padded crop reaches beyond the volume, -1 and 1 are the outer ends of both, so that tanh can
    still predict every key point.

    Args:
        crop_start: first voxel of the crop per axis (z, y, x); negative where the crop is padded.
        crop_shape: voxels per axis.
        volume_shape: voxels per axis.

    Returns:
        Corners in lexicographic order (z slowest; low before high), then the centre, (9, 3) float32 in [-1, 1]; each
        row is (z, y, x).

    Raises:
        ValueError: if a shape is not positive.

    Example:
        A crop of half the volume's length, at its beginning: its first corner is that of the volume, its last corner
        is the volume's centre, and its own centre lies half-way between.

        >>> from nnunet_topomae.methods.topomae.keypoints import crop_keypoints
        >>> points = crop_keypoints((0, 0, 0), (2, 2, 2), (4, 4, 4))
        >>> points[[0, 7, 8]].tolist()
        [[-1.0, -1.0, -1.0], [0.0, 0.0, 0.0], [-0.5, -0.5, -0.5]]
    """
    start, shape, volume = (np.asarray(values, dtype=np.float64) for values in (crop_start, crop_shape, volume_shape))
    if (shape <= 0).any() or (volume <= 0).any():
        raise ValueError(f"shapes must be positive, got crop {tuple(crop_shape)} in volume {tuple(volume_shape)}")
    corners = np.array(list(product(*zip(start, start + shape, strict=True))))
    points = np.concatenate([corners, (start + shape / 2)[None]])
    low, extent = scaled_interval(start, shape, volume)
    return (2 * (points - low) / extent - 1).astype(np.float32)


def scaled_interval(
    crop_start: npt.ArrayLike, crop_shape: npt.ArrayLike, volume_shape: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The interval per axis that :func:`crop_keypoints` scales to [-1, 1].

    Returns:
        Lower end and length, (3,) each, in voxels. Half the length times the spacing turns an error of a key point
        into mm.
    """
    start, shape, volume = (np.asarray(a, dtype=np.float64) for a in (crop_start, crop_shape, volume_shape))
    low = np.minimum(start, 0)
    return low, np.maximum(start + shape, volume) - low


def centred(keypoints: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Key points (9, 3) of a crop of the same size in the middle of its volume."""
    return keypoints - keypoints[-1]


def keypoint_error(predicted: npt.NDArray[np.float32], actual: npt.NDArray[np.float32], extent: npt.ArrayLike) -> float:
    """Mean distance of predicted and actual key points in mm.

    Args:
        predicted: (9, 3) in [-1, 1].
        actual: the same.
        extent: length in mm per axis of the interval that is scaled to [-1, 1].
    """
    difference = (predicted - actual) * np.asarray(extent) / 2
    return float(np.linalg.norm(difference, axis=1).mean())
