"""Checks of sizes that crops, patches and strides have to satisfy."""

from collections.abc import Iterable, Sequence

Size = tuple[int, int, int]


def size_of(values: Iterable[int]) -> Size:
    """Three numbers, one per axis, as a tuple.

    Raises:
        ValueError: if there are not three.
    """
    depth, height, width = values
    return depth, height, width


def grid_of(crop_size: Sequence[int], cell_size: Sequence[int], what: str) -> Size:
    """Cells per axis of a crop: ``crop_size / cell_size``.

    Args:
        crop_size: voxels per axis.
        cell_size: voxels per axis of a cell, such as a patch.
        what: what the cell size is called in messages.

    Raises:
        ValueError: if an axis is not divisible.
    """
    if len(crop_size) != 3 or len(cell_size) != 3:
        raise ValueError(f"crop size {tuple(crop_size)} and {what} {tuple(cell_size)} must have three axes")
    if any(cell < 1 or size % cell for size, cell in zip(crop_size, cell_size, strict=True)):
        raise ValueError(
            f"crop size {tuple(crop_size)} is not divisible by {what} {tuple(cell_size)}; "
            f"choose a crop size whose axes are multiples of it"
        )
    return size_of(size // cell for size, cell in zip(crop_size, cell_size, strict=True))
