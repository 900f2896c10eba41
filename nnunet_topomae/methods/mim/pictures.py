"""Where a finer volume was cut from, drawn into the coarser one."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def outlined(volume: npt.NDArray[np.float32], index: int, grid: Sequence[int]) -> npt.NDArray[np.float32]:
    """A volume with the outline of one of its parts, as NaN, in the three planes that a report shows.

    These are the planes through the middle of the volume. What is drawn is the outline of the part's shadow, so that it
    is seen even if the plane does not meet the part.

    Args:
        volume: (C, D, H, W).
        index: raster index of the part.
        grid: parts per axis.
    """
    outlined = volume.copy()
    sizes = [voxels // parts for voxels, parts in zip(volume.shape[1:], grid, strict=True)]
    starts = [int(p) * size for p, size in zip(np.unravel_index(index, grid), sizes, strict=True)]
    for across in range(3):
        frame = np.zeros(np.delete(volume.shape[1:], across), dtype=bool)
        box, inner = (
            tuple(
                slice(s + m, s + n - m) for axis, (s, n) in enumerate(zip(starts, sizes, strict=True)) if axis != across
            )
            for m in (0, 1)
        )
        frame[box] = True
        frame[inner] = False
        plane = np.moveaxis(outlined, across + 1, 1)[:, volume.shape[across + 1] // 2]
        plane[:, frame] = np.nan
    return outlined
