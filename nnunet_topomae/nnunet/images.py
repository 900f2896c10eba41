"""What can be wrong with an image file."""

from pathlib import Path

import nibabel
import numpy as np
from nibabel.openers import ImageOpener
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

_NIFTI = (".nii", ".nii.gz")


def defect_of(file: Path, reader: BaseReaderWriter) -> str | None:
    """What is wrong with an image, as the end of a sentence that begins with its name; None if nothing is.

    Args:
        file: one channel of a case.
        reader: of the dataset.
    """
    try:
        values, spacing = read_image(file, reader)
        finite = np.issubdtype(values.dtype, np.integer) or bool(np.isfinite(values).all())
    except Exception as error:  # readers raise whatever their libraries do
        return f"cannot be read: {type(error).__name__}: {error}"
    if not finite:
        return "holds NaN or inf"
    if not all(np.isfinite(size) and size > 0 for size in spacing):
        return f"has a spacing of {tuple(float(size) for size in spacing)} mm"
    return None


def read_image(file: Path, reader: BaseReaderWriter) -> tuple[np.ndarray, tuple[float, ...]]:
    """Values and spacing of one channel, as they are stored. Raises whatever the file's library does."""
    return _nifti(file) if file.name.endswith(_NIFTI) else _other(file, reader)


def _nifti(file: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Values and spacing as they are stored.

    SimpleITK would silently read 0 for NaN and inf, and nibabel a spacing of 1 for 0 unless it is told not to check.
    """
    image = nibabel.load(file)
    with ImageOpener(file) as stored:
        header = type(image.header).from_fileobj(stored, check=False)
    return np.asanyarray(image.dataobj), tuple(np.abs(header["pixdim"][1:4]))


def _other(file: Path, reader: BaseReaderWriter) -> tuple[np.ndarray, tuple[float, ...]]:
    values, properties = reader.read_images([str(file)])
    return values, tuple(properties["spacing"])
