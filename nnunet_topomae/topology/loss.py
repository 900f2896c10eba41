"""The topological loss of a reconstruction (Gu et al., section II-A, equation for L_topo)."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_topomae.topology.matching import Certificate, match
from nnunet_topomae.topology.metric import Metric, check_tolerance
from nnunet_topomae.topology.persistence import DIMENSIONS, persistence_pairs, values_at
from nnunet_topomae.topology.search import Indices
from nnunet_topomae.topology.wasserstein import matching_distance

_METRIC = Metric(order=2, ground="inf")
_MAX_THREADS = 16
_MAX_CELLS = 24**3
_SAME_EDGE = 1.01  # edges of cells within 1 % count as equal


class TopologicalLoss(nn.Module):
    """L_topo(I, I') = sqrt(sum over k = 0, 1, 2 of W2(D_k(I), D_k(I'))^2), mean over samples and channels.

    Diagrams and matchings are computed on the CPU, in threads: the diagrams of a volume are one job (one filtration
    gives all dimensions), the matching of two diagrams another. Values and gradients are on the device of the crops.

    Args:
        grid: (d, h, w) cells to which crops are averaged before the filtration; None keeps every voxel. Where a grid
            does not divide a crop, the last cell of that axis is smaller.
        tolerance: largest relative error allowed in the distance of two diagrams; 0 for exact distances.
        num_threads: most threads to use; None for one per core, but no more than 16.

    Raises:
        ValueError: for a grid, tolerance or number of threads out of range.

    Example:
        The crop has two bright spots, of values 3 and 2 with 1 between them; the reconstruction lost the second. That
        component, born at 2 and merged with the other at 1, lies half its persistence from the diagonal.

        >>> import torch
        >>> from nnunet_topomae.topology import TopologicalLoss
        >>> crop = torch.tensor([3.0, 1.0, 2.0, 0.0]).reshape(1, 1, 1, 1, 4)
        >>> reconstruction = torch.tensor([3.0, 1.0, 1.0, 0.0]).reshape(1, 1, 1, 1, 4)
        >>> TopologicalLoss()(crop, reconstruction, crop)
        [tensor(0.5000), tensor(0.)]
    """

    def __init__(self, grid: Sequence[int] | None = None, tolerance: float = 0.0, num_threads: int | None = None):
        super().__init__()
        check_tolerance(tolerance)
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads must be None or at least 1, got {num_threads}")
        if grid is not None and (len(grid) != 3 or any(cells < 1 for cells in grid)):
            raise ValueError(f"grid must be None or three numbers of cells of at least 1, got {tuple(grid)}")
        self.grid = None if grid is None else tuple(grid)
        self.tolerance = tolerance
        self.num_threads = num_threads or min(os.cpu_count() or 1, _MAX_THREADS)

    def forward(self, target: Tensor, *reconstructions: Tensor) -> list[Tensor]:
        """One scalar per reconstruction; the target's diagrams are computed once and shared.

        Args:
            target: (B, C, D, H, W).
            reconstructions: tensors of the same shape. Gradients flow to these and to the target.

        Raises:
            ValueError: for other shapes, NaN or inf, or a grid larger than the crop.
        """
        return self.start(target, *reconstructions).result()

    @torch.compiler.disable
    def start(self, target: Tensor, *reconstructions: Tensor) -> "PendingLoss":
        """Start what :meth:`forward` computes and return at once; threads work while the caller and the GPU go on.

        Raises:
            ValueError: for other shapes, or a grid larger than the crop. NaN or inf is raised with the result.
        """
        names = ["the target", *(f"reconstruction {n}" for n in range(1, len(reconstructions) + 1))]
        crops = dict(zip(names, (target, *reconstructions), strict=True))
        _check(crops)
        pool = _thread_pool(self.num_threads)
        targets, *others = (
            [Diagrams(volume, name, pool) for volume in self._volumes(each)] for name, each in crops.items()
        )
        pairs = [zip(targets, volumes, strict=True) for volumes in others]
        return PendingLoss([[Comparison(*pair, self.tolerance, pool) for pair in each] for each in pairs])

    def _volumes(self, crops: Tensor) -> Tensor:
        """Every sample and channel as a volume on the grid, (B * C, d, h, w), at least float32.

        It is a copy, so that callers may change their tensors before the loss is read.
        """
        copies = crops.to(torch.promote_types(crops.dtype, torch.float32), copy=self.grid is None)
        return pool_to_grid(copies, self.grid).flatten(0, 1)


def _check(crops: dict[str, Tensor]) -> None:
    """Make sure that all crops are batches of volumes of one shape.

    Raises:
        ValueError: names the first that is no batch of floating point volumes or of another shape than the target.
    """
    shape = next(iter(crops.values())).shape
    for name, crop in crops.items():
        if crop.ndim != 5 or not crop.is_floating_point() or crop.numel() == 0:
            raise ValueError(
                f"{name} must be a floating point tensor of shape (B, C, D, H, W) that is not empty, "
                f"got {crop.dtype} of {tuple(crop.shape)}"
            )
        if crop.shape != shape:
            raise ValueError(f"{name} has shape {tuple(crop.shape)}, but the target {tuple(shape)}")


class PendingLoss:
    """A topological loss that threads are still computing."""

    def __init__(self, comparisons: "list[list[Comparison]]"):
        self._comparisons = comparisons

    def result(self) -> list[Tensor]:
        """Wait for the threads, then return what :meth:`TopologicalLoss.forward` returns.

        Raises:
            ValueError: for NaN or inf.
        """
        return [torch.stack([each.distance() for each in volumes]).mean() for volumes in self._comparisons]


@cache
def _thread_pool(num_threads: int) -> ThreadPoolExecutor:
    """The threads that all losses share. Jobs wait only for jobs submitted earlier, so even one thread suffices."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="topology")


class Diagrams:
    """The persistence diagrams of one volume, both as arrays to be matched and as tensors with gradients.

    Args:
        volume: (d, h, w).
        name: of the volume, for messages.
        pool: whose threads compute them.
    """

    def __init__(self, volume: Tensor, name: str, pool: ThreadPoolExecutor):
        self.volume, self.name = volume, name
        self._found = pool.submit(self._compute)

    def _compute(self) -> tuple[list[np.ndarray], list[Tensor]]:
        """Voxels of birth and death and their values, (N, 2) each, per dimension."""
        array = self.volume.detach().cpu().double()
        if not torch.isfinite(array).all():
            raise ValueError(f"{self.name} holds NaN or inf; persistence diagrams are defined for finite values only")
        voxels = persistence_pairs(array)
        return voxels, values_at(array, voxels)

    def points(self, dimension: int) -> np.ndarray:
        """Births and deaths, (N, 2)."""
        return self._found.result()[1][dimension].numpy()

    def values(self) -> Tensor:
        """Births and deaths of all dimensions, one after another, on the volume's device, differentiable: (N, 2)."""
        return values_at(self.volume, [np.concatenate(self._found.result()[0])])[0]


class Comparison:
    """The matchings of the diagrams of two volumes, and their distance.

    Args:
        target, other: diagrams of the volumes.
        tolerance: see :class:`TopologicalLoss`.
        pool: whose threads find the matchings.
    """

    def __init__(self, target: Diagrams, other: Diagrams, tolerance: float, pool: ThreadPoolExecutor):
        self.target, self.other = target, other
        self._matchings = [pool.submit(self._match, dimension, tolerance) for dimension in DIMENSIONS]

    def _match(self, dimension: int, tolerance: float) -> Certificate:
        return match(self.target.points(dimension), self.other.points(dimension), _METRIC, tolerance)

    def distance(self) -> Tensor:
        """The topological loss of one volume.

        The squares of the dimensions' distances add up, so it is the distance of all points, each matched within its
        dimension: one computation on the GPU instead of three.
        """
        matchings = [matching.result() for matching in self._matchings]
        i = _joined([matching.x_indices for matching in matchings], self.target)
        j = _joined([matching.y_indices for matching in matchings], self.other)
        return matching_distance(self.target.values(), self.other.values(), i, j, _METRIC)


def _joined(indices: Sequence[Indices], diagrams: Diagrams) -> Indices:
    """Indices of points per dimension as indices into :meth:`Diagrams.values`."""
    sizes = [len(diagrams.points(dimension)) for dimension in DIMENSIONS]
    starts = np.cumsum([0, *sizes[:-1]])
    return np.concatenate([each + start for each, start in zip(indices, starts, strict=True)])


def pool_to_grid(crops: Tensor, grid: Sequence[int] | None) -> Tensor:
    """Average crops (B, C, D, H, W) to a grid (d, h, w) of equal cells; the last cell of an axis may be smaller.

    Raises:
        ValueError: see :func:`check_grid`.
    """
    if grid is None:
        return crops
    return F.avg_pool3d(crops, check_grid(crops.shape[2:], grid), ceil_mode=True, count_include_pad=False)


def check_grid(crop_size: Sequence[int], grid: Sequence[int] | None) -> tuple[int, ...]:
    """Size of the cells, in voxels per axis, that divide a crop into a grid; 1 on every axis without a grid.

    Raises:
        ValueError: if no cells of equal size give that grid, for example because it is larger than the crop.
    """
    cell = tuple(-(-size // cells) for size, cells in zip(crop_size, grid or crop_size, strict=True))
    fitting = tuple(-(-size // c) for size, c in zip(crop_size, cell, strict=True))
    if grid is not None and fitting != tuple(grid):
        raise ValueError(
            f"topology grid {tuple(grid)} does not fit a crop of {tuple(crop_size)} voxels: cells of {cell} voxels "
            f"give {fitting}; use {fitting} or another grid of whole cells"
        )
    return cell


def choose_grid(crop_size: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...] | None:
    """The finest grid of at most 24^3 cells that are nearly cubes in mm; None if the crop is small enough as it is.

    Cells start as single voxels. Their shortest edges grow by a voxel, edges of equal length together, until few enough
    cells are left.
    """
    cell = np.ones(3, dtype=int)
    grid = np.array(crop_size)
    while grid.prod() > _MAX_CELLS:
        edges = np.where(grid > 1, cell * np.asarray(spacing), np.inf)
        cell = cell + (edges <= edges.min() * _SAME_EDGE)
        grid = -(-np.array(crop_size) // cell)
    return None if (cell == 1).all() else tuple(int(cells) for cells in grid)
