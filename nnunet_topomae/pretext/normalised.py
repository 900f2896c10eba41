"""Reconstruction of patches that are normalised one by one (He et al., section 4.1)."""

from torch import Tensor

from nnunet_topomae.masking import mask_to_voxels
from nnunet_topomae.pretext.base import PretextOutput, PretextTask, masked_mse, patch_means, patch_statistics


class NormalisedReconstruction(PretextTask):
    """A task with one branch, whose target is the crop with every patch and channel at mean 0 and deviation 1."""

    def loss_terms(self, output: PretextOutput, crop: Tensor, mask: Tensor, keypoints: Tensor) -> dict[str, Tensor]:
        """Mean squared error of hidden patches; see :meth:`PretextTask.loss_terms`."""
        ((branch, prediction),) = output.reconstructions.items()
        error = masked_mse(prediction, self._target(crop), mask_to_voxels(mask, self.patch_size))
        return {"total": error, f"{branch}_mse": error}

    def images(self, output: PretextOutput, crop: Tensor) -> dict[str, Tensor]:
        """With the mean and deviation of the crop's patches put back."""
        mean, deviation = patch_statistics(crop, self.patch_size)
        return {branch: prediction * deviation + mean for branch, prediction in output.reconstructions.items()}

    def patch_errors(self, output: PretextOutput, crop: Tensor) -> Tensor:
        """By the score that ``anatomask.hardness`` names; see :meth:`PretextTask.patch_errors`."""
        if self.config.anatomask.hardness == "denormalised":
            return super().patch_errors(output, crop)
        (prediction,) = output.reconstructions.values()
        target = self._target(crop) if self.config.anatomask.hardness == "normalised" else crop
        return patch_means((prediction - target).square(), self.patch_size).mean(dim=1)

    def _target(self, crop: Tensor) -> Tensor:
        mean, deviation = patch_statistics(crop, self.patch_size)
        return (crop - mean) / deviation
