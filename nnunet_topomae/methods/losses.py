"""The error of reconstructions, and the statistics of patches that targets are normalised by."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_topomae.methods.masking import mask_to_voxels

_EPSILON = 1e-6


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over hidden voxels (He et al., section 3, "Reconstruction target").

    Args:
        prediction: (B, C, D, H, W).
        target: the same shape.
        mask: (B, 1, D, H, W) bool, True = hidden.

    Returns:
        A scalar; NaN if nothing is hidden. That is not checked, because the check would make the GPU wait; masks of
        :mod:`nnunet_topomae.methods.masking` always hide something.

    Example:
        One of two voxels is hidden, and the prediction misses it by 3.

        >>> import torch
        >>> from nnunet_topomae.methods.losses import masked_mse
        >>> prediction, target = torch.tensor([5.0, 4.0]), torch.tensor([0.0, 1.0])
        >>> mask = torch.tensor([False, True])
        >>> masked_mse(*(values.reshape(1, 1, 1, 1, 2) for values in (prediction, target, mask)))
        tensor(9.)
    """
    return ((prediction - target).square() * mask).sum() / (mask.sum() * prediction.shape[1])


def compose(crop: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """The crop with its hidden voxels replaced by the prediction; shapes as for :func:`masked_mse`."""
    return prediction.where(mask, crop)


def patch_means(values: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Means over patches: (B, C, D, H, W) to (B, C, d, h, w)."""
    return F.avg_pool3d(values, tuple(patch_size), tuple(patch_size))


def patch_statistics(crop: Tensor, patch_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every patch and channel, repeated at its voxels: (B, C, D, H, W) each.

    The deviation is sqrt(variance + 1e-6) (He et al., section 4.1; AnatoMask).
    """

    def at_voxels(means: Tensor) -> Tensor:
        return mask_to_voxels(means.flatten(0, 1), patch_size).reshape(crop.shape)

    mean = at_voxels(patch_means(crop, patch_size))
    variance = at_voxels(patch_means((crop - mean).square(), patch_size))
    return mean, torch.sqrt(variance + _EPSILON)


def normalise_patches(crop: Tensor, patch_size: Sequence[int]) -> Tensor:
    """The crop with every patch and channel brought to mean 0 and deviation 1; (B, C, D, H, W)."""
    mean, deviation = patch_statistics(crop, patch_size)
    return (crop - mean) / deviation


def denormalise_patches(prediction: Tensor, crop: Tensor, patch_size: Sequence[int]) -> Tensor:
    """A prediction of normalised patches with the mean and the deviation of the crop's patches put back.

    Args:
        prediction: (B, C, D, H, W), as is the result.
        crop: (B, C, D, H, W).
        patch_size: voxels per axis.
    """
    mean, deviation = patch_statistics(crop, patch_size)
    return prediction * deviation + mean


def with_patch_means_of(crop: Tensor, image: Tensor, patch_size: Sequence[int]) -> Tensor:
    """The image with the mean of every patch and channel replaced by that of the crop; (B, C, D, H, W)."""
    (mean, _), (own_mean, _) = (patch_statistics(each, patch_size) for each in (crop, image))
    return image - own_mean + mean
