"""Plans the fused network for any 3D nnU-Net dataset: crop, patches, strides, batch size, epochs."""

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.preprocessing.normalization.default_normalization_schemes import (
    CTNormalization,
    RescaleTo01Normalization,
    ZScoreNormalization,
)
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from nnunet_topomae.config import (
    FinetuningConfig,
    PretrainingConfig,
    StageConfig,
    TopologyConfig,
    TopoMAEConfig,
    to_block,
)
from nnunet_topomae.keypoints import NUM_KEYPOINTS
from nnunet_topomae.networks.fused import FusedViTUNETRPP
from nnunet_topomae.nnunet.memory import GIB, trace_step
from nnunet_topomae.nnunet.raw import channel_names
from nnunet_topomae.pretext import PretextTask, TopoMAE
from nnunet_topomae.topology.loss import choose_grid

PLANS_NAME = "nnUNetTopoMAEPlans"

_DICE = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}  # nnU-Net's
_MIN_EDGE = 3  # of the coarsest feature map; a 96^3 crop and a total stride of 32 give it, as published
_MAX_POOLINGS = 5  # a stem of 4 and three downsamplings by 2
_PATCH_SIZES = (16, 8, 4, 2)
_TARGET_TOKENS = 200
_MIN_BATCH_SIZE = 2
_PRETRAINING_PASSES, _FINETUNING_PASSES = 10_000, 5_000  # over all cases; SelfMedMAE

Size = tuple[int, int, int]
Strides = tuple[Size, ...]
Trace = Callable[..., float]


class TopoMAEPlanner(ExperimentPlanner):
    """Writes ``nnUNetTopoMAEPlans``; arguments as nnU-Net's planner. There is no 2D and no cascaded configuration.

    Subclasses fix what is decided here otherwise.

    Attributes:
        default_plans_name: of the plans.
        target_spacing: mm per voxel (z, y, x) of 3d_fullres; None as nnU-Net decides.
        intensity_range: HU that CT is clipped to; None for the 0.5 and 99.5 percentiles of the foreground.
        crop_size: voxels (z, y, x); None for the largest that fits into the memory.
        max_epochs: of either stage; 1000 is nnU-Net's own number.
        warmup_share: of all epochs.
        network_class, task_class: what is planned for.
        pretrainer, finetuner: names of the trainers for it.
        vit: width, depth and heads of the ViT.
        features_per_stage: channels of UNETR++.
    """

    network_class: type[nn.Module] = FusedViTUNETRPP
    task_class: type[PretextTask] = TopoMAE
    pretrainer: str = "TopoMAEPretrainer"
    finetuner: str = "FusedFinetuneTrainer"

    default_plans_name: str = PLANS_NAME
    target_spacing: tuple[float, float, float] | None = None
    intensity_range: tuple[float, float] | None = None
    crop_size: Size | None = None
    max_epochs: float = 1000
    warmup_share: float = 0.05
    vit: dict[str, int] = {"width": 512, "depth": 12, "num_heads": 8}  # noqa: RUF012 - a template, copied on use
    features_per_stage: tuple[int, ...] = (32, 64, 128, 256)

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
    ):
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name or self.default_plans_name,
            overwrite_target_spacing or self.target_spacing,
            suppress_transpose,
        )
        self.num_channels = len(channel_names(self.dataset_json))
        self._scale_ct_to_unit_interval()

    def _scale_ct_to_unit_interval(self) -> None:
        """Make CTNormalization clip to the intensity range [a, b] and scale to [0, 1].

        It computes (clip(x, a, b) - mean) / std, so mean = a and std = b - a do that.

        Raises:
            ValueError: if a CT channel has no foreground to take percentiles from.
        """
        schemes, _ = self.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        self.dataset_fingerprint = deepcopy(self.dataset_fingerprint)
        for channel, scheme in enumerate(schemes):
            properties = self.dataset_fingerprint["foreground_intensity_properties_per_channel"][str(channel)]
            if scheme == CTNormalization.__name__:
                low, high = self.intensity_range or (properties["percentile_00_5"], properties["percentile_99_5"])
                if not np.isfinite([low, high]).all():
                    raise ValueError(
                        f"{self.dataset_name}: channel {channel} is CT, but no case has a labelled foreground to take "
                        f"its intensity range from"
                    )
                properties.update(percentile_00_5=low, percentile_99_5=high, mean=low, std=high - low)

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self) -> tuple[list[str], list[bool]]:
        """nnU-Net's choice per channel, with min-max scaling in place of z-scores: reconstruction wants [0, 1]."""
        schemes, _ = super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        to_unit = {ZScoreNormalization.__name__: RescaleTo01Normalization.__name__}
        return [to_unit.get(scheme, scheme) for scheme in schemes], [False] * len(schemes)

    def plan_experiment(self) -> dict[str, Any]:
        """Plan and save.

        Raises:
            ValueError: for a 2D dataset.
        """
        shapes = np.vstack(self.dataset_fingerprint["shapes_after_crop"])
        if np.median(shapes, axis=0).min() <= 1:
            raise ValueError(f"{self.dataset_name} is a 2D dataset; TopoMAE plans and trains 3D images only")
        return super().plan_experiment()

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Leave out what cannot be trained here, then save as nnU-Net."""
        plans["configurations"] = {
            name: configuration
            for name, configuration in plans["configurations"].items()
            if "architecture" in configuration  # neither the 2D stand-in nor the cascade, which inherits
        }
        for configuration in plans["configurations"].values():
            configuration.pop("next_stage", None)
        super().save_plans(plans)

    def get_plans_for_configuration(
        self,
        spacing: np.ndarray,
        median_shape: np.ndarray,
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict,
    ) -> dict[str, Any]:
        """The plan of a 3D configuration; for 2D a note, which nnU-Net prints and :meth:`save_plans` drops."""
        if len(spacing) == 2:
            return {"left out": "TopoMAE is made for 3D images, so these plans have no 2d configuration"}
        crop_size, strides = self._largest_crop(spacing, median_shape)
        patch_size = choose_patch_size(crop_size, spacing)
        batch_size = self._batch_size(crop_size, strides, patch_size, approximate_n_voxels_dataset)
        return {
            **self._preprocessing(spacing, median_shape, data_identifier),
            "batch_size": batch_size,
            "patch_size": list(crop_size),
            "architecture": self._architecture(crop_size, strides, patch_size),
            "pretraining": to_block(self.pretraining_config(crop_size, spacing, batch_size)),
            "finetuning": to_block(self.finetuning_config(batch_size)),
        }

    def _preprocessing(self, spacing: np.ndarray, median_shape: np.ndarray, data_identifier: str) -> dict[str, Any]:
        """The keys of a configuration that say how cases are preprocessed and exported, as nnU-Net decides them."""
        resample_data, data_kwargs, resample_seg, seg_kwargs = self.determine_resampling()
        resample_probabilities, probabilities_kwargs = self.determine_segmentation_softmax_export_fn()
        schemes, use_mask = self.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        return {
            "data_identifier": data_identifier,
            "preprocessor_name": self.preprocessor_name,
            "median_image_size_in_voxels": median_shape,
            "spacing": spacing,
            "normalization_schemes": schemes,
            "use_mask_for_norm": use_mask,
            "resampling_fn_data": resample_data.__name__,
            "resampling_fn_seg": resample_seg.__name__,
            "resampling_fn_data_kwargs": data_kwargs,
            "resampling_fn_seg_kwargs": seg_kwargs,
            "resampling_fn_probabilities": resample_probabilities.__name__,
            "resampling_fn_probabilities_kwargs": probabilities_kwargs,
        }

    def _architecture(self, crop_size: Size, strides: Strides, patch_size: Size) -> dict[str, Any]:
        return {
            "network_class_name": f"{self.network_class.__module__}.{self.network_class.__name__}",
            "arch_kwargs": self.network_arguments(crop_size, strides, patch_size),
            "_kw_requires_import": [],
        }

    def network_arguments(self, crop_size: Size, strides: Strides, patch_size: Size) -> dict[str, Any]:
        """Keyword arguments of the network for a crop, strides by nnU-Net's rules, and ViT patches."""
        return {
            "crop_size": list(crop_size),
            "strides": [list(stride) for stride in strides],
            "features_per_stage": list(self.features_per_stage),
            "vit": {"patch_size": list(patch_size), **self.vit},
        }

    def _largest_crop(self, spacing: np.ndarray, median_shape: np.ndarray) -> tuple[Size, Strides]:
        """The first of :func:`shrinking_crops` of which two fit into the memory target.

        Raises:
            ValueError: if none does.
        """
        if self.crop_size is not None:
            candidates = [fit_strides(spacing, self.crop_size)[:2]]
        else:
            candidates = list(shrinking_crops(spacing, median_shape))

        def fits(candidate: tuple[Size, Strides], *traces: Trace) -> bool:
            return self._fits(*candidate, choose_patch_size(candidate[0], spacing), _MIN_BATCH_SIZE, traces)

        def finetuning_fits(candidate: tuple[Size, Strides]) -> bool:
            return fits(candidate, trace_finetuning)

        first = 0 if finetuning_fits(candidates[0]) else bisect_left(candidates, True, lo=1, key=finetuning_fits)
        while first < len(candidates) and not fits(candidates[first], trace_pretraining):  # seldom the larger one
            first += 1
        if first == len(candidates):
            crop = "no crop fits" if self.crop_size is None else f"two crops of {self.crop_size} do not fit"
            raise ValueError(
                f"{self.dataset_name}: {crop} into {self.UNet_vram_target_GB} GB; raise -gpu_memory_target"
            )
        return candidates[first]

    def _batch_size(self, crop_size: Size, strides: Strides, patch_size: Size, num_voxels: float) -> int:
        """As many crops as fit, covering at most 5 % of the dataset as in nnU-Net, at least 2."""

        def too_large(batch_size: int) -> bool:
            return not self._fits(crop_size, strides, patch_size, batch_size)

        limit = max(round(num_voxels * self.max_dataset_covered / math.prod(crop_size)), _MIN_BATCH_SIZE)
        return bisect_left(range(limit + 1), True, lo=_MIN_BATCH_SIZE + 1, key=too_large) - 1

    def _fits(
        self,
        crop_size: Size,
        strides: Strides,
        patch_size: Size,
        batch_size: int,
        traces: Sequence[Trace] | None = None,
    ) -> bool:
        """Whether steps stay within the memory target, by default of both stages."""
        arguments = json.dumps(self.network_arguments(crop_size, strides, patch_size))
        sizes = self.num_channels, len(self.dataset_json["labels"]), batch_size
        return all(
            trace(self.network_class, self.task_class, arguments, *sizes) <= self.UNet_vram_target_GB * GIB
            for trace in traces or (trace_pretraining, trace_finetuning)
        )

    def pretraining_config(self, crop_size: Size, spacing: np.ndarray, batch_size: int) -> PretrainingConfig:
        """Defaults of the method; epochs from its passes over the data, a topology grid that fits the crop."""
        schedule = self._schedule(self.task_class.config_class(), _PRETRAINING_PASSES, batch_size)
        if not isinstance(schedule, TopoMAEConfig):
            return schedule
        return replace(schedule, topology=TopologyConfig(grid=choose_grid(crop_size, spacing)))

    def finetuning_config(self, batch_size: int) -> FinetuningConfig:
        """Defaults of the paper; epochs from its passes over the data."""
        return self._schedule(FinetuningConfig(), _FINETUNING_PASSES, batch_size)

    def _schedule(self, config: Any, passes: int, batch_size: int) -> Any:
        num_epochs = min(epochs_for(passes, self.dataset_json["numTraining"], batch_size, config), self.max_epochs)
        return replace(config, num_epochs=num_epochs, warmup_epochs=round(self.warmup_share * num_epochs, 1))


def epochs_for(passes: int, num_cases: int, batch_size: int, config: StageConfig) -> int:
    """nnU-Net epochs in which every case is drawn ``passes`` times on average, at least 1."""
    iterations = passes * num_cases / batch_size
    return max(round(iterations / config.num_iterations_per_epoch), 1)


def shrinking_crops(spacing: Sequence[float], median_shape: Sequence[float]) -> Iterator[tuple[Size, Strides]]:
    """Crops with their strides as nnU-Net tries them, from the largest on.

    The first has the aspect of the voxels at the volume of 256^3 and is no larger than the images; each next one is
    shorter along the axis that is longest relative to the images.
    """
    aspect = 1 / np.asarray(spacing)
    size = np.minimum(np.round(aspect * (256**3 / aspect.prod()) ** (1 / 3)), median_shape)
    while size.min() >= 1:
        crop_size, strides, divisor = fit_strides(spacing, size)
        if math.prod(crop_size) // math.prod(choose_patch_size(crop_size, spacing)) < 2:
            return
        yield crop_size, strides
        axis = int(np.argmax(np.divide(crop_size, median_shape)))
        size = np.array(crop_size)
        size[axis] -= divisor[axis]


def fit_strides(spacing: Sequence[float], crop_size: Sequence[float]) -> tuple[Size, Strides, Size]:
    """UNETR++'s strides for a crop, by nnU-Net's rules for pooling: thin axes are left alone until voxels are even.

    Of n halvings the first n - 3, but at least one, make the stem.

    Returns:
        The crop padded to be divisible, five strides that start with 1, and what each axis is divisible by.
    """
    _, pooling, _, padded, divisor = get_pool_and_conv_props(
        spacing, [int(size) for size in crop_size], _MIN_EDGE, _MAX_POOLINGS
    )
    halvings = [tuple(int(k) for k in kernel) for kernel in pooling[1:]][:_MAX_POOLINGS]
    in_stem = max(len(halvings) - 3, 1)
    stem = tuple(math.prod(kernel[axis] for kernel in halvings[:in_stem]) for axis in range(3))
    rest = halvings[in_stem:] + [(1, 1, 1)] * (3 - len(halvings[in_stem:]))
    return tuple(int(p) for p in padded), ((1, 1, 1), stem, *rest), tuple(int(d) for d in divisor)


def choose_patch_size(crop_size: Sequence[int], spacing: Sequence[float]) -> Size:
    """ViT patches that divide the crop, give about 200 tokens, and are near isotropic in mm.

    Both deviations are weighed alike, in squared octaves; of equals, the larger patches win. Axes of an odd number of
    voxels get patches of 1.
    """
    options = [[p for p in _PATCH_SIZES if size % p == 0 and size > p] or [1] for size in crop_size]

    def badness(patch: Size) -> float:
        tokens = math.prod(size // p for size, p in zip(crop_size, patch, strict=True))
        edges = np.log2(np.multiply(patch, spacing))
        return math.log2(tokens / _TARGET_TOKENS) ** 2 + float(np.ptp(edges)) ** 2

    return min(product(*options), key=badness)


@lru_cache(maxsize=256)
def trace_pretraining(
    network_class: type[nn.Module],
    task_class: type[PretextTask],
    arguments: str,
    num_channels: int,
    num_classes: int,
    batch_size: int,
    cuda: bool = True,
) -> float:
    """Bytes of a pre-training step; see :func:`trace_finetuning`. ``num_classes`` has no bearing on it."""
    kwargs = json.loads(arguments)
    config = task_class.config_class()
    if isinstance(config, TopoMAEConfig):
        config = replace(config, topology=TopologyConfig(enabled=False))  # which is computed on the CPU

    def build() -> PretextTask:
        network = network_class(num_channels, num_channels, deep_supervision=False, **kwargs)
        return task_class.build(network, config, kwargs["crop_size"])

    def loss(task: PretextTask) -> Tensor:
        crop = torch.empty(batch_size, num_channels, *kwargs["crop_size"])
        mask = torch.empty((batch_size, *task.mask_grid), dtype=torch.bool)
        output = task(crop, mask).to_float32()
        return task.loss_terms(output, crop, mask, torch.empty(batch_size, NUM_KEYPOINTS, 3))["total"]

    return trace_step(build, loss, cuda)


@lru_cache(maxsize=256)
def trace_finetuning(
    network_class: type[nn.Module],
    task_class: type[PretextTask],
    arguments: str,
    num_channels: int,
    num_classes: int,
    batch_size: int,
    cuda: bool = True,
) -> float:
    """Bytes of a fine-tuning step.

    Args:
        network_class, task_class: of the plans; the task has no bearing on it.
        arguments: keyword arguments of the network as JSON.
        num_channels: of the crop.
        num_classes: of the segmentation.
        batch_size: crops.
        cuda: see :func:`trace_step`.
    """
    kwargs = json.loads(arguments)

    def loss(network: nn.Module) -> Tensor:
        outputs = network(torch.empty(batch_size, num_channels, *kwargs["crop_size"]))
        dice_and_cross_entropy = DC_and_CE_loss(_DICE, {}, dice_class=MemoryEfficientSoftDiceLoss)
        return sum(dice_and_cross_entropy(o, torch.empty(batch_size, 1, *o.shape[2:])) for o in outputs[:-1])

    return trace_step(lambda: network_class(num_channels, num_classes, **kwargs), loss, cuda)
