"""Fingerprint, planning and preprocessing of datasets: nnU-Net's steps, with our planners."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunet_topomae.nnunet.images import defect_of

_DEFAULT_PROCESSES = {"3d_fullres": 4, "3d_lowres": 8}  # nnU-Net's


def extract_fingerprint(
    dataset_id: int, num_processes: int, verify: bool, clean: bool, verbose: bool, show_progress: bool
) -> None:
    """nnU-Net's fingerprint of a dataset whose images are finite; an existing one is kept unless ``clean``.

    Raises:
        ValueError: names the image files that hold NaN or inf.
    """
    dataset_name = convert_id_to_dataset_name(dataset_id)
    if clean or not (Path(nnUNet_preprocessed) / dataset_name / "dataset_fingerprint.json").is_file():
        check_images(Path(nnUNet_raw) / dataset_name, num_processes, show_progress)
    extract_fingerprint_dataset(
        dataset_id, DatasetFingerprintExtractor, num_processes, verify, clean, verbose, show_progress
    )


def check_images(dataset: Path, num_threads: int, show_progress: bool) -> None:
    """Read every training image of a raw dataset and make sure that its values are finite and its spacing positive.

    Raises:
        ValueError: names the files that are not.
    """
    description = load_json(str(dataset / "dataset.json"))
    cases = get_filenames_of_train_images_and_targets(str(dataset), description)
    files = [file for case in cases.values() for file in case["images"]]
    reader = determine_reader_writer_from_dataset_json(description, files[0], verbose=False)

    with ThreadPoolExecutor(num_threads) as pool:
        hide = None if show_progress else True
        defects = pool.map(lambda file: defect_of(Path(file), reader()), files)
        found = tqdm(zip(files, defects, strict=True), "Checking images", len(files), leave=False, disable=hide)
        broken = [f"{file} {defect}" for file, defect in found if defect]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(files)} image files cannot be used: {'; '.join(broken[:5])}"
            f"{' ...' if len(broken) > 5 else ''}; mend or remove them, then run this command again"
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
