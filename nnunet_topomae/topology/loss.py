"""The topological loss of a reconstruction (Gu et al., section II-A, equation for L_topo)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_topomae.topology.persistence import DIMENSIONS, persistence_pairs, values_at
from nnunet_topomae.topology.wasserstein import matching_distance
from nnunet_topomae.transport.matching import Certificate, match
from nnunet_topomae.transport.metric import Metric, Points, check_tolerance
from nnunet_topomae.transport.processes import Processes, usable_cores
from nnunet_topomae.transport.search import Indices

_METRIC = Metric(order=2, ground="inf")
_MAX_THREADS, _MAX_PROCESSES = 16, 6
_MAX_CELLS = 24**3
_SAME_EDGE = 1.01  # edges of cells within 1 % count as equal


class TopologicalLoss(nn.Module):
    """L_topo(I, I') = sqrt(sum over k = 0, 1, 2 of W2(D_k(I), D_k(I'))^2), mean over samples and channels.

    The CPU computes diagrams and matchings: the diagrams of a volume are one job (one filtration gives all dimensions),
    the matching of two diagrams another. Threads do them. But where the crops are on a GPU, processes find the
    matchings, because in threads that would keep Python from telling the GPU what to do next. Values and gradients are
    on the device of the crops.

    Args:
        grid: (d, h, w) cells to which crops are averaged before the filtration; None keeps every voxel. Where a grid
            does not divide a crop, the last cell of that axis is smaller.
        tolerance: largest relative error allowed in the distance of two diagrams; 0 for exact distances.
        num_threads: most threads to use; None for one per core that the program may use, but no more than 16.
        num_processes: how many processes find matchings; 0 for none, the threads find them then. None for 6 if the
            crops are on a GPU, or as many as there are threads, if these are fewer; and for none on other devices.

    Raises:
        ValueError: for a grid, tolerance, number of threads or number of processes out of range.

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

    def __init__(
        self,
        grid: Sequence[int] | None = None,
        tolerance: float = 0.0,
        num_threads: int | None = None,
        num_processes: int | None = None,
    ):
        super().__init__()
        check_tolerance(tolerance)
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads must be None or at least 1, got {num_threads}")
        if num_processes is not None and num_processes < 0:
            raise ValueError(f"num_processes must be None or at least 0, got {num_processes}")
        if grid is not None and (len(grid) != 3 or any(cells < 1 for cells in grid)):
            raise ValueError(f"grid must be None or three numbers of cells of at least 1, got {tuple(grid)}")
        self.grid = None if grid is None else tuple(grid)
        self.tolerance = tolerance
        self.num_threads = num_threads or min(usable_cores(), _MAX_THREADS)
        self.num_processes = num_processes

    def processes_for(self, device: torch.device) -> int:
        """How many processes find matchings where the crops are on this device."""
        if self.num_processes is None:
            return min(self.num_threads, _MAX_PROCESSES) if device.type == "cuda" else 0
        return self.num_processes

    def forward(self, target: Tensor, *reconstructions: Tensor) -> list[Tensor]:
        """One scalar per reconstruction; the target's diagrams are computed once and shared.

        Args:
            target: (B, C, D, H, W).
            reconstructions: tensors of the same shape. Gradients flow to these and to the target.

        Raises:
            ValueError: for other shapes, NaN or inf, or a grid larger than the crop.
        """
        started = self.start(target)
        pending = [started.compare(each, f"reconstruction {n}") for n, each in enumerate(reconstructions, 1)]
        return [each.result() for each in pending]

    @torch.compiler.disable
    def start(self, target: Tensor) -> "Target":
        """Start to compute the target's diagrams and return at once; the CPU works while the caller and the GPU go on.

        Raises:
            ValueError: for another shape, or a grid larger than the crop. NaN or inf is raised with the result.
        """
        num_processes = self.processes_for(target.device)
        workers = Workers(_threads(self.num_threads), _processes(num_processes) if num_processes else None)
        return Target(target, self.grid, self.tolerance, workers)


class Target:
    """Crops that reconstructions are compared with, each as soon as there is one.

    Args:
        crops: (B, C, D, H, W).
        grid, tolerance: see :class:`TopologicalLoss`.
        workers: who compute everything.
    """

    def __init__(self, crops: Tensor, grid: Sequence[int] | None, tolerance: float, workers: "Workers"):
        self._grid, self._tolerance, self._workers = grid, tolerance, workers
        self._shape = crops.shape
        self._diagrams = self._start("the target", crops)

    @torch.compiler.disable
    def compare(self, reconstruction: Tensor, name: str = "the reconstruction") -> "PendingLoss":
        """Start to compute the loss of a reconstruction and return at once.

        On a GPU, threads wait for what it has been asked for so far, but not for what it is asked for later.

        Args:
            reconstruction: of the shape of the target.
            name: for messages.

        Raises:
            ValueError: for another shape. NaN or inf is raised with the result.
        """
        if reconstruction.shape != self._shape:
            raise ValueError(f"{name} has shape {tuple(reconstruction.shape)}, but the target {tuple(self._shape)}")
        pairs = zip(self._diagrams, self._start(name, reconstruction), strict=True)
        return PendingLoss([Comparison(*pair, self._tolerance, self._workers) for pair in pairs])

    def _start(self, name: str, crops: Tensor) -> "list[Diagrams]":
        """Diagrams of every sample and channel on the grid, computed from values of at least float32.

        They are of a copy, so that callers may change their tensors before the loss is read.
        """
        if crops.ndim != 5 or not crops.is_floating_point() or crops.numel() == 0:
            raise ValueError(
                f"{name} must be a floating point tensor of shape (B, C, D, H, W) that is not empty, "
                f"got {crops.dtype} of {tuple(crops.shape)}"
            )
        copies = crops.to(torch.promote_types(crops.dtype, torch.float32), copy=self._grid is None)
        volumes = pool_to_grid(copies, self._grid).flatten(0, 1)
        on_cpu = CopyOnCPU(volumes)
        return [Diagrams(volume, on_cpu, n, name, self._workers) for n, volume in enumerate(volumes)]


class PendingLoss:
    """A topological loss that is still being computed."""

    def __init__(self, comparisons: "list[Comparison]"):
        self._comparisons = comparisons

    def result(self) -> Tensor:
        """Wait for the rest, then return the loss, a scalar.

        Raises:
            ValueError: for NaN or inf.
        """
        return torch.stack([each.distance() for each in self._comparisons]).mean()


class CopyOnCPU:
    """A copy of a tensor for threads to read, for which they need not wait until the GPU has done all its work.

    It is asked for at once, so it comes before everything that the GPU is asked for later.
    """

    def __init__(self, tensor: Tensor):
        self._copy = tensor.detach().to("cpu", non_blocking=tensor.is_cuda)
        self._device = tensor.device
        self._is_made = None
        if tensor.is_cuda:
            self._is_made = torch.cuda.Event(blocking=True)  # a thread that waits for it leaves the core to others
            self._is_made.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """Wait for the copy and return it."""
        if self._is_made is not None:
            with torch.cuda.device(self._device):  # threads start out on the first GPU, whose memory this would use
                self._is_made.synchronize()
        return self._copy


@dataclass(frozen=True)
class Workers:
    """Threads, and processes that they may have matchings found by. All losses share them.

    Jobs wait only for jobs submitted earlier, so even one thread suffices.
    """

    threads: ThreadPoolExecutor
    processes: Processes | None

    def match(self, x: Points, y: Points, tolerance: float) -> Certificate:
        """See :func:`~nnunet_topomae.transport.matching.match`; to be called in a thread."""
        if self.processes is None:
            return match(x, y, _METRIC, tolerance)
        return self.processes.run(match, x, y, _METRIC, tolerance)


@cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="topology")


@cache
def _processes(number: int) -> Processes:
    return Processes(number)


class Diagrams:
    """The persistence diagrams of one volume, both as arrays to be matched and as tensors with gradients.

    Args:
        volume: (d, h, w).
        on_cpu: a copy of the batch that it belongs to.
        number: of the volume in that batch.
        name: of the batch, for messages.
        workers: who compute them.
    """

    def __init__(self, volume: Tensor, on_cpu: CopyOnCPU, number: int, name: str, workers: Workers):
        self.volume, self.name = volume, name
        self._found = workers.threads.submit(self._compute, on_cpu, number)

    def _compute(self, on_cpu: CopyOnCPU, number: int) -> tuple[list[np.ndarray], list[Tensor]]:
        """Voxels of birth and death and their values, (N, 2) each, per dimension."""
        array = on_cpu.read()[number].double()
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
        workers: who find the matchings.
    """

    def __init__(self, target: Diagrams, other: Diagrams, tolerance: float, workers: Workers):
        self.target, self.other, self._workers = target, other, workers
        self._matchings = [workers.threads.submit(self._match, dimension, tolerance) for dimension in DIMENSIONS]

    def _match(self, dimension: int, tolerance: float) -> Certificate:
        return self._workers.match(self.target.points(dimension), self.other.points(dimension), tolerance)

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
