"""The Wasserstein distance of persistence diagrams, exact and differentiable.

Points may be matched to each other or to the diagonal. Matching x to y can only pay if that costs less than sending
both to the diagonal, which leaves few pairs of the full product: a sparse transport problem that POT's network simplex
solves to optimality.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import ot
import torch
from scipy.sparse import coo_matrix
from scipy.spatial import cKDTree
from torch import Tensor

Points = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_MAX_PIVOTS = 2**31 - 1  # of the network simplex; POT's own limit is meant for small problems
_PERSISTENCE_BANDS = 8


@dataclass(frozen=True)
class Matching:
    """A partial matching of two diagrams: ``x[i]`` to ``y[j]``; all other points go to the diagonal."""

    x_indices: Indices
    y_indices: Indices


def wasserstein_distance(x: Tensor, y: Tensor) -> Tensor:
    """2-Wasserstein distance of two persistence diagrams, ground metric L-infinity (Gu et al., section II-A).

    W2(x, y)^2 = min over partial matchings of the sum of |x_i - y_j|_inf^2 over matched and (|birth - death| / 2)^2
    over unmatched points.

    Args:
        x, y: (N, 2) and (M, 2), rows of finite (birth, death), floating point; either may be empty.

    Returns:
        A scalar of x's type and device. Its gradient is that of the optimal matching held fixed, and 0 where the
        distance is 0.

    Raises:
        ValueError: for another shape, or NaN or inf.
    """
    return safe_sqrt(squared_wasserstein_distance(x, y))


def squared_wasserstein_distance(x: Tensor, y: Tensor) -> Tensor:
    """The square of :func:`wasserstein_distance`, with the same arguments and errors; smooth at 0."""
    for name, points in (("x", x), ("y", y)):
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"diagram {name} must have shape (N, 2), got {tuple(points.shape)}")
        if not torch.isfinite(points).all():
            raise ValueError(f"diagram {name} holds NaN or inf; close infinite features first")
    matching = optimal_matching(_to_numpy(x), _to_numpy(y))
    return transport_cost(x, y, matching)


def transport_cost(x: Tensor, y: Tensor, matching: Matching) -> Tensor:
    """Cost of a given matching, differentiable in the points; arguments of :func:`wasserstein_distance`."""
    i = torch.from_numpy(matching.x_indices).to(x.device)
    j = torch.from_numpy(matching.y_indices).to(y.device)
    matched = (x[i] - y[j]).abs().amax(dim=1).square().sum() if len(i) else x.new_zeros(())
    return matched + _to_diagonal(x, i) + _to_diagonal(y, j)


def _to_diagonal(points: Tensor, matched: Tensor) -> Tensor:
    unmatched = torch.ones(len(points), dtype=torch.bool, device=points.device)
    unmatched[matched] = False
    return ((points[unmatched, 0] - points[unmatched, 1]) / 2).square().sum()


def optimal_matching(x: Points, y: Points) -> Matching:
    """A matching of least cost.

    Args:
        x, y: (N, 2) and (M, 2) finite float64.
    """
    i, j, cost = paying_pairs(x, y)
    rows, columns = np.unique(i), np.unique(j)
    if len(rows) == 0:
        return Matching(i, j)
    plan = _solve_transport(
        coo_matrix((cost, (np.searchsorted(rows, i), np.searchsorted(columns, j))), shape=(len(rows), len(columns))),
        _diagonal_cost(x[rows]),
        _diagonal_cost(y[columns]),
    )
    return Matching(rows[plan.row], columns[plan.col])


def paying_pairs(x: Points, y: Points) -> tuple[Indices, Indices, Points]:
    """All pairs that cost less to match than to send to the diagonal; no optimal matching needs another.

    Candidates come from a k-d tree per band of persistence in y, since the radius of search around x grows with both
    persistences.

    Returns:
        Indices into x and y, and the squared L-infinity distance of each pair.
    """
    diagonal_x, diagonal_y = _diagonal_cost(x), _diagonal_cost(y)
    found: list[tuple[Indices, Indices, Points]] = []
    for band in np.array_split(np.argsort(diagonal_y), min(_PERSISTENCE_BANDS, max(len(y), 1))):
        if len(band) == 0 or len(x) == 0:
            continue
        radii = np.sqrt(diagonal_x + diagonal_y[band].max())
        neighbours = cKDTree(y[band]).query_ball_point(x, radii, p=np.inf, return_sorted=False)
        i = np.repeat(np.arange(len(x)), [len(n) for n in neighbours])
        j = band[np.concatenate([np.asarray(n, dtype=np.int64) for n in neighbours])]
        cost = np.abs(x[i] - y[j]).max(axis=1, initial=0) ** 2
        pays = cost < diagonal_x[i] + diagonal_y[j]
        found.append((i[pays], j[pays], cost[pays]))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    i, j, cost = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return i, j, cost


def _solve_transport(pairs: coo_matrix, diagonal_x: Points, diagonal_y: Points) -> coo_matrix:
    """Optimal transport where every point may also go to the diagonal: the matched pairs of its solution."""
    n, m = pairs.shape
    row = np.concatenate([pairs.row, np.arange(n), np.full(m, n), [n]])
    column = np.concatenate([pairs.col, np.full(n, m), np.arange(m), [m]])
    cost = np.concatenate([pairs.data, diagonal_x, diagonal_y, [0.0]])
    _, log = ot.emd2(
        np.append(np.ones(n), m),
        np.append(np.ones(m), n),
        coo_matrix((cost, (row, column)), shape=(n + 1, m + 1)),
        numItermax=_MAX_PIVOTS,
        log=True,
        return_matrix=True,
    )
    if log["warning"] is not None:
        raise RuntimeError(f"optimal transport of {n} and {m} points did not converge: {log['warning']}")
    plan = coo_matrix(log["G"])
    matched = (plan.row < n) & (plan.col < m) & (plan.data > 0.5)
    return coo_matrix((plan.data[matched], (plan.row[matched], plan.col[matched])), shape=(n, m))


def safe_sqrt(value: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 rather than infinite."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1).sqrt(), 0)


def _diagonal_cost(points: Points) -> Points:
    return ((points[:, 0] - points[:, 1]) / 2) ** 2


def _to_numpy(points: Tensor) -> Points:
    return points.detach().to("cpu", torch.float64).numpy()
