"""Raw datasets: reading what describes them, and finding what is wrong with their files before hours are spent."""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunet_topomae.files import read_json
from nnunet_topomae.nnunet.data.image_files import ImageFile, inspect, problems_of

_KEYS = {"labels": "names and values of the labels", "file_ending": 'such as ".nii.gz"', "numTraining": "of cases"}
IGNORED = "ignore"  # the label that nnU-Net leaves out
_MAX_NAMED = 5
_MAX_FACTOR = 1e6  # between the magnitudes of an image and of most others


def dataset_name(dataset_id: int) -> str:
    """Name of a dataset in nnU-Net's folders, DatasetXXX_Name.

    Raises:
        FileNotFoundError: if there is none of that ID.
        ValueError: if there are several.
    """
    names = [str(name) for name in find_candidate_datasets(dataset_id)]
    if not names:
        raise FileNotFoundError(
            f"there is no dataset {dataset_id}: neither {nnUNet_raw} nor {nnUNet_preprocessed} has a folder "
            f"Dataset{dataset_id:03d}_NAME; correct the number, or these folders, which are nnUNet_raw and "
            f"nnUNet_preprocessed"
        )
    if len(names) > 1:
        raise ValueError(
            f"dataset {dataset_id} has several names: {', '.join(names)}; give all its folders one of them"
        )
    return names[0]


def channel_names(description: Mapping[str, Any]) -> list[str]:
    """Names of the channels that a dataset.json describes, in their order."""
    return list(description.get("channel_names", description.get("modality", {})).values())


def structures(description: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """The labels that each structure or region of a dataset consists of, without background and ignored voxels."""
    named = {name: labels if isinstance(labels, list) else [labels] for name, labels in description["labels"].items()}
    return {name: labels for name, labels in named.items() if name != IGNORED and labels != [0]}


def label_values(description: Mapping[str, Any], file: Path) -> set[int]:
    """All values that a label may have by its dataset.json, the ignore label included.

    Args:
        description: the content of dataset.json.
        file: the file, for messages.

    Raises:
        ValueError: if they are no whole numbers, or do not count up from 0 without a gap, as nnU-Net needs them to.
    """
    labels = description["labels"]
    if not isinstance(labels, Mapping):
        raise ValueError(f'{file}: "labels" must be an object such as {{"background": 0, "liver": 1}}')
    named = [
        (name, value)
        for name, of_name in labels.items()
        for value in (of_name if isinstance(of_name, list) else [of_name])
    ]
    for name, value in named:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f'{file}: the label "{name}" must be a whole number, got {json.dumps(value)}')
    values = {value for _, value in named}
    if values != set(range(len(values))):
        raise ValueError(
            f"{file}: labels must count up from 0 without a gap, but they are {sorted(values)}; number them anew, in "
            f"the files, too"
        )
    return values


def check_description(description: Mapping[str, Any], file: Path) -> None:
    """Make sure that a dataset.json says what planning and training need to know.

    Args:
        description: its content.
        file: the file, for messages.

    Raises:
        ValueError: names the key that is missing or makes no sense.
    """
    for key, meaning in _KEYS.items():
        if key not in description:
            raise ValueError(f'{file} has no "{key}" ({meaning})')
    ending = description["file_ending"]
    if not isinstance(ending, str) or not re.fullmatch(r"(\.\w+)+", ending):
        raise ValueError(f'{file}: "file_ending" must begin with a dot, such as ".nii.gz", got {json.dumps(ending)}')
    if not isinstance(description["numTraining"], int):
        raise ValueError(
            f'{file} says "numTraining": {json.dumps(description["numTraining"])}, which is no whole number; write how '
            f"many training cases there are, without quotes"
        )
    named = description.get("channel_names", description.get("modality"))
    if not isinstance(named, Mapping) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f'{file} has no "channel_names", such as {{"0": "CT"}}')
    if list(named) != [str(channel) for channel in range(len(named))]:
        raise ValueError(
            f'{file} has the channels {", ".join(named)}; number them "0", "1" and so on in this order, as nnU-Net '
            f"normalises them in the order in which they are written"
        )
    for name in named.values():
        if name != name.strip():
            raise ValueError(
                f'{file} has a channel "{name}" with a blank before or after its name, by which nnU-Net would not know '
                f'it and normalise it in another way; write "{name.strip()}"'
            )
    label_values(description, file)
    try:
        LabelManager(description["labels"], description.get("regions_class_order"))
    except (AssertionError, RuntimeError) as error:  # such as no background, or no order of regions
        raise ValueError(f"{file}: {error}") from error


def _check_listed(listed: Any, file: Path) -> None:
    """See that cases that a dataset.json lists itself, as nnU-Net allows, have images and a label."""
    cases = listed.values() if isinstance(listed, Mapping) else [None]
    wanted = {"images": list, "label": str}
    for case in cases:
        if not isinstance(case, Mapping) or not all(isinstance(case.get(key), kind) for key, kind in wanted.items()):
            raise ValueError(
                f'{file}: "dataset" must be an object that has "images" (a list) and "label" for every case'
            )


def name_problem(case: str) -> str | None:
    """What is wrong with the name of a case, by which its preprocessed files are named; None if nothing is."""
    if case in ("", "..") or case != Path(case).name:
        return "has a name that leads to another folder"
    if case.endswith("_seg"):
        return "has a name that ends in _seg, as the files of labels do, so it could overwrite one"
    return None


def read_dataset(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Read the description of a raw dataset, and find its training cases as nnU-Net does.

    Returns:
        The content of dataset.json, and the files of every case under ``images`` and ``label``.

    Raises:
        FileNotFoundError, ValueError: if dataset.json is missing or incomplete, or there is no case.
    """
    file = folder / "dataset.json"
    description = read_json(file)
    check_description(description, file)
    if "dataset" not in description and not (folder / "imagesTr").is_dir():
        raise FileNotFoundError(f"{folder / 'imagesTr'} does not exist")
    _check_listed(description.get("dataset", {}), file)
    cases = get_filenames_of_train_images_and_targets(str(folder), description)
    if ill := [f"the case {str(case)!r} {problem}" for case in cases if (problem := name_problem(case))]:
        raise ValueError(f"{folder}: {ill[0]}; rename it")
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
    num_channels, allowed = len(channel_names(description)), label_values(description, folder / "dataset.json")
    reader = determine_reader_writer_from_dataset_json(
        description, next(iter(cases.values()))["images"][0], verbose=False
    )
    if not isinstance(reader, type):
        raise ValueError(f"nnU-Net has no reader {description['overwrite_image_reader_writer']}; correct dataset.json")
    with ThreadPoolExecutor(num_threads) as pool:
        hide = None if show_progress else True
        read = pool.map(lambda case: _read(case, reader()), cases.values())
        found = list(tqdm(read, "Checking images", len(cases), leave=False, disable=hide))
    per_case = zip(cases.values(), found, strict=True)
    broken = [defect for case, files in per_case for defect in _defects_of(case, files, num_channels, allowed)]
    broken = broken or _odd_magnitudes(list(cases.values()), found, num_channels)
    if broken:
        raise ValueError(
            f"{len(broken)} files of {folder.name} cannot be used: {'; '.join(broken[:_MAX_NAMED])}"
            f"{' ...' if len(broken) > _MAX_NAMED else ''}; mend or remove them, then run this command again"
        )
    if not any(files[Path(case["label"])].labels - {0} for case, files in zip(cases.values(), found, strict=True)):
        raise ValueError(
            f"{folder / 'labelsTr'}: no case has a labelled voxel; images without labels are added with "
            f"nnUNetv2_topomae add_unlabelled"
        )


def _read(case: dict[str, Any], reader: BaseReaderWriter) -> dict[Path, ImageFile]:
    """What is in those files of a case that exist."""
    label = Path(case["label"])
    files = [Path(image) for image in case["images"]] + ([label] if label.is_file() else [])
    return {file: inspect(file, reader, is_label=file == label) for file in files}


def _odd_magnitudes(cases: list[dict[str, Any]], found: list[dict[Path, ImageFile]], num_channels: int) -> list[str]:
    """Images whose values are a million times larger or smaller than in most, as sentences; empty ones aside."""
    defects = []
    for channel in range(num_channels):
        files = [Path(case["images"][channel]) for case in cases]
        largest = {file: of_case[file].largest for file, of_case in zip(files, found, strict=True)}
        usual = median(value for value in largest.values()) or 1.0
        defects += [
            f"{file} has values up to {value:.3g}, but most images of its channel up to {usual:.3g}"
            for file, value in largest.items()
            if value and not 1 / _MAX_FACTOR < value / usual < _MAX_FACTOR
        ]
    return defects


def _defects_of(
    case: dict[str, Any], found: Mapping[Path, ImageFile], num_channels: int, allowed: set[int]
) -> list[str]:
    """What is wrong with the files of a case, as sentences."""
    images, label = [Path(image) for image in case["images"]], Path(case["label"])
    if len(images) != num_channels:
        return [f"{images[0]} and the other channels of its case are {len(images)}, but there should be {num_channels}"]
    if label not in found:
        return [f"{label} does not exist; images without labels are added with nnUNetv2_topomae add_unlabelled"]
    if problems := problems_of(found, images):
        return problems
    if unknown := sorted(found[label].labels - allowed):
        return [f"{label} holds the label {unknown[0]}, but dataset.json has {', '.join(map(str, sorted(allowed)))}"]
    return []
