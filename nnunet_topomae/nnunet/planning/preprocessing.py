"""Fingerprint, planning and preprocessing of datasets: nnU-Net's steps, with our planners."""

from collections.abc import Sequence
from pathlib import Path

import nnunetv2
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunet_topomae.files import read_json
from nnunet_topomae.nnunet.data.raw import check_dataset, dataset_name

_DEFAULT_PROCESSES = {"3d_fullres": 4, "3d_lowres": 8}  # nnU-Net's


def extract_fingerprint(
    dataset_id: int, num_processes: int, *, verify: bool, clean: bool, verbose: bool, show_progress: bool
) -> None:
    """Check the files of a dataset, then let nnU-Net extract its fingerprint; an existing one is kept unless ``clean``.

    Raises:
        FileNotFoundError, ValueError: see :func:`~nnunet_topomae.nnunet.data.raw.check_dataset`; or if the existing one
            is broken.
    """
    name = dataset_name(dataset_id)
    existing = Path(nnUNet_preprocessed) / name / "dataset_fingerprint.json"
    if clean or not existing.is_file():
        check_dataset(Path(nnUNet_raw) / name, num_processes, show_progress=show_progress)
    else:
        _check_fingerprint(existing)
    extract_fingerprint_dataset(
        dataset_id, DatasetFingerprintExtractor, num_processes, verify, clean, verbose, show_progress
    )


def _check_fingerprint(file: Path) -> None:
    try:
        read_json(file)
    except ValueError as error:  # such as of a planning that was killed
        raise ValueError(f"{error}; add --clean, which extracts it anew") from error


def check_preprocessor(name: str) -> None:
    """Make sure that nnU-Net has a preprocessor of that name, before plans name it.

    Raises:
        ValueError: if there is none.
    """
    folder = Path(nnunetv2.__path__[0]) / "preprocessing"
    if recursive_find_python_class(str(folder), name, "nnunetv2.preprocessing") is None:
        raise ValueError(f"-preprocessor_name {name}: there is no preprocessor {name} in nnU-Net")


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
    *,
    verbose: bool,
    show_progress: bool,
) -> None:
    """nnU-Net's preprocessing of a planned dataset."""
    processes = list(num_processes or (_DEFAULT_PROCESSES.get(name, 4) for name in configurations))
    preprocess_dataset(dataset_id, plans_name, configurations, processes, verbose, show_progress)
