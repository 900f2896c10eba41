"""What TopoMAE draws from the images."""

import numpy as np
import torch
from torch import Tensor

from nnunet_topomae.methods.base import Batch, ImageSource
from nnunet_topomae.methods.crops import random_crop
from nnunet_topomae.methods.masked import CropViews
from nnunet_topomae.methods.topomae.keypoints import NUM_KEYPOINTS, crop_keypoints, scaled_interval


class KeypointViews(CropViews):
    """A random crop, a random mask, and the nine key points that say where the crop lies in its volume."""

    def draw(self, images: ImageSource, case: str, rng: np.random.Generator, mirror: bool) -> dict[str, Tensor]:
        """What :meth:`CropViews.draw` gives, and where the crop lies.

        ``keypoints`` (9, 3) are scaled to [-1, 1] and mirrored with the volume; ``extent`` (3,) is the length in mm of
        the interval that is scaled, and ``spacing`` (3,) that of a voxel.
        """
        crop, place = random_crop(images.load(case), self.crop_size, rng, mirror)
        extent = scaled_interval(*place)[1] * np.asarray(images.spacing)
        return {
            "crop": crop,
            "mask": self.draw_mask(rng),
            "keypoints": torch.from_numpy(crop_keypoints(*place)),
            "extent": torch.from_numpy(extent.astype(np.float32)),
            "spacing": torch.tensor(images.spacing, dtype=torch.float32),
            "order": self.draw_order(rng),
        }

    def example(self, batch_size: int, num_channels: int) -> Batch:
        """See :meth:`Views.example`."""
        example = super().example(batch_size, num_channels)
        lengths = {"extent": torch.ones(batch_size, 3), "spacing": torch.ones(batch_size, 3)}
        return {**example, "keypoints": torch.zeros(batch_size, NUM_KEYPOINTS, 3), **lengths}
