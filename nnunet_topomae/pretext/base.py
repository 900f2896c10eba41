"""What every pretext task has in common, and the losses that several share."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from nnunet_topomae.config import PretrainingConfig


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
    """

    def __init__(self, network: nn.Module, config: PretrainingConfig):
        super().__init__()
        self.config = config
        for name, part in network.named_children():
            self.add_module(name, part)

    @property
    @abstractmethod
    def mask_grid(self) -> tuple[int, int, int]:
        """Patches per axis of a crop."""

    @property
    @abstractmethod
    def patch_size(self) -> tuple[int, int, int]:
        """Voxels per axis of a patch."""

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

    def after_step(self) -> None:
        """Called after every optimiser step; for teachers that follow their students."""

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
