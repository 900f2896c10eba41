"""The topological loss of a reconstruction (Gu et al., section II-A, equation for L_topo)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_topomae.topology.persistence import DIMENSIONS, persistence_diagrams
from nnunet_topomae.topology.wasserstein import safe_sqrt, squared_wasserstein_distance


class TopologicalLoss(nn.Module):
    """L_topo(I, I') = sqrt(sum over k = 0, 1, 2 of W2(D_k(I), D_k(I'))^2), mean over samples and channels.

    Args:
        grid: (d, h, w) cells to which crops are averaged before the filtration; None keeps every voxel. Where a grid
            does not divide a crop, the last cell of that axis is smaller.
    """

    def __init__(self, grid: Sequence[int] | None = None):
        super().__init__()
        self.grid = None if grid is None else tuple(grid)

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
        target_diagrams = self._diagrams(target)
        return [_mean_distance(target_diagrams, self._diagrams(volume)) for volume in reconstructions]

    def _diagrams(self, crops: Tensor) -> list[list[Tensor]]:
        """Diagrams of every sample and channel."""
        volumes = pool_to_grid(crops.to(torch.promote_types(crops.dtype, torch.float32)), self.grid)
        return [persistence_diagrams(volume, DIMENSIONS) for volume in volumes.flatten(0, 1)]


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


def _mean_distance(target: list[list[Tensor]], reconstruction: list[list[Tensor]]) -> Tensor:
    distances = [
        safe_sqrt(torch.stack([squared_wasserstein_distance(x, y) for x, y in zip(*pair, strict=True)]).sum())
        for pair in zip(target, reconstruction, strict=True)
    ]
    return torch.stack(distances).mean()
