"""How good a segmentation is, structure by structure: overlap, surface distances in mm, and topology.

Dice, 95th percentile of the Hausdorff distance and normalised surface Dice are those of MONAI.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import find_objects, generate_binary_structure, label
from skimage.measure import euler_number

Mask = npt.NDArray[np.bool_]

_TOUCHING = generate_binary_structure(3, 3)  # 26 neighbours, of the structure
_FACES = generate_binary_structure(3, 1)  # 6 neighbours, of what is around it


@dataclass(frozen=True)
class Measures:
    """How a predicted structure differs from the labelled one. None: not defined, as something is empty.

    Attributes:
        dice: overlap, from 0 to 1. 1 if both are empty, 0 if one is.
        hd95: 95th percentile of the Hausdorff distance in mm: the larger one of both directions. Not defined if either
            is empty.
        nsd: normalised surface Dice: the share of both surfaces, from 0 to 1, that lies within a tolerance of the other
            one (Nikolov et al., 2018). 1 if both are empty, 0 if one is.
        betti0_error: by how many the numbers of components differ.
        betti1_error: by how many the numbers of loops differ.
        betti2_error: by how many the numbers of voids differ; see
            :func:`betti_numbers`.
    """

    dice: float | None
    hd95: float | None
    nsd: float | None
    betti0_error: float | None
    betti1_error: float | None
    betti2_error: float | None


def measure_case(
    predicted: npt.NDArray[np.integer],
    labelled: npt.NDArray[np.integer],
    spacing: Sequence[float],
    structures: Mapping[str, Sequence[int]],
    tolerance: float,
    ignored: int | None = None,
) -> dict[str, Measures]:
    """Measure every structure of a case.

    Args:
        predicted, labelled: (D, H, W) labels.
        spacing: mm per voxel along these axes.
        structures: the labels that each structure consists of, by its name.
        tolerance: of the normalised surface Dice, in mm.
        ignored: label of voxels that do not count; None if all do.

    Returns:
        The measures by the name of the structure.

    Raises:
        ValueError: if the shapes differ.
    """
    if predicted.shape != labelled.shape:
        raise ValueError(f"the prediction has {predicted.shape} voxels, the label {labelled.shape}")
    counts = np.ones(labelled.shape, bool) if ignored is None else labelled != ignored
    return {
        name: measure(np.isin(predicted, labels) & counts, np.isin(labelled, labels) & counts, spacing, tolerance)
        for name, labels in structures.items()
    }


def measure(predicted: Mask, labelled: Mask, spacing: Sequence[float], tolerance: float) -> Measures:
    """Measure one structure.

    Args:
        predicted, labelled: (D, H, W) bool.
        spacing: mm per voxel along these axes.
        tolerance: of the normalised surface Dice, in mm.

    Example:
        A prediction that lacks one of two voxels. Distances of surface voxels are 0 and 2 mm, and percentiles are
        interpolated.

        >>> labelled = np.zeros((4, 4, 4), bool)
        >>> labelled[1, 1, 1:3] = True
        >>> predicted = labelled.copy()
        >>> predicted[1, 1, 2] = False
        >>> found = measure(predicted, labelled, spacing=(1, 1, 2), tolerance=1)
        >>> round(found.dice, 3), round(found.hd95, 3), found.betti0_error
        (0.667, 1.9, 0.0)
    """
    predicted, labelled = _cut_out(predicted, labelled)
    betti = np.abs(np.subtract(betti_numbers(predicted), betti_numbers(labelled))).astype(float).tolist()
    if not predicted.any() or not labelled.any():
        agree = float(predicted.any() == labelled.any())
        return Measures(agree, None, agree, *betti)
    return Measures(*_overlap_and_surfaces(predicted, labelled, spacing, tolerance), *betti)


def _cut_out(predicted: Mask, labelled: Mask) -> tuple[Mask, Mask]:
    """The part of both that holds the structures, with a margin of one empty voxel."""
    boxes = find_objects((predicted | labelled).astype(np.uint8))
    box = boxes[0] if boxes else (slice(0, 0),) * 3
    return np.pad(predicted[box], 1), np.pad(labelled[box], 1)


def _overlap_and_surfaces(
    predicted: Mask, labelled: Mask, spacing: Sequence[float], tolerance: float
) -> tuple[float, float, float]:
    """Dice, HD95 and surface Dice of two structures that are not empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of MONAI about its own calls
        from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice  # takes seconds

        first, second = (torch.from_numpy(mask)[None, None] for mask in (predicted, labelled))
        where: dict[str, Any] = {"spacing": [float(mm) for mm in spacing], "include_background": True}
        dice = compute_dice(first, second)
        hd95 = compute_hausdorff_distance(first, second, percentile=95, **where)
        nsd = compute_surface_dice(first, second, class_thresholds=[tolerance], use_subvoxels=True, **where)
    return dice.item(), hd95.item(), nsd.item()


def betti_numbers(mask: Mask) -> tuple[int, int, int]:
    """How many components, loops and voids a structure has.

    Voxels of the structure are connected if they touch, also at an edge or a corner (26 neighbours); voxels around it
    are connected if they share a face (6 neighbours). So a void is closed if no path of faces leads out of it. Loops
    follow from the Euler characteristic, which is components - loops + voids.

    Args:
        mask: (D, H, W) bool; outside of the volume is no structure.

    Example:
        >>> ring = np.ones((1, 3, 3), bool)
        >>> ring[0, 1, 1] = False
        >>> betti_numbers(ring)
        (1, 1, 0)
    """
    mask = np.pad(mask, 1)
    components = label(mask, _TOUCHING)[1]
    voids = label(~mask, _FACES)[1] - 1
    return components, components + voids - int(euler_number(mask, connectivity=3)), voids
