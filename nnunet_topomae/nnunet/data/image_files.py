"""What can be wrong with an image file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from nibabel.openers import ImageOpener
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

_NIFTI = (".nii", ".nii.gz")
_TOLERANCE = 1e-3  # of spacings, relative, and of the cosines of directions


@dataclass(frozen=True)
class ImageFile:
    """What is in an image file.

    Attributes:
        defect: what is wrong with the file alone, worded so that it can follow the file's name in a sentence, or None.
        shape: voxels per axis; empty if the file cannot be read.
        spacing: mm per axis.
        direction: cosines of the axes, a column per axis; None if the reader does not say.
        largest: the largest magnitude of a voxel.
        is_constant: whether all voxels have the same value.
        labels: the distinct values; only of a label that holds whole numbers.
    """

    defect: str | None
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    direction: npt.NDArray[np.float64] | None = None
    largest: float = 0.0
    is_constant: bool = False
    labels: frozenset[int] = frozenset()

    def mismatch(self, image: "ImageFile") -> str | None:
        """How the grid of voxels differs from that of another file of the case, worded to come before its name."""
        if self.shape != image.shape:
            return f"has {self.shape} voxels, not the {image.shape} of"
        if not np.allclose(self.spacing, image.spacing, rtol=_TOLERANCE):
            return f"has a spacing of {_rounded(self.spacing)} mm, not the {_rounded(image.spacing)} mm of"
        if (
            self.direction is not None
            and image.direction is not None
            and not np.allclose(self.direction, image.direction, atol=_TOLERANCE)
        ):
            return "is oriented otherwise (its axes point into other directions) than"
        return None


def inspect(file: Path, reader: BaseReaderWriter, *, is_label: bool = False) -> ImageFile:
    """Read an image once and look for defects.

    Args:
        file: one channel of a case, or its label.
        reader: nnU-Net's reader of the dataset.
        is_label: whether it holds labels, which are whole numbers.
    """
    is_nifti = file.name.endswith(_NIFTI)
    try:
        values, spacing, direction = _nifti(file) if is_nifti else _other(file, reader)
        if values.dtype.kind not in "iufb":
            return ImageFile(f"holds values of the type {values.dtype}, which are no real numbers", values.shape)
        finite = np.issubdtype(values.dtype, np.integer) or bool(np.isfinite(values).all())
    except Exception as error:  # readers raise whatever their libraries do
        return ImageFile(f"cannot be read: {_reason(error)}")
    if not values.size:
        return ImageFile("holds no voxel", values.shape)
    if is_nifti and (values.ndim < 3 or values.shape[3:].count(1) != values.ndim - 3):
        return ImageFile(f"has {values.shape} voxels, but must hold one image with three axes", values.shape)
    if not finite:
        return ImageFile("holds NaN or inf", values.shape)
    if not all(np.isfinite(size) and size > 0 for size in spacing):
        return ImageFile(f"has a spacing of {tuple(float(size) for size in spacing)} mm", values.shape)
    if is_nifti and isinstance(reader, SimpleITKIO) and (problem := _itk_problem(file)):
        return ImageFile(f"cannot be read with SimpleITK: {problem}", values.shape)
    found = {float(value) for part in values for value in np.unique(part)} if is_label else set()
    if fractions := sorted(value for value in found if value != int(value)):
        return ImageFile(f"holds {fractions[0]:g}, but labels are whole numbers", values.shape)
    low, high = float(values.min()), float(values.max())
    return ImageFile(
        None, values.shape, spacing, direction, max(abs(low), abs(high)), low == high, frozenset(map(int, found))
    )


def problems_of(files: Mapping[Path, ImageFile], images: Sequence[Path]) -> list[str]:
    """What is wrong with the files of a case, as sentences that begin with the file.

    A channel that is the same everywhere is accepted beside others, as missing ones are often filled with 0.

    Args:
        files: the channels of the case, and its label if it has one.
        images: those that are channels.
    """
    if defects := [f"{file} {content.defect}" for file, content in files.items() if content.defect]:
        return defects
    differing = {file: content.mismatch(files[images[0]]) for file, content in files.items()}
    if defects := [f"{file} {mismatch} {images[0].name}" for file, mismatch in differing.items() if mismatch]:
        return defects
    if all(files[image].is_constant for image in images):
        return [f"{' and '.join(map(str, images))}: all voxels have the same value"]
    return []


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _itk_problem(file: Path) -> str | None:
    """Why nnU-Net could not read a NIfTI file, if so, such as for axes that are not at right angles."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        return str(error).splitlines()[-1]
    return None


def _nifti(file: Path) -> tuple[np.ndarray, tuple[float, ...], npt.NDArray[np.float64]]:
    """Values, spacing and directions as they are stored.

    SimpleITK would silently read 0 for NaN and inf, and nibabel a spacing of 1 for 0 unless it is told not to check.
    """
    image: Any = nibabel.load(file)  # a NIfTI-1 or NIfTI-2 image
    with ImageOpener(str(file)) as stored:
        header = type(image.header).from_fileobj(stored, check=False)
    axes = image.affine[:3, :3]
    with np.errstate(invalid="ignore", divide="ignore"):
        direction = axes / np.linalg.norm(axes, axis=0)
    return np.asanyarray(image.dataobj), tuple(np.abs(header["pixdim"][1:4])), direction


def _other(
    file: Path, reader: BaseReaderWriter
) -> tuple[np.ndarray, tuple[float, ...], npt.NDArray[np.float64] | None]:
    values, properties = reader.read_images([str(file)])
    direction = properties.get("sitk_stuff", {}).get("direction")
    return values, tuple(properties["spacing"]), None if direction is None else np.asarray(direction, float)


def _rounded(spacing: Iterable[float]) -> str:
    return f"({', '.join(f'{float(size):.4g}' for size in spacing)})"
