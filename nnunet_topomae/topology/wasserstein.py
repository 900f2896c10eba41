"""The Wasserstein distance of persistence diagrams: exact or to a certified tolerance, and differentiable.

Points may be matched to each other or sent to the diagonal. Matching x to y *saves* diagonal(x) + diagonal(y) - cost,
and only pairs that save something can be part of an optimal matching: a sparse problem, which SciPy's shortest
augmenting paths (LAPJVsp) solve. Large problems are solved on a growing set of pairs: each solution gives prices
(duals), every pair is priced against them, and pairs that would improve the solution join, until none is left. The
prices also bound the optimum from below, which certifies a solution before the last pair has joined.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.spatial import cKDTree
from torch import Tensor

Points = npt.NDArray[np.float64]
Values = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int32]
Ground = Literal["inf"] | int | float
Cloud = TypeVar("Cloud", npt.NDArray[np.float64], Tensor)

_DENSE_PAIRS = 200_000  # of all points, up to which no search tree is worth it
_DIRECT_PAIRS = 100_000  # up to which all pairs are solved at once; measured: growing sets win from there on
_DIRECT_PAIRS_EXACT = 30_000_000  # the same for the optimum, to which growing sets take twice as long but less memory
_NEIGHBOURS = 10  # nearest neighbours, from either side, that the growing set starts with
_JOIN_SHARE = 0.5  # a pair joins if it improves by this share of the best pair of its row or column
_BAND_RATIO = 2.0  # of diagonal costs within a band
_ROUND_OFF = 1e-13  # relative; improvements below it are none


@dataclass(frozen=True)
class Certificate:
    """A matching and what proves how good it is.

    Attributes:
        lower_bound, upper_bound: of the distance; the matching attains the upper one.
        x_indices, y_indices: matched points; all others go to the diagonal.
    """

    lower_bound: float
    upper_bound: float
    x_indices: npt.NDArray[np.int64]
    y_indices: npt.NDArray[np.int64]

    @property
    def gap(self) -> float:
        """Certified relative gap, upper / lower - 1; 0 for two distances of 0."""
        if self.upper_bound <= self.lower_bound:
            return 0.0
        return self.upper_bound / self.lower_bound - 1 if self.lower_bound > 0 else math.inf


@dataclass(frozen=True)
class Metric:
    """Cost of moving a point: its distance in the ground norm, to the power of the order.

    Args:
        order: at least 1.
        ground: "inf", or p of an Lp norm.

    Raises:
        ValueError: for another order or norm.
    """

    order: float = 2
    ground: Ground = "inf"

    def __post_init__(self):
        if not self.order >= 1 or math.isinf(self.order):
            raise ValueError(f"order must be a finite number of at least 1, got {self.order}")
        if not self.norm >= 1:
            raise ValueError(f'ground must be "inf" or a number of at least 1, got {self.ground!r}')

    @property
    def norm(self) -> float:
        """The p of the ground norm."""
        return float(self.ground)

    def to_diagonal(self, points: Cloud) -> Cloud:
        """Cost of sending points (N, 2) to the diagonal; arrays give arrays, tensors differentiable tensors."""
        return (abs(points[:, 0] - points[:, 1]) * 2 ** (1 / self.norm - 1)) ** self.order

    def costs(self, x: Points, y: Points) -> Values:
        """Cost of moving x (..., 2) to y (..., 2)."""
        return np.linalg.norm(x - y, ord=self.norm, axis=-1) ** self.order

    def tensor_costs(self, x: Tensor, y: Tensor) -> Tensor:
        """Cost of moving each row of x (N, 2) to the same row of y, differentiable."""
        return torch.linalg.vector_norm(x - y, ord=self.norm, dim=1) ** self.order


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

    W(x, y)^order = min over partial matchings of the sum of |x_i - y_j|^order over matched points and of the distance
    to the diagonal, to the same power, over unmatched ones.

    Args:
        x, y: (N, 2) and (M, 2), rows of finite (birth, death), floating point; either may be empty.
        order: power of the distance, at least 1.
        ground: norm in the plane: "inf", or p of an Lp norm.
        tolerance: relative gap to the optimum that is allowed; 0 for the optimum itself.
        return_certificate: also return bounds and the matching.

    Returns:
        A scalar of x's type and device. Its gradient is that of the matching held fixed, and 0 where the distance is 0.
        With ``return_certificate`` also a :class:`Certificate`.

    Raises:
        ValueError: for another shape, NaN or inf, or an order, norm or tolerance out of range.
    """
    metric = Metric(order, ground)
    for name, points in (("x", x), ("y", y)):
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"diagram {name} must have shape (N, 2), got {tuple(points.shape)}")
        if not torch.isfinite(points).all():
            raise ValueError(f"diagram {name} holds NaN or inf; close infinite features first")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be at least 0 and below 1, got {tolerance}")
    solution = match(_to_numpy(x), _to_numpy(y), metric, tolerance, certify=return_certificate)
    distance = safe_root(transport_cost(x, y, solution, metric), order)
    return (distance, solution) if return_certificate else distance


def transport_cost(x: Tensor, y: Tensor, matching: Certificate, metric: Metric) -> Tensor:
    """Cost of a given matching, differentiable in the points."""
    i = torch.from_numpy(matching.x_indices).to(x.device)
    j = torch.from_numpy(matching.y_indices).to(y.device)
    matched = metric.tensor_costs(x[i], y[j].to(x)).sum()
    return matched + _cost_of_others(x, i, metric) + _cost_of_others(y, j, metric).to(x)


def _cost_of_others(points: Tensor, matched: Tensor, metric: Metric) -> Tensor:
    unmatched = torch.ones(len(points), dtype=torch.bool, device=points.device)
    unmatched[matched] = False
    return metric.to_diagonal(points[unmatched]).sum()


def safe_root(value: Tensor, order: float = 2) -> Tensor:
    """Root whose gradient at 0 is 0 rather than infinite."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1) ** (1 / order), 0)


def match(x: Points, y: Points, metric: Metric, tolerance: float, certify: bool = True) -> Certificate:
    """A matching whose distance is within ``tolerance`` of the least.

    Args:
        x, y: (N, 2) and (M, 2) finite float64.
        metric: of the plane.
        tolerance: relative gap of distances; 0 for the optimum.
        certify: compute the lower bound also where the matching is known to be optimal without it.
    """
    if len(x) > len(y):
        swapped = match(y, x, metric, tolerance, certify)
        return Certificate(swapped.lower_bound, swapped.upper_bound, swapped.y_indices, swapped.x_indices)
    pairs = Pairs.of(x, y, metric)
    baseline = metric.to_diagonal(x).sum() + metric.to_diagonal(y).sum()  # cost if nothing is matched
    at_once = len(pairs) <= (_DIRECT_PAIRS if tolerance > 0 else _DIRECT_PAIRS_EXACT)
    chosen = np.ones(len(pairs), dtype=bool) if at_once else _nearest(pairs, x, y, metric)
    while True:
        subset = pairs.subset(chosen)
        partner, saving = subset.best_matching()
        upper = max(baseline - saving.sum(), 0.0)
        if not certify and tolerance == 0 and chosen.all():
            return _certificate(upper, upper, partner, metric)
        prices = subset.column_prices(partner, saving)
        profit = pairs.row_profits(prices)
        lower = min(max(baseline - profit.sum() - prices.sum(), 0.0), upper)
        result = _certificate(lower, upper, partner, metric)
        if result.gap <= tolerance:
            return result
        joining = pairs.improving(prices, subset.row_profits(prices)) & ~chosen
        if not joining.any():
            return result
        chosen |= joining


def _certificate(lower: float, upper: float, partner: Indices, metric: Metric) -> Certificate:
    rows = np.flatnonzero(partner >= 0)
    root = 1 / metric.order
    return Certificate(float(lower**root), float(upper**root), rows, partner[rows].astype(np.int64))


@dataclass(frozen=True)
class Pairs:
    """Pairs of points that save something when matched, ordered by row; rows are the smaller diagram.

    Attributes:
        row, column: indices of the points.
        saving: diagonal cost of both less the cost of matching, positive.
        num_rows, num_columns: sizes of the diagrams.
    """

    row: Indices
    column: Indices
    saving: Values
    num_rows: int
    num_columns: int

    @classmethod
    def of(cls, x: Points, y: Points, metric: Metric) -> "Pairs":
        """All of them; no optimal matching needs another."""
        if len(x) * len(y) <= _DENSE_PAIRS:
            saving = metric.to_diagonal(x)[:, None] + metric.to_diagonal(y) - metric.costs(x[:, None], y[None])
            row, column = (index.astype(np.int32) for index in np.nonzero(saving > 0))
            return cls(row, column, saving[row, column], len(x), len(y))
        parts = list(_paying_pairs(x, y, metric))
        row, column, saving = (np.concatenate(part) for part in zip(*parts, strict=True))
        del parts
        table = csr_matrix((saving, (row, column)), shape=(len(x), len(y)))
        row = np.repeat(np.arange(len(x), dtype=np.int32), np.diff(table.indptr))
        return cls(row, table.indices.astype(np.int32, copy=False), table.data, len(x), len(y))

    def __len__(self) -> int:
        return len(self.saving)

    def subset(self, chosen: npt.NDArray[np.bool_]) -> "Pairs":
        """The chosen pairs."""
        return Pairs(self.row[chosen], self.column[chosen], self.saving[chosen], self.num_rows, self.num_columns)

    @cached_property
    def _segments(self) -> tuple[npt.NDArray[np.int64], Indices]:
        """Where the pairs of each non-empty row start, and which rows these are."""
        starts = np.flatnonzero(np.diff(self.row, prepend=-1))
        return starts, self.row[starts]

    def row_maximum(self, values: Values) -> Values:
        """The largest value per row, at least 0."""
        starts, rows = self._segments
        result = np.zeros(self.num_rows)
        if len(starts):
            result[rows] = np.maximum(np.maximum.reduceat(values, starts), 0)
        return result

    def column_maximum(self, values: Values) -> Values:
        """The largest value per column, at least 0."""
        result = np.zeros(self.num_columns)
        np.maximum.at(result, self.column, values)
        return result

    def best_matching(self) -> tuple[Indices, Values]:
        """The matching that saves most: partner of each row or -1, and what each row saves.

        Every row may also take a column of its own that saves nothing, so a full matching of the rows exists.
        """
        if len(self) == 0:
            return np.full(self.num_rows, -1, np.int32), np.zeros(self.num_rows)
        n, m = self.num_rows, self.num_columns
        own = np.arange(n, dtype=np.int32)
        scale = self.saving.max()
        costs = np.concatenate([-self.saving / scale, np.zeros(n)]) - 1  # a stored 0 would count as no pair
        table = csr_matrix((costs, (np.r_[self.row, own], np.r_[self.column, own + m])), shape=(n, m + n))
        columns = min_weight_full_bipartite_matching(table)[1].astype(np.int32)
        partner = np.where(columns < m, columns, -1).astype(np.int32)
        matched = self.column == partner[self.row]
        saving = np.zeros(n)
        saving[self.row[matched]] = self.saving[matched]
        return partner, saving

    def column_prices(self, partner: Indices, saving: Values) -> Values:
        """Dual prices of the columns that make an optimal matching of these pairs optimal: the highest such.

        The lowest profits of the rows are the fixed point of profit_i = max_j(saving_ij - price_j), where the price of
        a matched column is what its row saves less that row's profit; it is reached after finitely many rounds.
        """
        matched = np.flatnonzero(partner >= 0)
        profit, price = np.zeros(self.num_rows), np.zeros(self.num_columns)
        for _ in range(self.num_rows + 1):
            price[partner[matched]] = saving[matched] - profit[matched]
            raised = np.maximum(profit, self.row_maximum(self.saving - price[self.column]))
            settled = np.abs(raised - profit).max(initial=0) <= _ROUND_OFF * saving.max(initial=0)
            profit = raised
            if settled:
                break
        return self.column_maximum(self.saving - profit[self.row])

    def row_profits(self, prices: Values) -> Values:
        """What each row can make at most at these prices; with the prices, a feasible dual solution."""
        return self.row_maximum(self.saving - prices[self.column])

    def improving(self, prices: Values, profits: Values) -> npt.NDArray[np.bool_]:
        """Pairs that promise more than their row makes, if not far less than the best of their row or column."""
        gain = self.saving - prices[self.column] - profits[self.row]
        worth = _JOIN_SHARE * np.minimum(self.row_maximum(gain)[self.row], self.column_maximum(gain)[self.column])
        return (gain > _ROUND_OFF * self.saving.max()) & (gain >= worth)


def _paying_pairs(x: Points, y: Points, metric: Metric) -> Iterator[tuple[Indices, Indices, Values]]:
    """Rows, columns and savings, found with k-d trees of bands of points of similar persistence.

    The radius of search grows with both persistences, so bands keep it tight.
    """
    diagonal_x, diagonal_y = metric.to_diagonal(x), metric.to_diagonal(y)
    bands_y = [(band, cKDTree(y[band])) for band in _bands(diagonal_y)]
    yield np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0)  # so that there is something to concatenate
    for band_x in _bands(diagonal_x):
        tree_x = cKDTree(x[band_x])
        for band_y, tree_y in bands_y:
            radius = (diagonal_x[band_x].max() + diagonal_y[band_y].max()) ** (1 / metric.order)
            near = tree_x.sparse_distance_matrix(tree_y, radius, p=metric.norm, output_type="ndarray")
            row, column = band_x[near["i"]], band_y[near["j"]]
            saving = diagonal_x[row] + diagonal_y[column] - near["v"] ** metric.order
            pays = saving > 0
            yield row[pays], column[pays], saving[pays]


def _bands(diagonal_costs: Values) -> Iterator[Indices]:
    """Indices of points whose diagonal costs lie within a factor of each other; none of points on the diagonal."""
    positive = np.flatnonzero(diagonal_costs > 0).astype(np.int32)
    level = np.floor(np.log(diagonal_costs[positive]) / math.log(_BAND_RATIO))
    for value in np.unique(level):
        yield positive[level == value]


def _nearest(pairs: Pairs, x: Points, y: Points, metric: Metric) -> npt.NDArray[np.bool_]:
    """Which pairs are among the nearest of their row or their column."""
    cost = metric.to_diagonal(x)[pairs.row] + metric.to_diagonal(y)[pairs.column] - pairs.saving
    reach = [
        (cKDTree(b).query(a, min(_NEIGHBOURS, len(b)), p=metric.norm)[0].reshape(len(a), -1)[:, -1]) ** metric.order
        for a, b in ((x, y), (y, x))
    ]
    margin = 1 + 1e-9  # costs are differences of larger numbers
    return (cost <= margin * reach[0][pairs.row]) | (cost <= margin * reach[1][pairs.column])


def _to_numpy(points: Tensor) -> Points:
    return points.detach().to("cpu", torch.float64).numpy()
