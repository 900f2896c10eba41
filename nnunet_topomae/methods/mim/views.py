"""What MiM draws from the images: a crop of twice the size, and what is hidden and cut out at every level."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnunet_topomae.methods.base import Batch, ImageSource, Views
from nnunet_topomae.methods.crops import Place, random_crop
from nnunet_topomae.networks.geometry import Size

_ROUNDING = 1e-9

Interval = npt.NDArray[np.float64]  # (3, 2): start and end per axis, as shares of a volume


@dataclass(frozen=True)
class Level:
    """How the volumes of a level are hidden, and what is cut from them.

    Attributes:
        grid: parts per axis that are hidden as a whole: units at level 1, patches at the others.
        num_hidden: how many of them are hidden.
        num_children: how many of them become volumes of the next level; 0 at the last one.
        from_visible: whether these are visible ones instead of hidden ones.
    """

    grid: Size
    num_hidden: int
    num_children: int = 0
    from_visible: bool = False

    def draw(self, image: Interval, rng: np.random.Generator) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """A mask, and the parts that become volumes of the next level.

        Without padding this hides a random set of parts and takes children of them at random. Children always touch the
        image. If fewer parts touch it than there are to be children, some become children more than once.

        Args:
            image: the part of the volume that the image fills.
            rng: source of randomness.

        Returns:
            A mask (d, h, w), True = hidden, and raster indices (num_children,).
        """
        candidates = rng.permutation(np.flatnonzero(touching(image, self.grid)))
        children = np.resize(candidates, self.num_children)
        others = rng.permutation(np.setdiff1d(np.arange(prod(self.grid)), children))
        children_first = [*dict.fromkeys(children), *others]
        mask = np.zeros(prod(self.grid), dtype=bool)
        mask[children_first[-self.num_hidden :] if self.from_visible else children_first[: self.num_hidden]] = True
        return mask.reshape(self.grid), children


class NestedViews(Views):
    """A crop of twice the size of the others, and what is hidden and cut out at every level (section 3.2).

    Args:
        crop_size: voxels per axis of the volumes of all levels.
        patch_grid: patches per axis of these volumes.
        levels: of each one, the coarsest first.
        mirror: whether training may mirror the crop.
    """

    def __init__(self, crop_size: Sequence[int], patch_grid: Size, levels: Sequence[Level], mirror: bool):
        self.crop_size, self.patch_grid, self.levels, self.mirror = tuple(crop_size), patch_grid, tuple(levels), mirror

    def draw(self, images: ImageSource, case: str, rng: np.random.Generator, mirror: bool) -> dict[str, Tensor]:
        """``crop`` (C, 2D, 2H, 2W) float32, and masks and children by level; see :meth:`Views.draw`.

        ``mask_1`` (d, h, w), ``mask_2`` (gamma, d, h, w) and ``mask_3`` (gamma, beta, d, h, w) hide patches, True =
        hidden. ``children_1`` (gamma,) are raster indices of units of level 1, ``children_2`` (gamma, beta) of patches
        of the volumes of level 2.
        """
        crop, place = random_crop(images.load(case), self._doubled, rng, mirror and self.mirror)
        return {"crop": crop, **self._draw_levels(image_in(place), rng)}

    @property
    def _doubled(self) -> list[int]:
        return [2 * size for size in self.crop_size]

    def _draw_levels(self, image: Interval, rng: np.random.Generator) -> dict[str, Tensor]:
        """Masks and children, in a crop that the image fills in part."""
        drawn: dict[str, Tensor] = {}
        images = [image]  # of all volumes of a level
        shape: tuple[int, ...] = ()  # how these are counted
        for number, level in enumerate(self.levels, start=1):
            masks, children = zip(*(level.draw(each, rng) for each in images), strict=True)
            of_patches = [_repeated(mask, self.patch_grid) for mask in masks]
            drawn[f"mask_{number}"] = torch.tensor(np.stack(of_patches)).reshape(*shape, *self.patch_grid)
            if level.num_children:
                drawn[f"children_{number}"] = torch.tensor(np.stack(children)).reshape(*shape, level.num_children)
                pairs = zip(images, children, strict=True)
                images = [zoomed(each, index, level.grid) for each, own in pairs for index in own]
                shape = (*shape, level.num_children)
        return drawn

    def example(self, batch_size: int, num_channels: int) -> Batch:
        """See :meth:`Views.example`."""
        drawn = self._draw_levels(np.array([[0.0, 1.0]] * 3), np.random.default_rng(0))
        repeated = {name: torch.stack([tensor] * batch_size) for name, tensor in drawn.items()}
        return {"crop": torch.rand(batch_size, num_channels, *self._doubled), **repeated}


def _repeated(mask: npt.NDArray[np.bool_], grid: Size) -> npt.NDArray[np.bool_]:
    """A mask of parts as a mask of the smaller patches that they consist of."""
    for axis, patches in enumerate(grid):
        mask = mask.repeat(patches // mask.shape[axis], axis)
    return mask


def image_in(place: Place) -> Interval:
    """The part of a crop that the image fills, the rest being padding."""
    first = np.maximum(np.negative(place.start), 0)
    last = np.minimum(np.subtract(place.volume_shape, place.start), place.crop_shape)
    return np.stack([first, last], axis=1) / np.asarray(place.crop_shape)[:, None]


def touching(image: Interval, grid: Size) -> npt.NDArray[np.bool_]:
    """Which parts of a volume hold some of the image; (d, h, w).

    Args:
        image: the part of the volume that the image fills.
        grid: parts per axis.
    """
    touched = np.ones((), dtype=bool)
    for (start, end), parts in zip(image, grid, strict=True):
        index = np.arange(parts)
        touched = touched[..., None] & (start * parts < index + 1 - _ROUNDING) & (end * parts > index + _ROUNDING)
    return touched


def zoomed(image: Interval, index: int, grid: Size) -> Interval:
    """The part of one part of a volume that the image fills.

    Args:
        image: the part of the volume that the image fills.
        index: raster index of the part.
        grid: parts per axis.
    """
    position = np.stack(np.unravel_index(index, grid))
    return np.clip(image * np.asarray(grid)[:, None] - position[:, None], 0, 1)
