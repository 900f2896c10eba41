"""A made-up dataset in nnU-Net's raw format, for the demo and the tests.

Each case is a body in air with CT-like intensities (HU) that holds a solid organ, a hollow organ, a tube with a lumen
and a branching tree: structures whose components, loops and voids persistent homology can see.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy.ndimage import distance_transform_edt, gaussian_filter

LABELS = {"background": 0, "solid_organ": 1, "hollow_organ": 2, "tube": 3, "tree": 4}
SHAPE = (32, 48, 48)
SPACING = (2.0, 2.0, 2.0)

_AIR, _TISSUE, _SOLID, _WALL, _FLUID, _TUBE, _LUMEN, _TREE = -1000, 40, 110, 160, 0, 130, 330, 250
_NOISE = 15.0  # HU
_BLUR = 0.5  # voxels

Image = npt.NDArray[np.int16]
Labels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Point = npt.NDArray[np.float64]


def make_case(seed: int, shape: Sequence[int] = SHAPE) -> tuple[Image, Labels]:
    """One phantom.

    Args:
        seed: the same seed gives the same case.
        shape: voxels (z, y, x), at least 24 each.

    Returns:
        Intensities in HU and labels (see ``LABELS``), both of the given shape.

    Raises:
        ValueError: if an axis is shorter than 24 voxels, which leaves no room for walls.
    """
    if min(shape) < 24:
        raise ValueError(f"a phantom needs at least 24 voxels per axis, got {tuple(shape)}")
    rng = np.random.default_rng(seed)
    image = np.full(shape, _AIR, dtype=np.float64)
    labels = np.zeros(shape, dtype=np.uint8)
    image[_ellipsoid(shape, (0.5, 0.5, 0.5), (0.6, 0.46, 0.46))] = _TISSUE

    def paint(mask: Mask, intensity: float, label: str | None = None) -> None:
        image[mask] = intensity + rng.normal(0, 5)
        labels[mask] = LABELS[label] if label else 0

    def near(*center: float) -> Point:
        return np.array(center) + rng.uniform(-0.03, 0.03, 3)

    size = rng.uniform(0.9, 1.1)
    paint(_ellipsoid(shape, near(0.5, 0.33, 0.3), np.array([0.3, 0.15, 0.14]) * size), _SOLID, "solid_organ")
    center, radii = near(0.5, 0.36, 0.7), np.array([0.28, 0.16, 0.15]) * size
    paint(_ellipsoid(shape, center, radii), _WALL, "hollow_organ")
    paint(_ellipsoid(shape, center, radii * 0.6), _FLUID)
    axis = _curve(near(0.02, 0.6, 0.5), near(0.98, 0.62, 0.5), rng)
    paint(_tube(shape, axis, 3.4), _TUBE, "tube")
    paint(_tube(shape, axis, 1.6), _LUMEN)
    for branch in _branches(near(0.1, 0.8, 0.5), np.array([0.35, 0.0, 0.0]), 3, rng):
        paint(_tube(shape, branch, 1.3) & (labels == 0), _TREE, "tree")

    image = gaussian_filter(image, _BLUR) + rng.normal(0, _NOISE, shape)
    return image.round().astype(np.int16), labels


def write_dataset(folder: Path, num_training: int, num_test: int, seed: int = 0) -> None:
    """Write phantoms as an nnU-Net raw dataset with imagesTr, labelsTr, imagesTs, labelsTs and dataset.json.

    Args:
        folder: ``.../nnUNet_raw/DatasetXXX_Name``; made if missing.
        num_training: labelled cases to train on.
        num_test: labelled cases kept aside.
        seed: of the first case; the others count on.
    """
    for index in range(num_training + num_test):
        split = "Tr" if index < num_training else "Ts"
        image, labels = make_case(seed + index)
        name = f"phantom_{index:03d}"
        _write_nifti(image, folder / f"images{split}" / f"{name}_0000.nii.gz")
        _write_nifti(labels, folder / f"labels{split}" / f"{name}.nii.gz")
    description = {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": num_training,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))


def _write_nifti(array: Image | Labels, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(file))


def _ellipsoid(shape: Sequence[int], center: npt.ArrayLike, radii: npt.ArrayLike) -> Mask:
    """Voxels inside an ellipsoid; centre and radii as shares of the shape."""
    coordinates = np.stack(np.meshgrid(*((np.arange(n) + 0.5) / n for n in shape), indexing="ij"), axis=-1)
    return (((coordinates - np.asarray(center)) / np.asarray(radii)) ** 2).sum(axis=-1) <= 1


def _tube(shape: Sequence[int], points: Point, radius: float) -> Mask:
    """Voxels within ``radius`` voxels of a densely sampled line; points as shares of the shape."""
    voxels = np.clip(np.floor(points * np.array(shape)), 0, np.array(shape) - 1).astype(int)
    line = np.ones(shape, dtype=bool)
    line[tuple(voxels.T)] = False
    return distance_transform_edt(line) <= radius


def _curve(start: Point, end: Point, rng: np.random.Generator) -> Point:
    """A line from start to end that bends sideways."""
    t = np.linspace(0, 1, 200)[:, None]
    bend = rng.uniform(-0.06, 0.06, 3) * np.array([0, 1, 1])
    return start + (end - start) * t + bend * np.sin(np.pi * t)


def _branches(start: Point, step: Point, depth: int, rng: np.random.Generator) -> list[Point]:
    """Lines of a tree whose branches split in two, turn outwards and shorten."""
    end = start + step
    lines = [start + (end - start) * np.linspace(0, 1, 100)[:, None]]
    if depth > 1:
        for side in (-1, 1):
            turn = np.array([0.2, rng.uniform(-0.05, 0.02), side * rng.uniform(0.1, 0.18)])
            lines += _branches(end, turn * 0.7 ** (3 - depth), depth - 1, rng)
    return lines
