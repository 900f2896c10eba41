"""Checks of what plans may say of a network: sizes of crops, patches and strides, and switches."""

from collections.abc import Iterable, Sequence
from typing import Any

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


def check_switch(value: Any, name: str) -> bool:
    """The value of an argument that is true or false; a text such as ``"no"`` would count as true.

    Raises:
        ValueError: if it is anything else; names the argument.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value
