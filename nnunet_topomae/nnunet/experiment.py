"""Fingerprint, planning and preprocessing of datasets: nnU-Net's steps, with our planners."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import nnunet_topomae.planners
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

CONFIGURATIONS = ("3d_fullres", "3d_lowres")
_DEFAULT_PROCESSES = {"3d_fullres": 4, "3d_lowres": 8}  # nnU-Net's


class FiniteFingerprintExtractor(DatasetFingerprintExtractor):
    """nnU-Net's extractor, which names the case that holds NaN or inf."""

    @staticmethod
    def analyze_case(
        image_files: list[str],
        segmentation_file: str,
        reader_writer_class: type[BaseReaderWriter],
        num_samples: int = 10000,
    ) -> tuple:
        """As nnU-Net.

        Raises:
            ValueError: if a value of the images is not finite.
        """
        images, _ = reader_writer_class().read_images(image_files)
        for channel, file in zip(images, image_files, strict=True):
            if not np.isfinite(channel).all():
                raise ValueError(f"{file} holds NaN or inf; replace these values, then run this command again")
        return DatasetFingerprintExtractor.analyze_case(
            image_files, segmentation_file, reader_writer_class, num_samples
        )


def find_planner(name: str) -> type[ExperimentPlanner]:
    """The planner class of that name in planners/.

    Raises:
        ValueError: if there is none.
    """
    folder = Path(nnunet_topomae.planners.__file__).parent
    planner = recursive_find_python_class(str(folder), name, "nnunet_topomae.planners")
    if planner is None:
        raise ValueError(f"there is no planner {name} in {folder}; for nnU-Net's own planners use nnUNetv2_plan_experiment")
    return planner


def extract_fingerprint(
    dataset_id: int, num_processes: int, verify: bool, clean: bool, verbose: bool, show_progress: bool
) -> None:
    """nnU-Net's fingerprint of a dataset."""
    extract_fingerprint_dataset(
        dataset_id, FiniteFingerprintExtractor, num_processes, verify, clean, verbose, show_progress
    )


def plan(
    dataset_id: int,
    planner: type[ExperimentPlanner],
    gpu_memory_target: float | None,
    preprocessor_name: str,
    target_spacing: Sequence[float] | None,
    plans_name: str | None,
) -> str:
    """Plan a dataset; returns the name of its plans."""
    return plan_experiment_dataset(
        dataset_id, planner, gpu_memory_target, preprocessor_name, target_spacing, plans_name
    )[1]


def preprocess(
    dataset_id: int,
    plans_name: str,
    configurations: Sequence[str],
    num_processes: Sequence[int] | None,
    verbose: bool,
    show_progress: bool,
) -> None:
    """nnU-Net's preprocessing of a planned dataset."""
    processes = list(num_processes or (_DEFAULT_PROCESSES.get(name, 4) for name in configurations))
    preprocess_dataset(dataset_id, plans_name, configurations, processes, verbose, show_progress)
