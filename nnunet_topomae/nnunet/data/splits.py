"""``nnUNetv2_topomae splits``: one seeded split into training, validation and test cases."""

import re
from pathlib import Path

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

from nnunet_topomae.files import write_json
from nnunet_topomae.nnunet.data.raw import read_dataset

_PARTS = ("train", "val", "test")


def write_split(dataset_id: int, shares: str, seed: int, *, overwrite: bool) -> tuple[Path, dict[str, list[str]]]:
    """Write one split into ``splits_final.json``, which nnU-Net reads. nnU-Net leaves the test cases in it alone.

    Args:
        dataset_id: ID of a raw dataset that has a preprocessed folder.
        shares: see :func:`part_sizes`.
        seed: cases are shuffled by it.
        overwrite: whether an existing file is replaced.

    Returns:
        The file and its split.

    Raises:
        ValueError: if there is a file already, or the shares do not fit the dataset.
        FileNotFoundError: if the dataset has no preprocessed folder.
    """
    name = convert_id_to_dataset_name(dataset_id)
    raw, folder = Path(nnUNet_raw) / name, Path(nnUNet_preprocessed) / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; plan the dataset first")
    file = folder / "splits_final.json"
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists already, and trainings may rest on it; add --overwrite to replace it")
    _, cases = read_dataset(raw)
    sizes = part_sizes(shares, len(cases))
    shuffled = np.random.default_rng(seed).permutation(sorted(cases)).tolist()
    ends = np.cumsum(sizes).tolist()
    split = {part: sorted(shuffled[end - size : end]) for part, size, end in zip(_PARTS, sizes, ends, strict=False)}
    write_json([split], file)
    return file, split


def part_sizes(shares: str, num_cases: int) -> list[int]:
    """Number of cases in each part.

    Args:
        shares: numbers of cases, "18/12" or "70/10/20", or percentages, "80:20" or "80:15:5"; for training and
            validation, and test if there are three.
        num_cases: number of cases in the dataset.

    Raises:
        ValueError: if the shares have another form, have another sum, or leave training or validation without a case.
    """
    separator = ":" if ":" in shares else "/"
    if not re.fullmatch(rf"\d+({separator}\d+){{1,2}}", shares):
        raise ValueError(
            f'shares must be numbers of cases, such as 18/12, or percentages, such as 80:15:5, got "{shares}"'
        )
    numbers = [int(number) for number in shares.split(separator)]
    total = num_cases if separator == "/" else 100
    if sum(numbers) != total:
        raise ValueError(
            f"{shares} sums to {sum(numbers)}, but "
            f"{f'the dataset has {num_cases} cases' if separator == '/' else 'percentages sum to 100'}"
        )
    ends = [round(sum(numbers[: n + 1]) / total * num_cases) for n in range(len(numbers))]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if min(sizes[:2]) < 1:
        raise ValueError(f"{shares} of {num_cases} cases leaves {sizes[0]} to train and {sizes[1]} to validate on")
    return sizes
