"""Crops, strides and patches that suit the spacing and the size of a dataset's images."""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from nnunet_topomae.networks.geometry import Size, size_of

_MIN_EDGE = 3  # of the coarsest feature map; a 96^3 crop (Gu et al., III-B) and a total stride of 32 give it
_MAX_POOLINGS = 5  # a stem of 4 and three downsamplings by 2
_PATCH_SIZES = (16, 8, 4, 2)
_TARGET_TOKENS = 200

Strides = tuple[Size, ...]
PerAxis = Sequence[float] | npt.NDArray[Any]  # nnU-Net hands over arrays


def shrinking_crops(spacing: PerAxis, median_shape: PerAxis) -> Iterator[tuple[Size, Strides]]:
    """Crops with their strides in the order in which nnU-Net tries them, from the largest on.

    The first has about 256^3 voxels and the same length in mm along every axis, but is no larger than the images. Each
    next one is shorter along that axis along which it covers the largest share of the images.
    """
    aspect = 1 / np.asarray(spacing)
    size = np.minimum(np.round(aspect * (256**3 / aspect.prod()) ** (1 / 3)), median_shape)
    while size.min() >= 1:
        crop_size, strides, divisor = fit_strides(spacing, size)
        if math.prod(crop_size) // math.prod(choose_patch_size(crop_size, spacing)) < 2:
            return
        yield crop_size, strides
        axis = int(np.argmax(np.divide(crop_size, median_shape)))
        size = np.array(crop_size)
        size[axis] -= divisor[axis]


def fit_strides(spacing: PerAxis, crop_size: PerAxis) -> tuple[Size, Strides, Size]:
    """UNETR++'s strides for a crop, by nnU-Net's rules for pooling.

    An axis along which voxels are long is not halved before the voxels of the other axes are about as long. Of n
    halvings the first n - 3, but at least one, make the stem.

    Returns:
        The crop padded to be divisible, five strides that start with 1, and what each axis is divisible by.
    """
    _, pooling, _, padded, divisor = get_pool_and_conv_props(
        spacing, [int(size) for size in crop_size], _MIN_EDGE, _MAX_POOLINGS
    )
    halvings = [size_of(int(k) for k in kernel) for kernel in pooling[1:]][:_MAX_POOLINGS]
    in_stem = max(len(halvings) - 3, 1)
    stem = size_of(math.prod(kernel[axis] for kernel in halvings[:in_stem]) for axis in range(3))
    rest = halvings[in_stem:] + [(1, 1, 1)] * (3 - len(halvings[in_stem:]))
    return size_of(int(p) for p in padded), ((1, 1, 1), stem, *rest), size_of(int(d) for d in divisor)


def choose_patch_size(crop_size: Sequence[int], spacing: PerAxis) -> Size:
    """ViT patches that divide the crop, give about 200 tokens, and are nearly cubes in mm.

    The number of tokens and the shape of patches weigh alike: the squared logarithms (base 2) of both deviations are
    added. Of patches that are equally good the larger ones are taken. An axis of an odd number of voxels has patches
    of 1.
    """
    options = [[p for p in _PATCH_SIZES if size % p == 0 and size > p] or [1] for size in crop_size]

    def badness(patch: Size) -> float:
        tokens = math.prod(size // p for size, p in zip(crop_size, patch, strict=True))
        edges = np.log2(np.multiply(patch, spacing))
        return math.log2(tokens / _TARGET_TOKENS) ** 2 + float(np.ptp(edges)) ** 2

    return min(map(size_of, product(*options)), key=badness)
