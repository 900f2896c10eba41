"""Complete search for pairs of points whose potentials sum to more than the cost of matching them."""

from dataclasses import dataclass
from functools import cached_property
from math import ceil, log2

import numpy as np
import numpy.typing as npt

from nnunet_topomae.transport.metric import Metric, Points, Values

Indices = npt.NDArray[np.int64]
Boxes = tuple[Points, Points]  # lowest and highest corner of every box

_LEAF = 8  # points
_LEAVES_AT_ONCE = 1 << 14  # so many pairs of leaves are compared in one go, which bounds memory


@dataclass(frozen=True)
class Tree:
    """A balanced k-d tree of points in the plane, level by level.

    Attributes:
        order: (leaves, points of a leaf), indices of the points; -1 where a leaf is not full.
        points: (leaves, points of a leaf, 2), repetitions of a point where a leaf is not full.
    """

    order: Indices
    points: Points

    @classmethod
    def of(cls, points: Points) -> "Tree":
        """Split points (N, 2), N > 0, at their median, births and deaths in turn."""
        depth = ceil(log2(max(len(points) / _LEAF, 1)))
        padding = _LEAF * 2**depth - len(points)
        order = np.r_[np.arange(len(points)), np.full(padding, -1)]
        points = np.concatenate([points, np.tile(points[:1], (padding, 1))])
        for level in range(depth):
            ascending = np.argsort(points[:, level % 2].reshape(2**level, -1), axis=1, kind="stable")
            ascending = (ascending + np.arange(2**level)[:, None] * ascending.shape[1]).ravel()
            order, points = order[ascending], points[ascending]
        return cls(order.reshape(-1, _LEAF), points.reshape(-1, _LEAF, 2))

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return len(self.order).bit_length() - 1

    @cached_property
    def boxes(self) -> list[Boxes]:
        """Bounding boxes of the nodes per level, the root first."""
        low, high = self.points.min(axis=1), self.points.max(axis=1)
        levels = [(low, high)]
        for _ in range(self.depth):
            low, high = low.reshape(-1, 2, 2).min(axis=1), high.reshape(-1, 2, 2).max(axis=1)
            levels.insert(0, (low, high))
        return levels

    def spread(self, values: Values) -> tuple[Values, list[Values]]:
        """Values of the points by leaf, -inf where a leaf is not full, and their maximum per node and level."""
        by_leaf = np.where(self.order >= 0, values[self.order], -np.inf)
        levels = [by_leaf.max(axis=1)]
        for _ in range(self.depth):
            levels.insert(0, levels[0].reshape(-1, 2).max(axis=1))
        return by_leaf, levels


def pairs_below_potentials(
    x: Tree, y: Tree, alpha: Values, beta: Values, metric: Metric, share: float = 0.0
) -> tuple[Indices, Indices, Values]:
    """All pairs with alpha_i + beta_j > cost_ij, or the most important of them.

    Descends both trees at once. A pair of nodes is given up where even the highest potentials within it sum to less
    than the distance between their boxes costs.

    Args:
        x, y: the points of both sides.
        alpha, beta: their potentials.
        metric: what it costs to move a point.
        share: leave out pairs whose excess is below this share both of the largest excess in their row and of the
            largest in their column; the pairs with the largest ones stay. This saves memory where very many pairs are
            found. Pairs are compared with the largest excess found before them, so a few that are below may stay.

    Returns:
        i and j of the pairs, and by how much their potentials exceed the cost.
    """
    alpha_by_leaf, alpha_max = x.spread(alpha)
    beta_by_leaf, beta_max = y.spread(beta)
    i, j = _near_leaves(x, y, alpha_max, beta_max, metric)
    births_x, deaths_x, births_y, deaths_y = (np.ascontiguousarray(t.points[..., c]) for t in (x, y) for c in (0, 1))
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    most_of_row, most_of_column = np.zeros(len(alpha)), np.zeros(len(beta))
    for start in range(0, len(i), _LEAVES_AT_ONCE):
        p, q = i[start : start + _LEAVES_AT_ONCE], j[start : start + _LEAVES_AT_ONCE]
        cost = metric.cost(
            np.abs(births_x[p][:, :, None] - births_y[q][:, None]),
            np.abs(deaths_x[p][:, :, None] - deaths_y[q][:, None]),
        )
        excess = alpha_by_leaf[p][:, :, None] + beta_by_leaf[q][:, None] - cost
        pair, row, column = np.nonzero(excess > 0)
        rows, columns, excesses = x.order[p[pair], row], y.order[q[pair], column], excess[pair, row, column]
        if share:  # of the largest so far, which is no more than the largest of all
            np.maximum.at(most_of_row, rows, excesses)
            np.maximum.at(most_of_column, columns, excesses)
            stays = excesses >= share * np.minimum(most_of_row[rows], most_of_column[columns])
            rows, columns, excesses = rows[stays], columns[stays], excesses[stays]
        found.append((rows, columns, excesses))
    rows, columns, excesses = (np.concatenate(part) for part in zip(*found, strict=True))
    return rows, columns, excesses


def _near_leaves(
    x: Tree, y: Tree, alpha_max: list[Values], beta_max: list[Values], metric: Metric
) -> tuple[Indices, Indices]:
    """Pairs of leaves that may hold a pair of points that is searched for: indices of leaves of x and of y."""
    i = j = np.zeros(1, np.int64)
    level_x = level_y = 0
    while True:
        far = _box_costs(x.boxes[level_x], i, y.boxes[level_y], j, metric)
        near = alpha_max[level_x][i] + beta_max[level_y][j] > far
        i, j = i[near], j[near]
        if level_x < x.depth and x.depth - level_x >= y.depth - level_y:
            i, j, level_x = _children(i), np.repeat(j, 2), level_x + 1
        elif level_y < y.depth:
            i, j, level_y = np.repeat(i, 2), _children(j), level_y + 1
        else:
            return i, j


def _children(nodes: Indices) -> Indices:
    return (2 * nodes[:, None] + np.arange(2)).ravel()


def _box_costs(a: Boxes, i: Indices, b: Boxes, j: Indices, metric: Metric) -> Values:
    """Least cost between points of boxes a_i and b_j."""
    gaps = np.maximum(np.maximum(a[0][i] - b[1][j], b[0][j] - a[1][i]), 0)
    return metric.cost(gaps[:, 0], gaps[:, 1])
