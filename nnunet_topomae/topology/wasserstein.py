"""The Wasserstein distance of persistence diagrams: exact or to a certified tolerance, and differentiable."""

from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from nnunet_topomae.transport.matching import Certificate, match
from nnunet_topomae.transport.metric import Ground, Metric, Points, check_tolerance
from nnunet_topomae.transport.search import Indices


@overload
def wasserstein_distance(
    x: Tensor,
    y: Tensor,
    *,
    order: float = ...,
    ground: Ground = ...,
    tolerance: float = ...,
    return_certificate: Literal[False] = ...,
) -> Tensor: ...
@overload
def wasserstein_distance(
    x: Tensor,
    y: Tensor,
    *,
    order: float = ...,
    ground: Ground = ...,
    tolerance: float = ...,
    return_certificate: Literal[True],
) -> tuple[Tensor, Certificate]: ...
def wasserstein_distance(
    x: Tensor,
    y: Tensor,
    *,
    order: float = 2,
    ground: Ground = "inf",
    tolerance: float = 0.0,
    return_certificate: bool = False,
) -> Tensor | tuple[Tensor, Certificate]:
    """Wasserstein distance of two persistence diagrams; by default W2 with ground metric L-infinity (Gu et al., II-A).

    The distance to the power of ``order`` is the smallest sum, over all ways to match points, of these costs: for
    matched points their distance, for all others the distance to the diagonal, each to the power of ``order``.

    Args:
        x: a diagram (N, 2), rows of finite (birth, death), floating point; may be empty. Births may lie above deaths,
            as in super-level filtrations, or below, but alike in both diagrams.
        y: the other diagram, (M, 2).
        order: power of the distance, at least 1.
        ground: norm in the plane: "inf", or p of an Lp norm.
        tolerance: largest relative error of the distance that is allowed; 0 for the exact distance.
        return_certificate: also return bounds and the matching.

    Returns:
        A scalar of x's type and device. Its gradient is that of the matching held fixed, and 0 where the distance is 0.
        With ``return_certificate`` also a :class:`~nnunet_topomae.transport.matching.Certificate`. If values differ so
        much in size that rounding errors exceed the tolerance, a warning says so.

    Raises:
        ValueError: for another shape, NaN or inf, or an order, norm or tolerance out of range.

    Example:
        (3, 0) is matched to (3, 1), at a distance of 1. (2, 1) goes to the diagonal, half its persistence away. So the
        distance is sqrt(1 + 0.25).

        >>> import torch
        >>> from nnunet_topomae.topology import wasserstein_distance
        >>> x, y = torch.tensor([[3.0, 0.0], [2.0, 1.0]]), torch.tensor([[3.0, 1.0]])
        >>> wasserstein_distance(x, y)
        tensor(1.1180)
        >>> _, proof = wasserstein_distance(x, y, tolerance=0.01, return_certificate=True)
        >>> proof.x_indices.tolist(), proof.y_indices.tolist(), proof.gap <= 0.01
        ([0], [0], True)
    """
    metric = Metric(order, ground)
    check_tolerance(tolerance)
    for name, points in (("x", x), ("y", y)):
        if not isinstance(points, Tensor) or not points.is_floating_point():
            kind = points.dtype if isinstance(points, Tensor) else type(points).__name__
            raise ValueError(f"diagram {name} must be a tensor of floating point numbers, got {kind}")
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"diagram {name} must have shape (N, 2), got {tuple(points.shape)}")
        if not torch.isfinite(points).all():
            raise ValueError(f"diagram {name} holds NaN or inf; close infinite features first")
    solution = match(_to_numpy(x), _to_numpy(y), metric, tolerance)
    distance = matching_distance(x, y, solution.x_indices, solution.y_indices, metric)
    return (distance, solution) if return_certificate else distance


def matching_distance(x: Tensor, y: Tensor, i: Indices, j: Indices, metric: Metric) -> Tensor:
    """Distance by a matching of points i of x to points j of y, differentiable in the points; of x's type and device.

    Which points are left for the diagonal is found out on the CPU, where their number is known at once.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x_wide, y_wide = x.to(dtype), y.to(x.device, dtype)
    scale = _scale(x_wide, y_wide)  # powers of very small or large values would be 0 or inf
    cost = _transport_cost(x_wide / scale, y_wide / scale, i, j, metric)
    return (scale * safe_root(cost, metric.order)).to(x.dtype)


def _scale(*diagrams: Tensor) -> Tensor:
    """The largest absolute value, or 1 if all are 0; as a tensor, because reading it would make the GPU wait."""
    largest = torch.stack([points.detach().abs().max() for points in diagrams if len(points)] or [torch.ones(())]).max()
    return largest.where(largest > 0, 1)


def _transport_cost(x: Tensor, y: Tensor, i: Indices, j: Indices, metric: Metric) -> Tensor:
    def at(points: Tensor, indices: Indices) -> Tensor:
        return points[torch.from_numpy(indices).to(points.device)]

    others = [at(points, np.delete(np.arange(len(points)), matched)) for points, matched in ((x, i), (y, j))]
    return _costs(at(x, i), at(y, j), metric).sum() + _to_diagonal(torch.cat(others), metric).sum()


def _costs(x: Tensor, y: Tensor, metric: Metric) -> Tensor:
    """:meth:`Metric.costs` of tensors, differentiable."""
    return torch.linalg.vector_norm(x - y, ord=metric.norm, dim=1) ** metric.order


def _to_diagonal(points: Tensor, metric: Metric) -> Tensor:
    """:meth:`Metric.to_diagonal` of tensors, differentiable."""
    return ((points[:, 0] - points[:, 1]).abs() * 2 ** (1 / metric.norm - 1)) ** metric.order


def safe_root(value: Tensor, order: float = 2) -> Tensor:
    """Root whose gradient at 0 is 0 rather than infinite."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1) ** (1 / order), 0)


def _to_numpy(points: Tensor) -> Points:
    return points.detach().to("cpu", torch.float64).numpy()
