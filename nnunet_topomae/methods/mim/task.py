"""MiM: one encoder reconstructs volumes of three nested levels and ties each to the one around it (Zhuang et al.)."""

import math
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_topomae.methods.autoencoders import MaskedAutoencoder, autoencoder_of, train_only
from nnunet_topomae.methods.base import Batch, CaseReport, PretextTask
from nnunet_topomae.methods.inpainting import WITH_MEANS, harmonic_inpainting
from nnunet_topomae.methods.losses import (
    compose,
    denormalise_patches,
    masked_mse,
    normalise_patches,
    with_patch_means_of,
)
from nnunet_topomae.methods.masking import mask_to_voxels, num_hidden_patches
from nnunet_topomae.methods.mim.alignment import byol, infonce
from nnunet_topomae.methods.mim.levels import cut
from nnunet_topomae.methods.mim.pictures import outlined
from nnunet_topomae.methods.mim.settings import SCHEDULES, MiMConfig
from nnunet_topomae.methods.mim.views import Level, NestedViews
from nnunet_topomae.methods.token_norm import TokenNorm
from nnunet_topomae.networks.geometry import Size, grid_of, size_of
from nnunet_topomae.networks.vit import initialize_linear_layers
from nnunet_topomae.reporting.metrics import SKILL, reconstruction_metrics, with_skills

_BRANCH, _WEIGHTS = "mim", "weights"


class Part(NamedTuple):
    """Volumes that go through the encoder together, before they are cut.

    Attributes:
        level: from 1 on.
        parents: volumes that they are cut from, (P, C, ...).
        grid: parts per axis of the parents.
        indices: (P, n), the parts that become the volumes.
        mask: (P * n, d, h, w) bool of the patches of the volumes, True = hidden.
    """

    level: int
    parents: Tensor
    grid: Size
    indices: Tensor
    mask: Tensor


class Prediction(NamedTuple):
    """What is predicted for the volumes of all levels.

    Attributes:
        reconstructions: normalised patches, (n, C, D, H, W), of each :class:`Part`.
        queries: (P, n, width) for each pair of levels: of the n finer volumes of each coarser one.
        candidates: (P, R, width) for each pair of levels: of the regions of each coarser volume.
    """

    reconstructions: list[Tensor]
    queries: list[Tensor]
    candidates: list[Tensor]


class First(NamedTuple):
    """The first volume of a level of each item, which is what is shown and what errors are taken of.

    Attributes:
        volume: (B, C, D, H, W).
        hidden: its mask at voxels, (B, 1, D, H, W) bool.
    """

    volume: Tensor
    hidden: Tensor


class Decoded(NamedTuple):
    """What the decoder makes of the volumes of a part.

    Attributes:
        reconstruction: (n, C, D, H, W).
        vector: (n, width), the mean of a volume's features.
        regions: (n, R, width), their means over each region that may become a volume of the next level.
    """

    reconstruction: Tensor
    vector: Tensor
    regions: Tensor


class MiM(PretextTask):
    """Pre-trains the encoder of a network by mask in mask; all other parts stay as they are.

    L = L_R1 + L_R2 + L_R3 + 0.1 (L_C12 + L_C23) (equations 8 to 10).

    Args:
        network: of a kind that :func:`autoencoder_of` knows.
        config: the plans' ``pretraining`` block.
        crop_size: voxels per axis of the volumes of all levels; the crop that is drawn is twice as large.

    Raises:
        ValueError: for another network, or if units, ``gamma`` or ``beta`` do not fit the patches of the network.
    """

    config_class = MiMConfig
    config: MiMConfig
    headings = {_BRANCH: "all levels"}  # noqa: RUF012 - a constant
    yardstick = WITH_MEANS
    autoencoder: MaskedAutoencoder

    def __init__(self, network: nn.Module, config: MiMConfig, crop_size: Sequence[int]):
        autoencoder = autoencoder_of(network, config.decoder_width)
        if autoencoder is None:
            raise ValueError(
                f"MiM pre-trains a ViT, a hybrid encoder or the encoder of a PlainConvUNet or ResidualEncoderUNet, but "
                f"the plans name {type(network).__name__}; plan the dataset with nnUNetv2_topomae plan_and_preprocess "
                f"-pl TopoMAEHybridPlanner, or use plans of nnUNetv2_plan_experiment"
            )
        super().__init__(network, config, crop_size)
        self.patch_grid = grid_of(crop_size, autoencoder.patch_size, "patch size")
        self.level_plans = plan_levels(config, self.patch_grid)
        train_only(autoencoder.encoder_of(self), self)
        self.autoencoder = autoencoder
        if self.is_aligned:
            self._add_heads(autoencoder.width)

    @property
    def is_aligned(self) -> bool:
        """Whether there is an alignment of levels."""
        return self.config.levels > 1 and self.config.alignment != "off"

    def _add_heads(self, width: int) -> None:
        """MLPs of two layers; without negatives regions have none, because two could agree on a constant.

        The means of volumes hardly differ from each other, most of all in U-Nets. So the batch norm takes away what
        they have in common. Without it the loss stays where it can be without looking at the volumes.
        """
        projected = self.config.projection_width
        with_negatives = self.config.alignment == "infonce"
        query_head = Mlp(width, projected, projected if with_negatives else width)
        self.query_head = nn.Sequential(TokenNorm(width), query_head)
        self.candidate_head = Mlp(width, projected, projected) if with_negatives else nn.Identity()
        for head in (self.query_head, self.candidate_head):
            initialize_linear_layers(head)

    def views(self) -> NestedViews:
        """A crop of twice the size, masks of all levels, and what is cut out for the next ones."""
        return NestedViews(self.crop_size, self.patch_grid, self.level_plans, self.config.mirror)

    def choose(self, batch: Batch, progress: float) -> Batch:
        """Add the weights of the levels at this time of the training (Table 14)."""
        return {**batch, _WEIGHTS: batch["crop"].new_tensor(level_weights(self.config, progress))}

    def forward(self, batch: Batch) -> Prediction:
        """See :meth:`PretextTask.forward`; all levels go through the same encoder and decoder."""
        parts = self._parts(batch)
        decoded = [self._decode(part) for part in parts]
        queries, candidates = [], []
        aligned = self.is_aligned and self.loss_follows  # a batch norm cannot take the single volume of a report
        for finer in range(2, self.config.levels + 1) if aligned else ():
            vectors = [each.vector for part, each in zip(parts, decoded, strict=True) if part.level == finer]
            regions = decoded[finer - 2].regions  # levels 1 and 2 are one part each
            by_parent = torch.stack(vectors, dim=1).reshape(len(regions), -1, regions.shape[-1])
            queries.append(self.query_head(by_parent))
            candidates.append(self.candidate_head(regions.detach()))
        return Prediction([each.reconstruction for each in decoded], queries, candidates)

    def _parts(self, batch: Batch) -> list[Part]:
        """What goes through the encoder one after the other: level 1, level 2, and level 3 in ``beta`` parts.

        A part of level 3 holds one child of each volume of level 2.
        """
        crop = batch["crop"]
        whole = torch.zeros(len(crop), 1, dtype=torch.int64, device=crop.device)
        parts = [Part(1, crop, (1, 1, 1), whole, batch["mask_1"])]
        if self.config.levels > 1:
            units = self.level_plans[0].grid
            parts.append(Part(2, crop, units, batch["children_1"], batch["mask_2"].flatten(0, 1)))
        if self.config.levels > 2:
            volumes, indices = self._volumes(parts[1]), batch["children_2"].flatten(0, 1)
            masks = batch["mask_3"].flatten(0, 1)
            for n in range(self.config.beta):
                parts.append(Part(3, volumes, self.patch_grid, indices[:, n : n + 1], masks[:, n]))
        return parts

    def _volumes(self, part: Part) -> Tensor:
        """The volumes of a part, (P * n, C, D, H, W)."""
        return cut(part.parents, part.grid, part.indices, self.crop_size)

    def _decode(self, part: Part) -> Decoded:
        level = self.level_plans[part.level - 1]
        num_visible = prod(self.patch_grid) * (prod(level.grid) - level.num_hidden) // prod(level.grid)

        def decode(parents: Tensor, indices: Tensor, mask: Tensor) -> Decoded:
            volumes = cut(parents, part.grid, indices, self.crop_size)
            features = self.autoencoder.decode(self.autoencoder.encoder_of(self), volumes, mask, num_visible)
            of_patches = F.adaptive_avg_pool3d(features, self.patch_grid)  # U-Nets have features at voxels
            regions = F.adaptive_avg_pool3d(of_patches, level.grid).flatten(2).transpose(1, 2)
            return Decoded(self.autoencoder.predict(features), of_patches.mean(dim=(2, 3, 4)), regions)

        return self._recomputed(part, decode, part.parents, part.indices, part.mask)

    def _recomputed(self, part: Part, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """The result of a function, which at level 3 is computed again in the backward pass in place of being kept."""
        if part.level == 3 and self.config.recompute and torch.is_grad_enabled():
            return checkpoint(function, *tensors, use_reentrant=False)
        return function(*tensors)

    def loss_terms(self, output: Prediction, batch: Batch) -> dict[str, Tensor]:
        """Reconstruction of each level, alignment of each pair of levels, and ``total``.

        See :meth:`PretextTask.loss_terms`.
        """
        errors: dict[int, list[Tensor]] = {}
        for part, prediction in zip(self._parts(batch), output.reconstructions, strict=True):
            error = self._recomputed(part, self._error, prediction, self._volumes(part), part.mask)
            errors.setdefault(part.level, []).append(error)
        terms, weighted = {}, []
        weights = batch[_WEIGHTS] if _WEIGHTS in batch else level_weights(self.config, progress=1)
        for level, each in errors.items():
            terms[f"level_{level}_mse"] = torch.stack(each).mean()
            weighted.append(weights[level - 1] * terms[f"level_{level}_mse"])
        for coarse, (queries, candidates) in enumerate(zip(output.queries, output.candidates, strict=True), start=1):
            positives = batch[f"children_{coarse}"].flatten(0, -2)
            terms[f"alignment_{coarse}_{coarse + 1}"] = alignment = self._alignment(queries, candidates, positives)
            weighted.append(self.config.alignment_weights[coarse - 1] * alignment)
        return {"total": torch.stack(weighted).sum(), **terms}

    def _error(self, prediction: Tensor, volumes: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of hidden patches, each normalised to mean 0 and deviation 1."""
        patch_size = self.autoencoder.patch_size
        return masked_mse(prediction, normalise_patches(volumes, patch_size), mask_to_voxels(mask, patch_size))

    def _alignment(self, queries: Tensor, candidates: Tensor, positives: Tensor) -> Tensor:
        if self.config.alignment == "byol":
            return byol(queries, candidates, positives)
        return infonce(queries, candidates, positives, self.config.temperature)

    def _firsts(self, batch: Batch) -> list[First]:
        """By level; the first volume of a level is cut from the first one of the level before."""
        firsts = []
        for part in self._parts(batch)[: self.config.levels]:
            step = len(part.mask) // len(batch["crop"])
            hidden = mask_to_voxels(part.mask[::step], self.autoencoder.patch_size)
            firsts.append(First(self._volumes(part)[::step], hidden))
        return firsts

    def _inpainted(self, firsts: Sequence[First]) -> list[Tensor]:
        """What the yardstick makes of these volumes."""
        patch_size = self.autoencoder.patch_size
        return [with_patch_means_of(volume, harmonic_inpainting(volume, h), patch_size) for volume, h in firsts]

    def _first_images(self, output: Prediction, firsts: Sequence[First]) -> list[Tensor]:
        """Their reconstructions with the mean and the deviation of the patches put back."""
        images = []
        for (volume, _), prediction in zip(firsts, output.reconstructions, strict=False):
            first = prediction[:: len(prediction) // len(volume)]
            images.append(denormalise_patches(first, volume, self.autoencoder.patch_size))
        return images

    def baseline_error(self, batch: Batch) -> Tensor:
        """Error of the yardstick in the first volumes, mean over the levels; see :meth:`PretextTask.baseline_error`."""
        firsts = self._firsts(batch)
        return mean_error(self._inpainted(firsts), firsts)

    def errors(self, output: Prediction, batch: Batch) -> dict[str, Tensor]:
        """Error of the reconstructed images of the same volumes, mean over the levels."""
        firsts = self._firsts(batch)
        return {_BRANCH: mean_error(self._first_images(output, firsts), firsts)}

    def shown(self, output: Prediction, batch: Batch) -> CaseReport:
        """Of the first volume of every level what is hidden, its reconstruction, and where the next one is cut from.

        Skill is given by level, and as in validation, for all of them.
        """
        firsts = self._firsts(batch)
        images, inpainted = self._first_images(output, firsts), self._inpainted(firsts)
        error, baseline = (mean_error(each, firsts).item() for each in (images, inpainted))
        metrics: dict[str, dict[str, float | None]] = {_BRANCH: {SKILL: 1 - error / baseline if baseline else None}}
        columns: dict[str, npt.NDArray[np.float32]] = {}
        for level, (first, image, yardstick) in enumerate(zip(firsts, images, inpainted, strict=True), start=1):
            heading, (volume, hidden) = f"level {level}", first
            metrics[heading] = self._figures(first, image, yardstick)
            shown = {"": volume, ", hidden": volume.masked_fill(hidden, torch.nan)}
            shown[", reconstructed"] = compose(volume, image, hidden)
            columns |= {heading + what: each[0].cpu().numpy() for what, each in shown.items()}
            if level < self.config.levels:
                index = int(batch[f"children_{level}"].flatten()[0])
                grid = self.level_plans[level - 1].grid
                columns[f"level {level + 1} is cut from here"] = outlined(columns[heading], index, grid)
        return CaseReport(columns, metrics)

    def _figures(self, first: First, image: Tensor, inpainted: Tensor) -> dict[str, float | None]:
        """Figures of a reconstruction, and its skill: 1 - (its MSE) / (the MSE of the yardstick)."""
        volume, hidden, *images = (each[0].cpu().numpy() for each in (*first, image, inpainted))
        of_image, of_yardstick = (reconstruction_metrics(volume, each, hidden) for each in images)
        return with_skills({"": of_image, self.yardstick: of_yardstick}, self.yardstick)[""]


def mean_error(images: Sequence[Tensor], firsts: Sequence[First]) -> Tensor:
    """Mean squared error of hidden voxels, mean over the levels; a scalar."""
    return torch.stack([masked_mse(image, *first) for image, first in zip(images, firsts, strict=True)]).mean()


def plan_levels(config: MiMConfig, patch_grid: Size) -> list[Level]:
    """How every level is hidden and cut.

    Args:
        config: the plans' ``pretraining`` block.
        patch_grid: patches per axis of a volume.

    Raises:
        ValueError: if units do not consist of whole patches, or there are fewer parts than children of them.
    """
    units = size_of(config.units) if config.units else size_of(map(_smallest_divisor, patch_grid))
    if any(patches % parts for patches, parts in zip(patch_grid, units, strict=True)):
        raise ValueError(
            f"pretraining.units {list(units)} in the plans must divide the {' x '.join(map(str, patch_grid))} patches "
            f"of a crop; use {list(map(_smallest_divisor, patch_grid))}, or null"
        )
    levels = []
    children = {1: ("gamma", config.gamma), 2: ("beta", config.beta)}
    for number, grid in enumerate([units, patch_grid, patch_grid][: config.levels], start=1):
        num_hidden = num_hidden_patches(prod(grid), config.mask_ratios[number - 1])
        from_visible = config.children == "visible"
        name, count = children[number] if number < config.levels else ("", 0)
        available = prod(grid) - num_hidden if from_visible else num_hidden
        if count > available:
            raise ValueError(
                f"pretraining.{name} in the plans must be at most {available}, as many as there are {config.children} "
                f"{'units' if number == 1 else 'patches'} in a volume of level {number}, got {count}"
            )
        levels.append(Level(grid, num_hidden, count, from_visible))
    return levels


def _smallest_divisor(number: int) -> int:
    """The smallest divisor of at least 2; 1 of 1."""
    return next((d for d in range(2, number + 1) if number % d == 0), 1)


def level_weights(config: MiMConfig, progress: float) -> list[float]:
    """Weights of the reconstruction of each level at a share of the training; they change along a cosine (Table 14)."""
    risen = (1 - math.cos(math.pi * progress)) / 2
    factors = [start + (end - start) * risen for start, end in SCHEDULES[config.weight_schedule]]
    return [weight * factor for weight, factor in zip(config.reconstruction_weights, factors, strict=True)]
