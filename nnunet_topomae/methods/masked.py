"""What masked methods share: a crop and a mask per item, a teacher that may choose the mask, pictures of the result."""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_topomae.methods.autoencoders import MaskedAutoencoder, train_only
from nnunet_topomae.methods.base import Batch, CaseReport, ImageSource, Output, PretextTask, Views, to_float32
from nnunet_topomae.methods.crops import random_crop
from nnunet_topomae.methods.inpainting import HARMONIC, WITH_MEANS, harmonic_inpainting, visible_mean
from nnunet_topomae.methods.losses import (
    compose,
    denormalise_patches,
    masked_mse,
    normalise_patches,
    patch_means,
    patch_statistics,
    with_patch_means_of,
)
from nnunet_topomae.methods.masking import hardest_patches_mask, mask_to_voxels, num_hidden_patches, random_patch_mask
from nnunet_topomae.methods.moving_average import follow
from nnunet_topomae.networks.geometry import Size, grid_of
from nnunet_topomae.reporting.metrics import reconstruction_metrics
from nnunet_topomae.settings import PretrainingConfig
from nnunet_topomae.settings.schema import Choice, Number, block, setting

MASK_SOURCES = ("random", "anatomask")
HARDNESS_SCORES = ("denormalised", "normalised", "mixed")
_MOMENTA, _STEPS = (0.999, 0.9999), 250_000  # of the published training, at its start and from a quarter of it on
_MOMENTUM_RISES = 0.25  # share of the training, AnatoMask


@dataclass(frozen=True)
class TeacherConfig:
    """``pretraining.anatomask``: which patches a teacher hides, and how it follows its student."""

    first_share: float = setting(
        0.0, Number(0, 1), "share of the hidden patches that the teacher chooses at the start", "AnatoMask, 3.3"
    )
    last_share: float = setting(
        0.5, Number(0, 1), "the same share at the end; it grows linearly in between", "AnatoMask, 3.3"
    )
    first_momentum: float | None = setting(
        None,
        Number(0, 1, optional=True),
        "momentum of the teacher at the start; null: 0.999 in a training of 250,000 steps, in others so that the "
        "teacher averages over the same share of all steps, 0.4 %",
        "AnatoMask; other lengths: ours",
    )
    last_momentum: float | None = setting(
        None,
        Number(0, 1, optional=True),
        "the same from 25 % of the training on; before that it rises linearly from `first_momentum`; null: 0.9999, or "
        "4 % of all steps",
        "AnatoMask; other lengths: ours",
    )
    hardness: str = setting(
        "denormalised",
        Choice(HARDNESS_SCORES),
        "which error tells how hard a patch is, in methods whose target is normalised per patch",
        "ours, see docs/methods/anatomask.md",
    )

    def momentum(self, progress: float, steps: int) -> float:
        """Momentum of the teacher at a share of a training of so many steps.

        A teacher of momentum m averages over 1 / (1 - m) steps. With the published momenta that are 1,000 and 10,000
        steps, so after a training of 1,500 steps two thirds of the teacher would still be its random first weights.
        """
        first, last = (
            max(1 - (1 - published) * _STEPS / steps, 0) if own is None else own
            for own, published in zip((self.first_momentum, self.last_momentum), _MOMENTA, strict=True)
        )
        return first + (last - first) * min(progress / _MOMENTUM_RISES, 1)


@dataclass(frozen=True)
class MaskedConfig(PretrainingConfig):
    """What the ``pretraining`` blocks of masked methods have in common."""

    mask_ratio: float = setting(
        0.5, Number(0, 1, low_open=True, high_open=True), "share of the patches that are hidden", "paper, I"
    )
    mask_source: str = setting(
        "random",
        Choice(MASK_SOURCES),
        "which patches are hidden: `random` ones, or `anatomask`: more and more of those that a teacher finds hardest",
        "AnatoMask",
    )
    anatomask: TeacherConfig = block(TeacherConfig)


class CropViews(Views):
    """One random crop and one random mask.

    Args:
        crop_size: voxels per axis.
        mask_grid: patches per axis.
        mask_ratio: share of patches hidden.
    """

    def __init__(self, crop_size: Sequence[int], mask_grid: Sequence[int], mask_ratio: float):
        self.crop_size, self.mask_grid, self.mask_ratio = tuple(crop_size), tuple(mask_grid), mask_ratio

    def draw(self, images: ImageSource, case: str, rng: np.random.Generator, mirror: bool) -> dict[str, Tensor]:
        """``crop`` (C, D, H, W) float32, ``mask`` and ``order`` (d, h, w); see :meth:`Views.draw`."""
        crop, _ = random_crop(images.load(case), self.crop_size, rng, mirror)
        return {"crop": crop, "mask": self.draw_mask(rng), "order": self.draw_order(rng)}

    def draw_mask(self, rng: np.random.Generator) -> Tensor:
        """(d, h, w) bool, True = hidden."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**63 - 1)))
        return random_patch_mask(self.mask_grid, self.mask_ratio, generator)

    def draw_order(self, rng: np.random.Generator) -> Tensor:
        """(d, h, w) float32 random numbers, by which patches are hidden that a teacher does not choose."""
        return torch.from_numpy(rng.random(self.mask_grid, np.float32))

    def example(self, batch_size: int, num_channels: int) -> Batch:
        """See :meth:`Views.example`; the mask hides the first patches."""
        num_patches = prod(self.mask_grid)
        mask = torch.arange(num_patches) < num_hidden_patches(num_patches, self.mask_ratio)
        return {
            "crop": torch.rand(batch_size, num_channels, *self.crop_size),
            "mask": mask.reshape(1, *self.mask_grid).repeat(batch_size, 1, 1, 1),
            "order": torch.rand(batch_size, *self.mask_grid),
        }


class MaskedReconstruction(PretextTask):
    """A task that reconstructs the hidden patches of a crop.

    Its ``forward`` returns a dictionary of reconstructions (B, C, D, H, W) by branch; a subclass whose ``forward``
    returns something else overrides :meth:`images` too.

    Attributes:
        teacher: a moving average of the task that chooses which patches are hidden; None if chance does.
    """

    config_class = MaskedConfig
    config: MaskedConfig
    yardstick = HARMONIC
    teacher: "MaskedReconstruction | None"

    def __init__(self, network: nn.Module, config: MaskedConfig, crop_size: Sequence[int]):
        super().__init__(network, config, crop_size)
        self.teacher = None

    @classmethod
    def build(cls, network: nn.Module, config: Any, crop_size: Sequence[int]) -> "MaskedReconstruction":
        """Make the task, with a teacher if ``mask_source`` asks for one.

        Raises:
            ValueError: if the patches do not divide the crop; or as the constructor of the method says.
        """
        task = cls(network, config, crop_size)
        grid_of(crop_size, task.patch_size, "patch size")
        if config.mask_source == "anatomask":
            task.teacher = copy.deepcopy(task).requires_grad_(False)
        return task

    @property
    @abstractmethod
    def patch_size(self) -> Size:
        """Voxels per axis of a patch."""

    @property
    def mask_grid(self) -> tuple[int, ...]:
        """Patches per axis of a crop."""
        return tuple(size // patch for size, patch in zip(self.crop_size, self.patch_size, strict=True))

    @property
    def num_hidden(self) -> int:
        """How many patches of a crop are hidden."""
        return num_hidden_patches(prod(self.mask_grid), self.config.mask_ratio)

    @property
    def num_visible(self) -> int:
        """How many patches of a crop are not hidden."""
        return prod(self.mask_grid) - self.num_hidden

    def views(self) -> CropViews:
        """One random crop and one random mask."""
        return CropViews(self.crop_size, self.mask_grid, self.config.mask_ratio)

    def images(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """The reconstructions of all branches as images like the crop, (B, C, D, H, W) each."""
        return output

    def hidden_voxels(self, batch: Batch) -> Tensor:
        """The mask at voxels, (B, 1, D, H, W) bool."""
        return mask_to_voxels(batch["mask"], self.patch_size)

    def baselines(self, batch: Batch) -> dict[str, Tensor]:
        """What predictors that learn nothing make of the hidden voxels, (B, C, D, H, W) by name."""
        crop, hidden = batch["crop"], self.hidden_voxels(batch)
        return {"visible mean": visible_mean(crop, hidden), HARMONIC: harmonic_inpainting(crop, hidden)}

    def baseline_error(self, batch: Batch) -> Tensor:
        """Mean squared error of the yardstick over hidden voxels; see :meth:`PretextTask.baseline_error`."""
        return masked_mse(self.baselines(batch)[self.yardstick], batch["crop"], self.hidden_voxels(batch))

    def errors(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error of the reconstructed images over hidden voxels, by branch."""
        hidden = self.hidden_voxels(batch)
        return {b: masked_mse(image, batch["crop"], hidden) for b, image in self.images(output, batch).items()}

    def patch_errors(self, output: Output, batch: Batch) -> Tensor:
        """Mean squared error of every patch, averaged over channels and branches; (B, d, h, w)."""
        errors = [
            patch_means((image - batch["crop"]).square(), self.patch_size).mean(dim=1)
            for image in self.images(output, batch).values()
        ]
        return torch.stack(errors).mean(dim=0)

    @torch.no_grad()
    def choose(self, batch: Batch, progress: float) -> Batch:
        """The batch with the mask to train on (AnatoMask, section 3.3).

        Without a teacher it is the mask as drawn. A teacher reconstructs the crop under that mask; the new one hides
        the patches that it reconstructs worst, and random others. See :meth:`PretextTask.choose`.
        """
        if self.teacher is None:
            return batch
        settings = self.config.anatomask
        share = settings.first_share + (settings.last_share - settings.first_share) * progress
        with self.teacher.without_loss():
            output = self.teacher.eval()(batch)
        errors = self.teacher.patch_errors(to_float32(output), batch)
        num_hardest = int(self.num_hidden * share)
        mask = hardest_patches_mask(errors * batch["mask"], self.num_hidden, num_hardest, batch["order"])
        return {**batch, "mask": mask}

    def after_step(self, output: Output, batch: Batch, progress: float) -> None:
        """Let the teacher follow; see :meth:`PretextTask.after_step`."""
        if self.teacher is None:
            return
        steps = self.config.num_epochs * self.config.num_iterations_per_epoch
        follow(self.teacher, self, self.config.anatomask.momentum(progress, steps))

    def shown(self, output: Output, batch: Batch) -> CaseReport:
        """The crop, what the network saw of it, and the reconstructions with visible patches taken from the crop."""
        crop, hidden = batch["crop"], self.hidden_voxels(batch)
        images = self.images(output, batch)
        baselines = self.baselines(batch)
        columns = {"input": crop, "masked": crop.masked_fill(hidden, torch.nan)}
        columns[self.yardstick] = baselines[self.yardstick]
        columns |= {self.headings.get(branch, branch): compose(crop, image, hidden) for branch, image in images.items()}
        metrics = {
            name: reconstruction_metrics(*(t[0].cpu().numpy() for t in (crop, image, hidden)))
            for name, image in {**images, **baselines}.items()
        }
        return CaseReport({heading: volume[0].cpu().numpy() for heading, volume in columns.items()}, metrics)


class NormalisedReconstruction(MaskedReconstruction):
    """A task with one branch, whose target is normalised: mean 0 and deviation 1 in every patch and channel.

    He et al., section 4.1. It pre-trains the encoder of a network; all other parts stay as they are. ``headings`` names
    the branch. A subclass whose ``forward`` returns something else overrides :meth:`normalised` and :meth:`loss_terms`.

    Args:
        network: see :class:`PretextTask`.
        config: the plans' ``pretraining`` block.
        crop_size: voxels per axis.
        autoencoder: for this network.
    """

    yardstick = WITH_MEANS
    autoencoder: MaskedAutoencoder

    def __init__(
        self, network: nn.Module, config: MaskedConfig, crop_size: Sequence[int], autoencoder: MaskedAutoencoder
    ):
        super().__init__(network, config, crop_size)
        train_only(autoencoder.encoder_of(self), self)
        self.autoencoder = autoencoder

    @property
    def patch_size(self) -> Size:
        """The patches of the autoencoder, voxels per axis."""
        return self.autoencoder.patch_size

    def loss_terms(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error of hidden patches; see :meth:`PretextTask.loss_terms`."""
        (branch,) = self.headings
        target = normalise_patches(batch["crop"], self.patch_size)
        error = masked_mse(self.normalised(output), target, self.hidden_voxels(batch))
        return {"total": error, f"{branch}_mse": error}

    def normalised(self, output: Output) -> Tensor:
        """What the branch predicts of ``crop``: normalised patches, (B, C, D, H, W)."""
        (prediction,) = output.values()
        return prediction

    def images(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """The reconstruction with the mean and the deviation of the crop's patches put back."""
        (branch,) = self.headings
        return {branch: denormalise_patches(self.normalised(output), batch["crop"], self.patch_size)}

    def baselines(self, batch: Batch) -> dict[str, Tensor]:
        """Two more that are told the true mean of every patch, as are images whose normalisation has been undone.

        See :meth:`MaskedReconstruction.baselines`.
        """
        untold = super().baselines(batch)
        mean, _ = patch_statistics(batch["crop"], self.patch_size)
        told = with_patch_means_of(batch["crop"], untold[HARMONIC], self.patch_size)
        return {**untold, "true patch mean": mean, self.yardstick: told}

    def patch_errors(self, output: Output, batch: Batch) -> Tensor:
        """The error that ``anatomask.hardness`` names; see :meth:`MaskedReconstruction.patch_errors`."""
        if self.config.anatomask.hardness == "denormalised":
            return super().patch_errors(output, batch)
        prediction = self.normalised(output)
        crop, normalised = batch["crop"], self.config.anatomask.hardness == "normalised"
        target = normalise_patches(crop, self.patch_size) if normalised else crop
        return patch_means((prediction - target).square(), self.patch_size).mean(dim=1)
