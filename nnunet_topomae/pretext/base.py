"""What every pretext task has in common, and the losses that several share."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_topomae.config import PretrainingConfig
from nnunet_topomae.masking import hardest_patches_mask, mask_to_voxels, num_hidden_patches

_MOMENTUM_RISES = 0.25  # share of the training, AnatoMask
_EPSILON = 1e-6


class PretextOutput(NamedTuple):
    """What a task predicts, by branch.

    Attributes:
        reconstructions: (B, C, D, H, W) each.
        keypoints: (B, 9, 3) in (-1, 1) each; empty where a task predicts none.
    """

    reconstructions: dict[str, Tensor]
    keypoints: dict[str, Tensor]

    def to_float32(self) -> "PretextOutput":
        """All predictions in float32; losses are computed outside autocast."""
        return PretextOutput(*({branch: t.float() for branch, t in group.items()} for group in self))


class PretextTask(nn.Module, ABC):
    """A network to be fine-tuned later, and what pre-training adds to it.

    The parts of the network keep their names, so the state dict of a task is a superset of the network's.

    Args:
        network: as the plans name it, built with as many classes as the crop has channels.
        config: the plans' ``pretraining`` block.
        crop_size: voxels per axis.

    Attributes:
        config_class: of the block.
        teacher: of the masks, a moving average of the task; None if chance chooses them.
    """

    config_class: ClassVar[type[PretrainingConfig]] = PretrainingConfig
    teacher: "PretextTask | None"

    def __init__(self, network: nn.Module, config: PretrainingConfig, crop_size: Sequence[int]):
        super().__init__()
        self.config, self.crop_size = config, tuple(crop_size)
        for name, part in network.named_children():
            self.add_module(name, part)
        self.teacher = None

    @classmethod
    def build(cls, network: nn.Module, config: PretrainingConfig, crop_size: Sequence[int]) -> "PretextTask":
        """The task, with the teacher that its ``mask_source`` may ask for."""
        task = cls(network, config, crop_size)
        if config.mask_source == "anatomask":
            task.teacher = copy.deepcopy(task).requires_grad_(False)
        return task

    @property
    @abstractmethod
    def patch_size(self) -> tuple[int, int, int]:
        """Voxels per axis of a patch."""

    @property
    def mask_grid(self) -> tuple[int, int, int]:
        """Patches per axis of a crop."""
        return tuple(size // patch for size, patch in zip(self.crop_size, self.patch_size, strict=True))

    @abstractmethod
    def forward(self, crop: Tensor, mask: Tensor) -> PretextOutput:
        """Predict what is hidden.

        Args:
            crop: (B, C, D, H, W), values in [0, 1].
            mask: (B, d, h, w) bool of patches, True = hidden.
        """

    @abstractmethod
    def loss_terms(self, output: PretextOutput, crop: Tensor, mask: Tensor, keypoints: Tensor) -> dict[str, Tensor]:
        """Every term of the loss by name, and their weighted sum as ``total``.

        Args:
            output: of :meth:`forward`, float32.
            crop, mask: as given to :meth:`forward`.
            keypoints: (B, 9, 3) in [-1, 1].
        """

    def images(self, output: PretextOutput, crop: Tensor) -> dict[str, Tensor]:
        """The reconstructions as images like the crop, (B, C, D, H, W) each."""
        return output.reconstructions

    def patch_errors(self, output: PretextOutput, crop: Tensor) -> Tensor:
        """How badly every patch is reconstructed: mean squared error of the images, mean of branches; (B, d, h, w)."""
        errors = [
            patch_means((image - crop).square(), self.patch_size).mean(dim=1)
            for image in self.images(output, crop).values()
        ]
        return torch.stack(errors).mean(dim=0)

    @torch.no_grad()
    def choose_mask(self, crop: Tensor, mask: Tensor, progress: float) -> Tensor:
        """The mask to train on: the given one, or what the teacher finds hardest under it, and chance for the rest.

        AnatoMask, section 3.3.

        Args:
            crop, mask: as for :meth:`forward`.
            progress: share of the training that is done.
        """
        if self.teacher is None:
            return mask
        policy = self.config.anatomask
        share = policy.first_share + (policy.last_share - policy.first_share) * progress
        errors = self.teacher.eval().patch_errors(self.teacher(crop, mask).to_float32(), crop)
        num_hidden = num_hidden_patches(prod(self.mask_grid), self.config.mask_ratio)
        return hardest_patches_mask(errors * mask, num_hidden, int(num_hidden * share))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Let the teacher follow; called after every optimiser step.

        Args:
            progress: share of the training that is done.
        """
        if self.teacher is None:
            return
        policy = self.config.anatomask
        risen = min(progress / _MOMENTUM_RISES, 1)
        momentum = policy.first_momentum + (policy.last_momentum - policy.first_momentum) * risen
        own = dict(self.named_parameters())  # each once, also where a network holds a part under two names
        values = dict(self.teacher.named_parameters())
        torch._foreach_lerp_(list(values.values()), [own[name] for name in values], 1 - momentum)
        statistics = dict(self.named_buffers())
        for name, value in self.teacher.named_buffers():
            value.copy_(statistics[name])

    def untrained_parameters(self) -> list[str]:
        """Names of the parameters that pre-training leaves as they were."""
        return [name for name, parameter in self.named_parameters() if not parameter.requires_grad]


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over hidden voxels (He et al., section 3, "Reconstruction target").

    Args:
        prediction: (B, C, D, H, W).
        target: the same shape.
        mask: (B, 1, D, H, W) bool, True = hidden.

    Returns:
        A scalar; NaN if nothing is hidden, which masks of :mod:`nnunet_topomae.masking` rule out. Looking
        would make the GPU wait.
    """
    return ((prediction - target).square() * mask).sum() / (mask.sum() * prediction.shape[1])


def compose(crop: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """The crop with its hidden voxels replaced by the prediction; shapes as for :func:`masked_mse`."""
    return prediction.where(mask, crop)


def patch_means(values: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Means over patches: (B, C, D, H, W) to (B, C, d, h, w)."""
    return F.avg_pool3d(values, tuple(patch_size), tuple(patch_size))


def patch_statistics(crop: Tensor, patch_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every patch and channel, at its voxels: (B, C, D, H, W) each.

    The deviation is sqrt(variance + 1e-6) (He et al., section 4.1; AnatoMask).
    """

    def at_voxels(means: Tensor) -> Tensor:
        return mask_to_voxels(means.flatten(0, 1), patch_size).reshape(crop.shape)

    mean = at_voxels(patch_means(crop, patch_size))
    variance = at_voxels(patch_means((crop - mean).square(), patch_size))
    return mean, torch.sqrt(variance + _EPSILON)
