"""The topological loss of a reconstruction (Gu et al., section II-A, equation for L_topo)."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_topomae.topology.matching import Certificate, match
from nnunet_topomae.topology.metric import Metric
from nnunet_topomae.topology.persistence import persistence_pairs, values_at
from nnunet_topomae.topology.wasserstein import safe_root, transport_cost

_METRIC = Metric(order=2, ground="inf")
_MAX_THREADS = 16


class TopologicalLoss(nn.Module):
    """L_topo(I, I') = sqrt(sum over k = 0, 1, 2 of W2(D_k(I), D_k(I'))^2), mean over samples and channels.

    Diagrams and matchings are computed on the CPU, in threads over samples, channels, reconstructions and dimensions;
    values and gradients on the device of the crops.

    Args:
        grid: (d, h, w) cells to which crops are averaged before the filtration; None keeps every voxel. Where a grid
            does not divide a crop, the last cell of that axis is smaller.
        tolerance: relative gap to each optimal matching that is allowed; 0 for the optimum.
        num_threads: at most; None for one a core, at most 16.
    """

    def __init__(self, grid: Sequence[int] | None = None, tolerance: float = 0.0, num_threads: int | None = None):
        super().__init__()
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
        for reconstruction in reconstructions:
            if reconstruction.shape != target.shape:
                raise ValueError(f"shapes differ: target {tuple(target.shape)}, {tuple(reconstruction.shape)}")
        targets, *others = (
            [Diagrams(volume) for volume in self._volumes(crops)] for crops in (target, *reconstructions)
        )
        with ThreadPoolExecutor(self.num_threads) as pool:
            list(pool.map(Diagrams.compute, [*targets, *chain(*others)]))
            pending = [[self._submit(pool, *pair) for pair in zip(targets, group, strict=True)] for group in others]
            matchings = [[[job.result() for job in jobs] for jobs in group] for group in pending]
        return [
            torch.stack([_distance(*each) for each in zip(targets, group, found, strict=True)]).mean()
            for group, found in zip(others, matchings, strict=True)
        ]

    def _submit(self, pool: ThreadPoolExecutor, target: "Diagrams", other: "Diagrams") -> list[Future[Certificate]]:
        """Start the matchings of two volumes' diagrams, one a dimension."""
        pairs = zip(target.points, other.points, strict=True)
        return [pool.submit(match, x, y, _METRIC, self.tolerance) for x, y in pairs]

    def _volumes(self, crops: Tensor) -> Tensor:
        """Every sample and channel as a volume on the grid, (B * C, d, h, w), at least float32."""
        return pool_to_grid(crops.to(torch.promote_types(crops.dtype, torch.float32)), self.grid).flatten(0, 1)


class Diagrams:
    """The persistence diagrams of one volume, twice: as arrays to be matched and as tensors with gradients.

    Args:
        volume: (d, h, w).
    """

    def __init__(self, volume: Tensor):
        self.volume = volume
        self.array = volume.detach().cpu().double()
        self.voxels: list[np.ndarray] = []

    def compute(self) -> None:
        """Find the voxels of birth and death, (N, 2) per dimension; may run in a thread."""
        self.voxels = persistence_pairs(self.array)

    @property
    def points(self) -> list[np.ndarray]:
        """Births and deaths per dimension, (N, 2) each."""
        return [points.numpy() for points in values_at(self.array, self.voxels)]

    @property
    def tensors(self) -> list[Tensor]:
        """The same on the volume's device, differentiable."""
        return values_at(self.volume, self.voxels)


def _distance(target: Diagrams, other: Diagrams, matchings: list[Certificate]) -> Tensor:
    """L_topo of one volume."""
    pairs = zip(target.tensors, other.tensors, matchings, strict=True)
    return safe_root(torch.stack([transport_cost(x, y, matching, _METRIC) for x, y, matching in pairs]).sum())


def pool_to_grid(crops: Tensor, grid: Sequence[int] | None) -> Tensor:
    """Average crops (B, C, D, H, W) to a grid (d, h, w) of equal cells, the last of an axis smaller if need be.

    Raises:
        ValueError: if that cannot give the grid, as for one larger than the crop.
    """
    if grid is None:
        return crops
    shape = crops.shape[2:]
    cell = [-(-size // cells) for size, cells in zip(shape, grid, strict=True)]
    if any(cells > size or -(-size // c) != cells for size, cells, c in zip(shape, grid, cell, strict=True)):
        raise ValueError(
            f"topology grid {tuple(grid)} does not fit a crop of {tuple(shape)} voxels: "
            f"cells of {tuple(cell)} voxels give {tuple(-(-s // c) for s, c in zip(shape, cell, strict=True))}"
        )
    return F.avg_pool3d(crops, cell, ceil_mode=True, count_include_pad=False)
