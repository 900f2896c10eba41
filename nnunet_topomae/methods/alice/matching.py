"""Finds the same body part in another volume."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnunet_topomae.methods.base import ImageSource
from nnunet_topomae.methods.crops import random_start

Start = tuple[int, ...]
_WINDOW = (0.5, 99.5)  # percentiles between which intensities are taken to lie
_BODY = 0.1  # share of that range above which a voxel belongs to the body


class Pair(NamedTuple):
    """Two crops that show the same body part.

    Attributes:
        query: name of the case that the first crop is from, and the first voxel of the crop.
        key: the same of the second crop; voxels may be negative, where the crop reaches beyond its volume.
        quality: how good the match is, by name; scalars.
    """

    query: tuple[str, Start]
    key: tuple[str, Start]
    quality: Mapping[str, float]


class Matcher(ABC):
    """Draws pairs of crops; it is sent to the loader's processes.

    Args:
        crop_size: voxels per axis.
    """

    qualities: Sequence[str] = ()  # the names of Pair.quality

    def __init__(self, crop_size: Sequence[int]):
        self.crop_size = tuple(crop_size)

    @abstractmethod
    def pair(self, images: ImageSource, case: str, rng: np.random.Generator) -> Pair:
        """Draw a crop of a case, and the crop of the same body part.

        Raises:
            ValueError: if there is no other case.
        """

    def example(self, batch_size: int) -> dict[str, Tensor]:
        """A batch of the qualities of a pair, made without any image."""
        return {name: torch.ones(batch_size) for name in self.qualities}

    def random_start(self, images: ImageSource, case: str, rng: np.random.Generator) -> Start:
        """First voxel of a crop, uniform over all places inside the volume."""
        return random_start(images.load(case).shape[1:], self.crop_size, rng)

    def start_around(self, point: npt.NDArray[np.float64]) -> Start:
        """First voxel of the crop whose middle is nearest to a point in voxels, (3,)."""
        return tuple(int(start) for start in np.rint(point - self.half))

    @property
    def half(self) -> npt.NDArray[np.float64]:
        """From the first voxel of a crop to its middle, (3,)."""
        return (np.array(self.crop_size) - 1) / 2


def check_partners(cases: Sequence[str]) -> None:
    """Make sure that every case has another one to find the same body part in.

    Raises:
        ValueError: if there is only one.
    """
    if len(set(cases)) < 2:  # fold all has the same cases to train and to validate on
        raise ValueError(
            f"{cases[0]} is the only image, so there is no other one to find the same body part in; add "
            f"images with nnUNetv2_topomae add_unlabelled, or set pretraining.matcher to same_volume and "
            f"pretraining.l_dv to false"
        )


def draw_partner(images: ImageSource, case: str, rng: np.random.Generator) -> str:
    """Another case than this one.

    Raises:
        ValueError: if there is none.
    """
    check_partners(images.partners)
    others = [other for other in images.partners if other != case]
    return others[int(rng.integers(len(others)))]


class SameVolume(Matcher):
    """Both crops are from one place in one volume, as in the row of Table 4 without inter-volume pairs."""

    def pair(self, images: ImageSource, case: str, rng: np.random.Generator) -> Pair:
        """See :meth:`Matcher.pair`."""
        start = self.random_start(images, case, rng)
        return Pair((case, start), (case, start), {})


class Position(Matcher):
    """The middles of both crops have the same relative coordinates in the bounding boxes of the two bodies."""

    def __init__(self, crop_size: Sequence[int]):
        super().__init__(crop_size)
        self._boxes: dict[str, npt.NDArray[np.float64]] = {}

    def pair(self, images: ImageSource, case: str, rng: np.random.Generator) -> Pair:
        """See :meth:`Matcher.pair`."""
        other = draw_partner(images, case, rng)
        start = self.random_start(images, case, rng)
        (low, high), (other_low, other_high) = self._box(images, case), self._box(images, other)
        relative = (np.array(start) + self.half - low) / (high - low)
        point = other_low + relative * (other_high - other_low)
        return Pair((case, start), (other, self.start_around(point)), {})

    def _box(self, images: ImageSource, case: str) -> npt.NDArray[np.float64]:
        """Bounding box of a body; each volume is read once by each process."""
        if case not in self._boxes:
            self._boxes[case] = bounding_box(body(np.asarray(images.load(case)[0])))
        return self._boxes[case]


def body(image: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Which voxels of an image (D, H, W) are not background: those that are not among the darkest.

    The threshold is a tenth of the way from the 0.5 to the 99.5 percentile. An image without contrast is all body.
    """
    low, high = np.percentile(image, _WINDOW)
    return image > low + _BODY * (high - low) if high > low else np.ones(image.shape, dtype=bool)


def bounding_box(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Borders of what is true in a mask (D, H, W): the lower and the upper ones, (2, 3) voxels.

    Borders are half a voxel outside of the outermost voxels' middles, so that no box is empty.
    """
    occupied = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return np.array([[each[0] - 0.5 for each in occupied], [each[-1] + 0.5 for each in occupied]])
