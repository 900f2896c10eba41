"""Two overlapping views of an image, and the same places in both."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnunet_topomae.methods.alice.augmentation import Placement, changed_intensities, view_of
from nnunet_topomae.methods.alice.landmarks.contrast import Points
from nnunet_topomae.methods.crops import random_start

NUM_POINTS = 100  # SAM
_SCALES = (0.8, 1.2)  # SAM
_ANGLE = np.pi / 12  # ours: patients do not all lie straight
_NOISE = 0.1  # largest deviation of the noise, in deviations of the image
_CANDIDATES = 20 * NUM_POINTS


def draw_views(
    image: npt.NDArray[np.float32], body: npt.NDArray[np.bool_], size: Sequence[int], rng: np.random.Generator
) -> tuple[Tensor, Tensor, Points]:
    """Draw two views that overlap by at least half along each axis.

    Args:
        image: (C, D, H, W).
        body: (D, H, W), where places are drawn from; if none is in both views, they are drawn from the background.
        size: voxels per axis of a view.
        rng: source of randomness.

    Returns:
        Both views, (C, *size), and 100 places in both.
    """
    start = np.array(random_start(image.shape[1:], size, rng))
    moved = start + rng.integers(-np.array(size) // 2, np.array(size) // 2 + 1)
    room = np.array(image.shape[1:]) - size
    moved = np.where(room > 0, moved.clip(0, room.clip(0)), start)
    placements = [_placement(each, size, rng) for each in (start, moved)]
    views = [_noisy(changed_intensities(view_of(image, placement), rng), rng) for placement in placements]
    return views[0], views[1], _draw_points(placements, body, rng)


def _placement(start: npt.NDArray[np.int64], size: Sequence[int], rng: np.random.Generator) -> Placement:
    angles = rng.uniform(-_ANGLE, _ANGLE, 3).tolist()
    return Placement(tuple(map(int, start)), tuple(size), tuple(angles), float(rng.uniform(*_SCALES)))


def _noisy(view: Tensor, rng: np.random.Generator) -> Tensor:
    deviation = float(view.std()) * rng.uniform(0, _NOISE)
    return view + deviation * torch.from_numpy(rng.standard_normal(view.shape, dtype=np.float32))


def _draw_points(placements: list[Placement], body: npt.NDArray[np.bool_], rng: np.random.Generator) -> Points:
    first, second = placements
    size = np.array(first.size)
    in_first = rng.uniform(0, size - 1, (_CANDIDATES, 3))
    in_volume = first.to_volume(in_first)
    in_second = second.from_volume(in_volume)
    voxels = np.rint(in_volume).astype(int)
    seen = ((in_second >= 0) & (in_second <= size - 1)).all(axis=1)
    inside = ((voxels >= 0) & (voxels < body.shape)).all(axis=1)
    of_body = inside & body[tuple(voxels.clip(0, np.array(body.shape) - 1).T)]
    possible = next((each for each in (seen & of_body, seen & inside, seen) if each.any()), inside)
    chosen = rng.choice(np.flatnonzero(possible), NUM_POINTS)
    return Points(*(torch.from_numpy(points[chosen]).float() for points in (in_first, in_second)))
