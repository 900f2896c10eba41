"""What Alice draws from the images: crops of one body part in two volumes, and two views of each."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nnunet_topomae.methods.alice.augmentation import (
    Placement,
    changed_intensities,
    resized_crop,
    turned_crop,
    view_of,
)
from nnunet_topomae.methods.alice.matching import Matcher
from nnunet_topomae.methods.base import Batch, ImageSource
from nnunet_topomae.methods.masked import CropViews

KEY = "key_"  # before the names of what belongs to the key


class PairViews(CropViews):
    """Two views of a crop, and two of a crop that shows the same body part in another volume.

    Args:
        crop_size: voxels per axis.
        mask_grid: patches per axis.
        mask_ratio: share of patches hidden.
        matcher: finds the other crop.
    """

    def __init__(self, crop_size: Sequence[int], mask_grid: Sequence[int], mask_ratio: float, matcher: Matcher):
        super().__init__(crop_size, mask_grid, mask_ratio)
        self.matcher = matcher

    def draw(self, images: ImageSource, case: str, rng: np.random.Generator, mirror: bool) -> dict[str, Tensor]:
        """Views of a query and of a key; see :meth:`Views.draw`.

        ``crop`` (C, D, H, W), of which ``mask`` (d, h, w) is hidden, is the online encoder's view of the query, and
        ``target`` the target encoder's; ``order`` is that of :class:`CropViews`. ``key_crop``, ``key_mask``,
        ``key_target`` and ``key_order`` are those of the key. In validation (``mirror=False``) both views of a crop are
        the crop itself.
        """
        pair = self.matcher.pair(images, case, rng)
        item = self._views(images, *pair.query, rng, augment=mirror)
        item |= {f"{KEY}{name}": view for name, view in self._views(images, *pair.key, rng, augment=mirror).items()}
        return {**item, **{name: torch.tensor(value, dtype=torch.float32) for name, value in pair.quality.items()}}

    def _views(
        self, images: ImageSource, case: str, start: Sequence[int], rng: np.random.Generator, *, augment: bool
    ) -> dict[str, Tensor]:
        volume = images.load(case)
        hidden = {"mask": self.draw_mask(rng), "order": self.draw_order(rng)}
        if not augment:
            crop = view_of(volume, Placement(tuple(start), self.crop_size))
            return {"crop": crop, "target": crop, **hidden}
        return {
            "crop": view_of(volume, resized_crop(start, self.crop_size, rng)),
            **hidden,
            "target": changed_intensities(
                view_of(volume, turned_crop(start, self.crop_size, images.spacing, rng)), rng
            ),
        }

    def example(self, batch_size: int, num_channels: int) -> Batch:
        """See :meth:`Views.example`; masks hide the first patches."""
        views = super().example(batch_size, num_channels)
        views["target"] = views["crop"].clone()
        keys = {f"{KEY}{name}": view.clone() for name, view in views.items()}
        return {**views, **keys, **self.matcher.example(batch_size)}


def exchanged(batch: Batch) -> Batch:
    """A batch in which queries and keys have changed places."""
    names = [name for name in batch if f"{KEY}{name}" in batch]
    return {**batch, **{n: batch[f"{KEY}{n}"] for n in names}, **{f"{KEY}{n}": batch[n] for n in names}}
