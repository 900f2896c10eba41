"""The memory of training steps of both stages, traced for the sizes that a plan would have."""

import json
from dataclasses import dataclass
from functools import lru_cache

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from nnunet_topomae.methods.base import PretextTask, to_float32
from nnunet_topomae.nnunet.planning.memory import trace_step

_DICE = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}  # nnU-Net's


@dataclass(frozen=True)
class StepSizes:
    """What the memory of a training step depends on.

    Attributes:
        network_class: class of the network.
        arguments: keyword arguments of the network as JSON, with its ``crop_size``.
        num_channels: channels of the images.
        num_classes: classes of the segmentation; pre-training does not depend on it.
        batch_size: number of crops.
        cuda: see :func:`~nnunet_topomae.nnunet.planning.memory.trace_step`.
    """

    network_class: type[nn.Module]
    arguments: str
    num_channels: int
    num_classes: int
    batch_size: int
    cuda: bool = True

    def build(self, num_classes: int, *, deep_supervision: bool) -> nn.Module:
        """The network."""
        kwargs = json.loads(self.arguments)
        return self.network_class(self.num_channels, num_classes, deep_supervision=deep_supervision, **kwargs)

    @property
    def crop_size(self) -> list[int]:
        """Voxels per axis."""
        return json.loads(self.arguments)["crop_size"]


@lru_cache(maxsize=256)
def trace_pretraining(task_class: type[PretextTask], sizes: StepSizes) -> float:
    """Bytes that a pre-training step takes, by a method with its default settings."""
    config = task_class.for_memory(task_class.config_class())

    def build() -> PretextTask:
        network = sizes.build(sizes.num_channels, deep_supervision=False)
        return task_class.build(network, config, sizes.crop_size)

    def loss(task: PretextTask) -> Tensor:
        batch = task.views().example(sizes.batch_size, sizes.num_channels)
        return task.loss_terms(to_float32(task(batch)), batch)["total"]

    return trace_step(build, loss, cuda=sizes.cuda)


@lru_cache(maxsize=256)
def trace_finetuning(sizes: StepSizes) -> float:
    """Bytes that a fine-tuning step takes."""

    def loss(network: nn.Module) -> Tensor:
        outputs = network(torch.empty(sizes.batch_size, sizes.num_channels, *sizes.crop_size))
        dice_and_cross_entropy = DC_and_CE_loss(_DICE, {}, dice_class=MemoryEfficientSoftDiceLoss)
        return sum(dice_and_cross_entropy(o, torch.empty(sizes.batch_size, 1, *o.shape[2:])) for o in outputs[:-1])

    return trace_step(lambda: sizes.build(sizes.num_classes, deep_supervision=True), loss, cuda=sizes.cuda)
