"""The five set-ups of Gu et al., section III: ``nnUNetv2_topomae plan_and_preprocess -pl TopoMAEPlannerSynapse``.

TopoMAEPlanner decides what is not fixed here. docs/datasets.md says where every value comes from.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_topomae.networks.geometry import Size
from nnunet_topomae.nnunet.data.raw import channel_names, read_dataset
from nnunet_topomae.nnunet.planning.geometry import Strides
from nnunet_topomae.planners.topomae_planner import TopoMAEPlanner


class _PaperPlanner(TopoMAEPlanner):
    """What the set-ups share: intensities in [0, 1], the loss to the letter, fusion by plain addition, a V100.

    Attributes:
        is_ct: whether the dataset is of CT; otherwise of another modality. It has one channel.
        num_labels: labels of the dataset beside the background.
        unetrpp: keyword arguments of :class:`UNETRPP` that make the network published for the dataset.
    """

    unit_intensities = True
    local_start = False
    memory_target = 32
    pretraining_dropout = None
    max_epochs = math.inf
    warmup_share = 0.01
    is_ct: ClassVar[bool] = True
    num_labels: ClassVar[int]
    unetrpp: ClassVar[dict[str, Any]]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_dataset_covered = math.inf  # the batch is the largest that fits
        self.lowres_creation_threshold = 0  # one resolution

    @classmethod
    def check_dataset(cls, dataset_name_or_id: str | int) -> None:
        """Refuse datasets of other channels or another number of labels; see :class:`PretrainingPlanner`."""
        name = maybe_convert_to_dataset_name(dataset_name_or_id)
        description, _ = read_dataset(Path(nnUNet_raw) / name)
        channels, num_labels = channel_names(description), len(description["labels"])
        is_ct = [channel.casefold() == "ct" for channel in channels]
        if is_ct != [cls.is_ct] or num_labels != 1 + cls.num_labels:
            raise ValueError(
                f"{name}: {cls.__name__} is made for one {'CT' if cls.is_ct else 'MRI'} channel and "
                f"{1 + cls.num_labels} labels (with the background), but this dataset has {', '.join(channels)} and "
                f"{num_labels} labels; use TopoMAEPlanner"
            )

    def network_arguments(self, crop_size: Size, strides: Strides, patch_size: Size) -> dict[str, Any]:
        """With plain addition, and the network published for the dataset; see :class:`PretrainingPlanner`."""
        return {**super().network_arguments(crop_size, strides, patch_size), "fusion_gain": 1.0, **self.unetrpp}

    def pretraining_config(self, crop_size: Size, spacing: Sequence[float], batch_size: int) -> Any:
        """With the paper's sum and the topology of every voxel; see :meth:`PretrainingPlanner.pretraining_config`."""
        config = super().pretraining_config(crop_size, spacing, batch_size)
        return replace(config, topology=replace(config.topology, weight=1.0, grid=None))

    def finetuning_block(self, batch_size: int) -> dict[str, Any]:
        """With the optimiser's settings of section III-B; see :meth:`PretrainingPlanner.finetuning_block`."""
        block = super().finetuning_block(batch_size)
        warmup = round(self.warmup_share * block["num_epochs"], 1)
        return {**block, "base_lr": 0.1, "weight_decay": 0.005, "warmup_epochs": warmup}


class _AbdominalCTPlanner(_PaperPlanner):
    target_spacing = (2.0, 1.5, 1.5)
    crop_size = (96, 96, 96)
    unetrpp: ClassVar = {"attention_dropout": 0.15}  # published for Synapse


class TopoMAEPlannerSynapse(_AbdominalCTPlanner):
    """Synapse multi-organ CT, 8 organs, 18 cases to train on and 12 to test on."""

    default_plans_name = "nnUNetTopoMAESynapsePlans"
    intensity_range = (-175, 250)
    num_labels = 8
    training_share = 18 / 30


class TopoMAEPlannerBTCV(_AbdominalCTPlanner):
    """BTCV multi-organ CT, 13 organs; the paper gives no split."""

    default_plans_name = "nnUNetTopoMAEBTCVPlans"
    intensity_range = (-175, 250)
    num_labels = 13


class TopoMAEPlannerSpleen(_AbdominalCTPlanner):
    """Spleen CT of the Medical Segmentation Decathlon, split 80:15:5."""

    default_plans_name = "nnUNetTopoMAESpleenPlans"
    intensity_range = (-57, 164)
    num_labels = 1
    training_share = 0.8


class _TwoResidualBlocksPlanner(_PaperPlanner):
    strides = ((1, 1, 1), (1, 4, 4), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    unetrpp: ClassVar = {"num_residual_blocks": 2, "separate_projections": True}  # published for ACDC and lung


class TopoMAEPlannerACDC(_TwoResidualBlocksPlanner):
    """ACDC cardiac MRI, 70 cases to train on, 10 to validate and 20 to test on."""

    default_plans_name = "nnUNetTopoMAEACDCPlans"
    target_spacing = (6.35, 1.52, 1.52)
    crop_size = (16, 160, 160)
    is_ct = False
    num_labels = 3
    training_share = 0.7
    pretraining_passes = 2_000
    finetuning_passes = 1_000


class TopoMAEPlannerLung(_TwoResidualBlocksPlanner):
    """Lung CT of the Medical Segmentation Decathlon, split 80:20."""

    default_plans_name = "nnUNetTopoMAELungPlans"
    target_spacing = (1.0, 1.0, 1.0)
    intensity_range = (-1000, 3071)
    crop_size = (32, 192, 192)
    num_labels = 1
    training_share = 0.8
