"""Plans a 3D nnU-Net dataset for pre-training and fine-tuning: crop, patches, strides, batch size, epochs."""

import json
import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.normalization.default_normalization_schemes import (
    CTNormalization,
    RescaleTo01Normalization,
    ZScoreNormalization,
)
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_topomae.files import read_json
from nnunet_topomae.methods.base import PretextTask
from nnunet_topomae.networks.geometry import Size
from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from nnunet_topomae.nnunet.data.raw import channel_names
from nnunet_topomae.nnunet.data.splits import read_splits
from nnunet_topomae.nnunet.planning.geometry import Strides, choose_patch_size, fit_strides, shrinking_crops
from nnunet_topomae.nnunet.planning.memory import GIB, largest_batch
from nnunet_topomae.nnunet.planning.plans import FINETUNING, PRETRAINING
from nnunet_topomae.nnunet.planning.traces import StepSizes, trace_finetuning, trace_pretraining
from nnunet_topomae.settings import FinetuningConfig, PretrainingConfig, StageConfig, to_block

_MIN_BATCH_SIZE = 2


class PretrainingPlanner(ExperimentPlanner, ABC):
    """Plans the pre-training and fine-tuning of a network with a ViT; takes the arguments of nnU-Net's planner.

    There is no 2D and no cascaded configuration. Subclasses name the network and the method. They may also fix what is
    otherwise decided here, such as the crop size.

    Attributes:
        network_class: the network that is planned for.
        task_class: the method that is planned for.
        pretrainer: name of the trainer that pre-trains.
        finetuner: name of the trainer that fine-tunes.
        default_plans_name: name of the plans.
        vit: width, depth and heads of the ViT.
        local_start: see :class:`ViTEncoder`; learns faster (docs/results.md).
        target_spacing: mm per voxel (z, y, x) of 3d_fullres; None to let nnU-Net decide.
        unit_intensities: whether images are scaled to [0, 1], as in the paper; otherwise they are normalised as nnU-Net
            does by default, to mean 0 and deviation 1, and pre-training learns faster (docs/results.md).
        intensity_range: HU that CT is clipped to before it is scaled to [0, 1]; None for the 0.5 and 99.5 percentiles
            of the foreground.
        crop_size: voxels (z, y, x); None for the largest that fits into the memory.
        strides: of the network for that crop, five of which the first is 1; None for those of nnU-Net's rules.
        memory_target: GB of GPU memory that training may take unless the user names another number.
        pretraining_passes: how often every training case is drawn in pre-training; SelfMedMAE.
        finetuning_passes: the same in fine-tuning.
        training_share: share of the cases that are trained on, where no ``splits_final.json`` says it; 80 % in
            nnU-Net's five folds.
        max_epochs: most epochs of either stage; 1000 is nnU-Net's own number.
        warmup_share: share of all epochs in which the learning rate rises.
    """

    network_class: ClassVar[type[nn.Module]]
    task_class: ClassVar[type[PretextTask]]
    pretrainer: ClassVar[str]
    finetuner: ClassVar[str]
    default_plans_name: ClassVar[str]
    vit: ClassVar[dict[str, int]]

    local_start: bool = True
    dataset_fingerprint: dict[str, Any]  # read by nnU-Net's planner
    target_spacing: tuple[float, float, float] | None = None
    unit_intensities: bool = False
    intensity_range: tuple[float, float] | None = None
    crop_size: Size | None = None
    strides: Strides | None = None
    memory_target: float = 8
    pretraining_passes: int = 10_000
    finetuning_passes: int = 5_000
    training_share: float = 0.8
    max_epochs: float = 1000
    warmup_share: float = 0.05

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float | None = None,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
    ):
        self.check_dataset(dataset_name_or_id)
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb or self.memory_target,
            preprocessor_name,
            plans_name or self.default_plans_name,
            overwrite_target_spacing or self.target_spacing,
            suppress_transpose,
        )
        self.num_channels = len(channel_names(self.dataset_json))
        if self.intensity_range and not self.unit_intensities:
            raise ValueError(f"{type(self).__name__}: intensity_range needs unit_intensities")
        self._check_ct_has_foreground()
        if self.unit_intensities:
            self._scale_ct_to_unit_interval()

    @classmethod
    def check_dataset(cls, dataset_name_or_id: str | int) -> None:
        """Refuse a raw dataset that this planner is not made for, before anything is written; here none is refused.

        Raises:
            ValueError: one sentence that says what the planner is made for.
        """

    @abstractmethod
    def network_arguments(self, crop_size: Size, strides: Strides, patch_size: Size) -> dict[str, Any]:
        """Keyword arguments of the network, JSON types.

        Args:
            crop_size: voxels per axis; must be among the keyword arguments.
            strides: five strides chosen by nnU-Net's rules for pooling, the first of which is 1.
            patch_size: voxels per axis of the ViT's patches.
        """

    def vit_arguments(self, patch_size: Size) -> dict[str, Any]:
        """Keyword arguments of :class:`ViTEncoder`, JSON types, for patches of a size in voxels per axis."""
        return {"patch_size": list(patch_size), **self.vit, "local_start": self.local_start}

    def _ct_properties(self) -> dict[int, dict[str, float]]:
        """Intensities of the foreground by channel, for channels that are CT."""
        schemes, _ = super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        properties = self.dataset_fingerprint["foreground_intensity_properties_per_channel"]
        return {
            channel: properties[str(channel)]
            for channel, scheme in enumerate(schemes)
            if scheme == CTNormalization.__name__
        }

    def _check_ct_has_foreground(self) -> None:
        """See that there are intensities to normalise CT by.

        Raises:
            ValueError: if a CT channel has no foreground.
        """
        for channel, properties in self._ct_properties().items():
            if not self.intensity_range and not np.isfinite(properties["mean"]):
                raise ValueError(
                    f"{self.dataset_name}: channel {channel} is CT, but no case has a labelled foreground to take its "
                    f"intensities from, by which nnU-Net normalises CT"
                )

    def _scale_ct_to_unit_interval(self) -> None:
        """Make CTNormalization clip to the intensity range [a, b] and scale to [0, 1].

        It computes (clip(x, a, b) - mean) / std, so mean = a and std = b - a do that.
        """
        self.dataset_fingerprint = deepcopy(self.dataset_fingerprint)
        for properties in self._ct_properties().values():
            low, high = self.intensity_range or (properties["percentile_00_5"], properties["percentile_99_5"])
            properties.update(percentile_00_5=low, percentile_99_5=high, mean=low, std=high - low)

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self) -> tuple[list[str], list[bool]]:
        """nnU-Net's choice per channel; with ``unit_intensities`` min-max scaling in place of z-scores."""
        schemes, use_mask = super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        if not self.unit_intensities:
            return schemes, use_mask
        to_unit = {ZScoreNormalization.__name__: RescaleTo01Normalization.__name__}
        return [to_unit.get(scheme, scheme) for scheme in schemes], [False] * len(schemes)

    def plan_experiment(self) -> dict[str, Any]:
        """Plan and save.

        Raises:
            ValueError: for a 2D dataset.
        """
        shapes = np.vstack(self.dataset_fingerprint["shapes_after_crop"])
        if np.median(shapes, axis=0).min() <= 1:
            raise ValueError(
                f"{self.dataset_name} is a 2D dataset; {type(self).__name__} plans 3D images only, use nnU-Net's own "
                f"planners"
            )
        return super().plan_experiment()

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Leave out the configurations that cannot be trained here, then save as nnU-Net does.

        Raises:
            ValueError: if there are unlabelled cases that older plans of the same name have preprocessed differently.
        """
        plans["configurations"] = {
            name: configuration
            for name, configuration in plans["configurations"].items()
            if "architecture" in configuration  # neither the 2D stand-in nor the cascade, which inherits
        }
        for configuration in plans["configurations"].values():
            configuration.pop("next_stage", None)
        self._check_unlabelled_cases_stay_valid(plans)
        super().save_plans(plans)

    def _check_unlabelled_cases_stay_valid(self, plans: dict[str, Any]) -> None:
        """nnU-Net preprocesses labelled cases again, but knows nothing of the unlabelled ones."""
        folder = Path(nnUNet_preprocessed) / self.dataset_name
        file = folder / f"{self.plans_identifier}.json"
        if not file.exists():
            return
        recursive_fix_for_json_export(plans)
        new, old = (PlannedDataset(folder, PlansManager(p), self.dataset_json) for p in (plans, read_json(file)))
        for name in plans["configurations"]:
            if name not in old.plans.available_configurations or not old.unlabelled_cases(name):
                continue
            if difference := new.preprocessing_difference(old, name):
                raise ValueError(
                    f"{old.unlabelled_folder(name)} holds cases that {self.plans_identifier} has preprocessed "
                    f"in another way ({difference}); delete that folder and add them again afterwards, or give the "
                    f"new plans another name with -overwrite_plans_name"
                )

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
            return {"left out": f"{type(self).__name__} plans 3D images only, so these plans have no 2d configuration"}
        crop_size, strides = self._largest_crop(spacing, median_shape)
        patch_size = choose_patch_size(crop_size, spacing)
        batch_size = self._batch_size(crop_size, strides, patch_size, approximate_n_voxels_dataset)
        return {
            **self._preprocessing(spacing, median_shape, data_identifier),
            "batch_size": batch_size,
            "patch_size": list(crop_size),
            "architecture": self._architecture(crop_size, strides, patch_size),
            PRETRAINING: to_block(self.pretraining_config(crop_size, spacing.tolist(), batch_size)),
            FINETUNING: self.finetuning_block(batch_size),
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

    def _largest_crop(self, spacing: np.ndarray, median_shape: np.ndarray) -> tuple[Size, Strides]:
        """The first of :func:`shrinking_crops` of which two fit into the memory target.

        Raises:
            ValueError: if none does.
        """
        if self.crop_size is None:
            candidates = list(shrinking_crops(spacing, median_shape))
        elif self.strides is None:
            candidates = [fit_strides(spacing, self.crop_size)[:2]]
        else:
            candidates = [(self.crop_size, self.strides)]

        def sizes(candidate: tuple[Size, Strides]) -> StepSizes:
            return self._step_sizes(*candidate, choose_patch_size(candidate[0], spacing), _MIN_BATCH_SIZE)

        def finetuning_fits(candidate: tuple[Size, Strides]) -> bool:
            return self._finetuning_fits(sizes(candidate))

        first = 0 if finetuning_fits(candidates[0]) else bisect_left(candidates, True, lo=1, key=finetuning_fits)
        while first < len(candidates) and not self._pretraining_fits(sizes(candidates[first])):  # seldom needs more
            first += 1
        if first == len(candidates):
            crop = "no crop fits" if self.crop_size is None else f"two crops of {self.crop_size} do not fit"
            raise ValueError(
                f"{self.dataset_name}: {crop} into {self.UNet_vram_target_GB} GB; raise -gpu_memory_target"
            )
        return candidates[first]

    def _batch_size(self, crop_size: Size, strides: Strides, patch_size: Size, num_voxels: float) -> int:
        """As many crops as fit in both stages, covering at most 5 % of the dataset as in nnU-Net, at least 2."""

        def largest(trace: Callable[[StepSizes], float], limit: float) -> int:
            def needed(batch_size: int) -> float:
                return trace(self._step_sizes(crop_size, strides, patch_size, batch_size))

            return largest_batch(needed, self.UNet_vram_target_GB * GIB, _MIN_BATCH_SIZE, limit)

        limit = num_voxels * self.max_dataset_covered / math.prod(crop_size) + 0.5  # rounded
        return largest(trace_finetuning, largest(partial(trace_pretraining, self.task_class), limit))

    def _step_sizes(self, crop_size: Size, strides: Strides, patch_size: Size, batch_size: int) -> StepSizes:
        arguments = json.dumps(self.network_arguments(crop_size, strides, patch_size))
        return StepSizes(self.network_class, arguments, self.num_channels, len(self.dataset_json["labels"]), batch_size)

    def _pretraining_fits(self, sizes: StepSizes) -> bool:
        try:
            return trace_pretraining(self.task_class, sizes) <= self.UNet_vram_target_GB * GIB
        except ValueError:  # a crop may have too few patches for the method
            if self.crop_size is not None:
                raise
            return False

    def _finetuning_fits(self, sizes: StepSizes) -> bool:
        return trace_finetuning(sizes) <= self.UNet_vram_target_GB * GIB

    def pretraining_config(self, crop_size: Size, spacing: Sequence[float], batch_size: int) -> PretrainingConfig:
        """Default settings of the method, with the planned number of epochs and what the method itself plans."""
        config = self.schedule(self.task_class.config_class(), self._largest_fold("images"), batch_size)
        return self.task_class.planned(config, crop_size, spacing)

    def finetuning_block(self, batch_size: int) -> dict[str, Any]:
        """The recipe's name and the planned number of epochs; the recipe decides the rest, so it can be exchanged."""
        config = FinetuningConfig()
        num_epochs = epochs_for(self.finetuning_passes, self._largest_fold("train"), batch_size, config)
        return {"recipe": config.recipe, "num_epochs": int(min(num_epochs, self.max_epochs))}

    @classmethod
    def schedule(cls, config: Any, num_images: int, batch_size: int) -> Any:
        """Settings of pre-training with the number of epochs for a number of images, and their warm-up.

        Every image is drawn ``pretraining_passes`` times on average, unless ``max_epochs`` is reached before.

        Args:
            config: settings of pre-training.
            num_images: that are drawn from.
            batch_size: crops in a training step.
        """
        num_epochs = int(min(epochs_for(cls.pretraining_passes, num_images, batch_size, config), cls.max_epochs))
        return replace(config, num_epochs=num_epochs, warmup_epochs=round(cls.warmup_share * num_epochs, 1))

    def _largest_fold(self, part: str) -> int:
        """Cases in a part of a split (``train``, or ``images``), without a split the usual share of all labelled ones.

        Raises:
            ValueError: see :func:`read_splits`.
        """
        splits = read_splits(Path(nnUNet_preprocessed) / self.dataset_name)
        without_split = max(round(self.training_share * self.dataset_json["numTraining"]), 1)
        return max((len(getattr(split, part)) for split in splits), default=without_split)


def epochs_for(passes: int, num_cases: int, batch_size: int, config: StageConfig) -> int:
    """nnU-Net epochs in which every case is drawn ``passes`` times on average, at least 1."""
    iterations = passes * num_cases / batch_size
    return max(round(iterations / config.num_iterations_per_epoch), 1)
