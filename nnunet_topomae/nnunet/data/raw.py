"""Raw datasets: reading what describes them, and finding what is wrong with their files before hours are spent."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunet_topomae.files import read_json
from nnunet_topomae.nnunet.data.image_files import inspect

_KEYS = {"labels": "names and values of the labels", "file_ending": 'such as ".nii.gz"', "numTraining": "of cases"}
_MAX_NAMED = 5


def channel_names(description: Mapping[str, Any]) -> list[str]:
    """Names of the channels that a dataset.json describes, in their order."""
    return list(description.get("channel_names", description.get("modality", {})).values())


def read_dataset(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Read the description of a raw dataset, and find its training cases as nnU-Net does.

    Returns:
        The content of dataset.json, and the files of every case under ``images`` and ``label``.

    Raises:
        FileNotFoundError, ValueError: if dataset.json is missing or incomplete, or there is no case.
    """
    file = folder / "dataset.json"
    description = read_json(file)
    for key, meaning in _KEYS.items():
        if key not in description:
            raise ValueError(f'{file} has no "{key}" ({meaning})')
    if not channel_names(description):
        raise ValueError(f'{file} has no "channel_names", such as {{"0": "CT"}}')
    if "dataset" not in description and not (folder / "imagesTr").is_dir():
        raise FileNotFoundError(f"{folder / 'imagesTr'} does not exist")
    cases = get_filenames_of_train_images_and_targets(str(folder), description)
    if not cases:
        raise ValueError(f"{folder / 'imagesTr'} holds no image named CASE_0000{description['file_ending']}")
    if len(cases) != description["numTraining"]:
        raise ValueError(
            f'{file} says "numTraining": {description["numTraining"]}, but there are {len(cases)} training cases'
        )
    return description, cases


def check_dataset(folder: Path, num_threads: int, *, show_progress: bool) -> None:
    """Make sure that every file of every training case can be used, by reading it.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_dataset`; a ValueError also names files that cannot be used.
    """
    description, cases = read_dataset(folder)
    num_channels = len(channel_names(description))
    reader = determine_reader_writer_from_dataset_json(
        description, next(iter(cases.values()))["images"][0], verbose=False
    )
    with ThreadPoolExecutor(num_threads) as pool:
        hide = None if show_progress else True
        found = pool.map(lambda case: _defects_of(case, num_channels, reader()), cases.values())
        defects = list(tqdm(found, "Checking images", len(cases), leave=False, disable=hide))
    broken = [defect for of_case in defects for defect in of_case]
    if broken:
        raise ValueError(
            f"{len(broken)} files of {folder.name} cannot be used: {'; '.join(broken[:_MAX_NAMED])}"
            f"{' ...' if len(broken) > _MAX_NAMED else ''}; mend or remove them, then run this command again"
        )


def _defects_of(case: dict[str, Any], num_channels: int, reader: BaseReaderWriter) -> list[str]:
    """What is wrong with the files of a case, as sentences."""
    images, label = [Path(image) for image in case["images"]], Path(case["label"])
    if len(images) != num_channels:
        return [f"{images[0]} and the other channels of its case are {len(images)}, but there should be {num_channels}"]
    if not label.is_file():
        return [f"{label} does not exist; images without labels are added with nnUNetv2_topomae add_unlabelled"]
    found = {file: inspect(file, reader) for file in (*images, label)}
    defects = [f"{file} {defect}" for file, (defect, _) in found.items() if defect]
    if defects:
        return defects
    expected = found[images[0]][1]
    return [
        f"{file} has {shape} voxels, but {images[0].name} has {expected}"
        for file, (_, shape) in found.items()
        if shape != expected
    ]
