"""What can be wrong with an image file."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.openers import ImageOpener
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

_NIFTI = (".nii", ".nii.gz")


def inspect(file: Path, reader: BaseReaderWriter) -> tuple[str | None, tuple[int, ...]]:
    """Read an image once and look for defects.

    Args:
        file: one channel of a case, or its label.
        reader: nnU-Net's reader of the dataset.

    Returns:
        What is wrong with the file, worded so that it can follow the file's name in a sentence, or None if nothing is;
        and the voxels per axis, an empty tuple if the file cannot be read.
    """
    try:
        values, spacing = _nifti(file) if file.name.endswith(_NIFTI) else _other(file, reader)
        finite = np.issubdtype(values.dtype, np.integer) or bool(np.isfinite(values).all())
    except Exception as error:  # readers raise whatever their libraries do
        return f"cannot be read: {type(error).__name__}: {error}", ()
    if not finite:
        return "holds NaN or inf", values.shape
    if not all(np.isfinite(size) and size > 0 for size in spacing):
        return f"has a spacing of {tuple(float(size) for size in spacing)} mm", values.shape
    return None, values.shape


def _nifti(file: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Values and spacing as they are stored.

    SimpleITK would silently read 0 for NaN and inf, and nibabel a spacing of 1 for 0 unless it is told not to check.
    """
    image: Any = nibabel.load(file)  # a NIfTI-1 or NIfTI-2 image
    with ImageOpener(str(file)) as stored:
        header = type(image.header).from_fileobj(stored, check=False)
    return np.asanyarray(image.dataobj), tuple(np.abs(header["pixdim"][1:4]))


def _other(file: Path, reader: BaseReaderWriter) -> tuple[np.ndarray, tuple[float, ...]]:
    values, properties = reader.read_images([str(file)])
    return values, tuple(properties["spacing"])
