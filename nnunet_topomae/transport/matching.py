"""Optimal matchings of persistence diagrams, with a proof that they are optimal.

Every point of a diagram is matched to a point of the other one or sent to the diagonal. That is optimal transport, with
the diagonal as one more point on either side. POT's network simplex solves it for a small set of pairs and returns a
potential (dual price) for every point: alpha for those of the first diagram, beta for those of the second. A complete
search then finds every other pair whose potentials sum to more than its cost. Such pairs could improve the matching, so
they join the set, and the problem is solved again. When there are none left, the matching is optimal. Before that,
potentials bound the optimum from below, which certifies how far from optimal the matching is at most.

Few pairs suffice if the first ones are well chosen. So the points of large diagrams are first snapped to coarse
lattices, where many of them merge into one with a mass. The potentials found on a lattice tell which pairs matter on
the next finer one, and those of the finest lattice which pairs of the diagrams matter.
"""

import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from ot.lp.emd_wrap import emd_c_sparse  # unlike ot.emd, it can start from potentials
from scipy.spatial import cKDTree

from nnunet_topomae.transport.metric import Metric, Points, Values
from nnunet_topomae.transport.search import Indices, Tree, pairs_below_potentials

_FEW_PAIRS = 3_000_000  # up to so many pairs of points, lattices take longer than they save on diagrams of images
_ALL_AT_ONCE = 250_000  # up to so many pairs that are worth matching all take part from the start
_LATTICES = (1 / 32, 1 / 128, 1 / 512, 1 / 2048)  # cells, relative to the range of births and deaths
_EXTENT = (0.001, 0.999)  # quantiles that bound this range, so that a single bright voxel does not stretch it
_MERGES = 0.95  # lattices that leave a larger share of the points, and finer ones, are not worth solving
_LATTICE_TOLERANCE = 0.03
_NEIGHBOURS = 3  # every point is paired with so many nearest ones of the other diagram from the start
_PROMISING = 15  # pairs per point that potentials of a lattice propose
_JOIN_SHARE = 0.9  # a pair joins if its excess is this share of the largest in its row or its column
_PROVABLE = 1e-9  # smallest relative gap asked for; rounding errors of many points add up to about as much
_WORTH_A_WARNING = 1e-6
_NEARLY = 1e-4  # relative gap below which the rounding errors of POT's potentials matter
_MAX_SWEEPS = 200
_NO_PAIRS = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
_MAX_PIVOTS, _OPTIMAL = 10**12, 1  # of POT


@dataclass(frozen=True)
class Certificate:
    """A matching of two diagrams, and bounds that prove how good it is.

    Attributes:
        lower_bound: the distance is at least this.
        upper_bound: the distance by this matching.
        x_indices: matched points of the first diagram; all its others go to the diagonal.
        y_indices: the points of the second diagram that they are matched to, in the same order.
    """

    lower_bound: float
    upper_bound: float
    x_indices: Indices
    y_indices: Indices

    @property
    def gap(self) -> float:
        """Largest relative error that the distance can have, which is upper / lower bound - 1; 0 if both are 0."""
        if self.upper_bound <= self.lower_bound:
            return 0.0
        return self.upper_bound / self.lower_bound - 1 if self.lower_bound > 0 else math.inf


def match(x: Points, y: Points, metric: Metric, tolerance: float) -> Certificate:
    """Find a matching whose distance is larger than the smallest possible one by at most ``tolerance``.

    Args:
        x: a diagram (N, 2), finite float64.
        y: the other diagram, (M, 2).
        metric: what it costs to move a point.
        tolerance: relative to the distance; 0 for the optimum, up to the rounding errors of doubles (1e-9).
    """
    scale = max((np.abs(points).max() for points in (x, y) if points.any()), default=1.0)
    x, y = x / scale, y / scale  # else powers of very small or large values would underflow or overflow
    if len(x) == 0 or len(y) == 0:
        total = metric.to_diagonal(x).sum() + metric.to_diagonal(y).sum()
        distance = float(scale * total ** (1 / metric.order))
        return Certificate(distance, distance, np.empty(0, np.int64), np.empty(0, np.int64))
    problem = Problem(Merged.of(x, metric), Merged.of(y, metric), metric)
    hint = None
    for coarse, fine in pairwise([*problem.on_lattices(), problem]):
        hint = Hint.carried(coarse.solve(_LATTICE_TOLERANCE, hint)[0], coarse, fine)
    plan, lower, upper = problem.solve(max(tolerance, _PROVABLE), hint)
    certificate = Certificate(
        float(scale * lower ** (1 / metric.order)),
        float(scale * upper ** (1 / metric.order)),
        problem.x.draw(np.repeat(plan.rows, plan.mass)),
        problem.y.draw(np.repeat(plan.columns, plan.mass)),
    )
    if certificate.gap > max(tolerance, _WORTH_A_WARNING):
        warnings.warn(
            f"the distance of diagrams of {len(x)} and {len(y)} points is certain to {certificate.gap:.1e} only, where "
            f"{tolerance:g} was asked for: their values differ too much in size for the rounding of doubles",
            stacklevel=2,
        )
    return certificate


@dataclass(frozen=True)
class Merged:
    """Points with masses: the points of a diagram, or of a lattice that it was snapped to.

    Attributes:
        points: (n, 2), all different.
        mass: (n,) how many points of the diagram each of them stands for.
        members: (N,) for each point of the diagram, the index of the one that stands for it.
        to_diagonal: (n,) cost of sending one of them to the diagonal.
        cell: edge of the lattice's cells; 0 without a lattice.
    """

    points: Points
    mass: npt.NDArray[np.int64]
    members: Indices
    to_diagonal: Values
    cell: float

    @classmethod
    def of(cls, diagram: Points, metric: Metric, cell: float = 0.0) -> "Merged":
        """Merge equal points, after snapping them to a lattice if ``cell`` is positive."""
        snapped = np.rint(diagram / cell) * cell if cell else diagram
        as_complex = np.ascontiguousarray(snapped).view(np.complex128).ravel()  # sorted faster than rows
        unique, members, mass = np.unique(as_complex, return_inverse=True, return_counts=True)
        points = unique.view(np.float64).reshape(-1, 2)
        return cls(points, mass, members, metric.to_diagonal(points), cell)

    def __len__(self) -> int:
        return len(self.points)

    def on_lattice(self, cell: float, metric: Metric) -> "Merged":
        """The diagram snapped to a lattice."""
        return Merged.of(self.points[self.members], metric, cell)

    def draw(self, points: Indices) -> Indices:
        """Replace merged points by points of the diagram, a different one each time that a merged point is named."""
        by_point = np.argsort(self.members, kind="stable")
        first = np.searchsorted(self.members[by_point], np.arange(len(self)))
        order = np.argsort(points, kind="stable")
        times = np.arange(len(points)) - np.searchsorted(points[order], points[order])
        drawn = np.empty(len(points), np.int64)
        drawn[order] = by_point[first[points[order]] + times]
        return drawn


@dataclass(frozen=True)
class Pairs:
    """Pairs of points and the cost of matching them.

    Attributes:
        rows: the points of x.
        columns: the points of y.
        cost: of each pair.
        are_all: whether no other pair costs less than sending both of its points to the diagonal.
    """

    rows: Indices
    columns: Indices
    cost: Values
    are_all: bool = False

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Plan:
    """A solution for some of the pairs: a matching, and potentials of the points that bound its cost from below.

    Potentials are feasible: for every pair in use they sum to no more than its cost, and none exceeds the cost of
    sending its point to the diagonal.

    Attributes:
        rows: matched points of x.
        columns: the points of y that they are matched to.
        mass: how often each of these pairs is matched.
        alpha: potentials of the points of x.
        beta: potentials of the points of y.
    """

    rows: Indices
    columns: Indices
    mass: npt.NDArray[np.int64]
    alpha: Values
    beta: Values


@dataclass(frozen=True)
class Hint:
    """Potentials known from a coarser lattice, and how wrong they may be."""

    alpha: Values
    beta: Values
    margin: float

    @classmethod
    def carried(cls, plan: Plan, coarse: "Problem", fine: "Problem") -> "Hint":
        """Give the points of a finer lattice the potentials of a coarser one, by way of the diagram's points."""

        def carry(potentials: Values, source: Merged, target: Merged) -> Values:
            carried = np.empty(len(target))
            carried[target.members] = potentials[source.members]
            return np.minimum(carried, target.to_diagonal)

        margin = coarse.x.cell**coarse.metric.order
        return cls(carry(plan.alpha, coarse.x, fine.x), carry(plan.beta, coarse.y, fine.y), margin)


@dataclass(frozen=True)
class Problem:
    """Optimal transport between two sets of points with masses, any of which may go to the diagonal."""

    x: Merged
    y: Merged
    metric: Metric

    @cached_property
    def trees(self) -> tuple[Tree, Tree]:
        """The points of both sides, arranged for searches."""
        return Tree.of(self.x.points), Tree.of(self.y.points)

    @property
    def is_small(self) -> bool:
        """Whether there are so few pairs of points that lattices would take longer than they save."""
        return len(self.x) * len(self.y) <= _FEW_PAIRS

    def on_lattices(self) -> "list[Problem]":
        """The problem on lattices, coarse to fine, as long as they merge points; none if the problem is small."""
        if self.is_small:
            return []
        extent = np.ptp(np.quantile(np.concatenate([self.x.points, self.y.points]), _EXTENT))
        levels = []
        for cell in _LATTICES:
            x, y = (points.on_lattice(extent * cell, self.metric) for points in (self.x, self.y))
            if max(len(x) / len(self.x), len(y) / len(self.y)) > _MERGES:
                break
            levels.append(Problem(x, y, self.metric))
        return levels

    def solve(self, tolerance: float, hint: Hint | None) -> tuple[Plan, float, float]:
        """Solve for a growing set of pairs, until the relative error of the distance is proven to be small enough.

        Returns:
            A plan, and the lower and the upper bound of the cost; the upper one is the cost of the plan.
        """
        pairs = self._first_pairs(hint)
        start = None if hint is None else (hint.alpha, hint.beta)
        lower, upper = 0.0, float(self.x.mass @ self.x.to_diagonal + self.y.mass @ self.y.to_diagonal)
        best: Plan | None = None
        while True:
            known = upper
            plan = self._transport(pairs, start, known)
            cost = self._cost(plan)
            if best is None or cost <= upper:
                best, upper = plan, cost
            if upper <= lower * (1 + _NEARLY) ** self.metric.order:
                plan = max(plan, self._sharpened(plan, pairs), key=self._dual_value)
            start = plan.alpha, plan.beta
            rows, columns, excess = _NO_PAIRS
            if not pairs.are_all:
                rows, columns, excess = pairs_below_potentials(*self.trees, *start, self.metric, share=_JOIN_SHARE)
            most_of_row, most_of_column = _maximum(rows, excess, len(self.x)), _maximum(columns, excess, len(self.y))
            infeasible = float(min(self.x.mass @ most_of_row, self.y.mass @ most_of_column))
            lower = min(max(lower, self._dual_value(plan) - infeasible), upper)
            if upper <= lower * (1 + tolerance) ** self.metric.order:
                return best, lower, upper
            joining = excess >= _JOIN_SHARE * np.minimum(most_of_row[rows], most_of_column[columns])
            before = len(pairs)
            if joining.any():
                pairs = self._pairs(np.r_[pairs.rows, rows[joining]], np.r_[pairs.columns, columns[joining]])
            if len(pairs) == before and upper > known / 2:  # else solve again, with smaller rounding errors
                return best, lower, upper

    def _pairs(self, rows: Indices, columns: Indices) -> Pairs:
        """The pairs that cost less than sending both points to the diagonal, each once."""
        keys = np.sort(rows * len(self.y) + columns)
        rows, columns = np.divmod(keys[np.diff(keys, prepend=-1) > 0], len(self.y))  # much faster than np.unique
        cost = self.metric.costs(self.x.points[rows], self.y.points[columns])
        pays = cost < self.x.to_diagonal[rows] + self.y.to_diagonal[columns]
        return Pairs(rows[pays], columns[pays], cost[pays])

    def _first_pairs(self, hint: Hint | None) -> Pairs:
        """Pairs of nearest points and those that a hint proposes; without one all worth matching, if there are few.

        Worth matching are those that cost less than sending both points to the diagonal.
        """
        if hint is None and self.is_small:
            rows, columns, _ = pairs_below_potentials(*self.trees, self.x.to_diagonal, self.y.to_diagonal, self.metric)
            if len(rows) <= _ALL_AT_ONCE:
                cost = self.metric.costs(self.x.points[rows], self.y.points[columns])
                return Pairs(rows, columns, cost, are_all=True)
        groups = [
            _nearest(self.x.points, self.y.points, self.metric.norm),
            _nearest(self.y.points, self.x.points, self.metric.norm)[::-1],
        ]
        if hint is not None:
            half = hint.margin / 2
            rows, columns, excess = pairs_below_potentials(
                *self.trees, hint.alpha + half, hint.beta + half, self.metric
            )
            best = _among_best(rows, excess) | _among_best(columns, excess)
            groups.append((rows[best], columns[best]))
        return self._pairs(*(np.concatenate(side) for side in zip(*groups, strict=True)))

    def _transport(self, pairs: Pairs, start: tuple[Values, Values] | None, known: float) -> Plan:
        """Optimal transport along the pairs and to the diagonal, which is point n of x and point m of y.

        POT's rounding errors grow with the largest cost. A pair that costs more than a whole plan already ``known`` is
        in no better plan, so its cost is lowered to that; potentials that are feasible for lowered costs are feasible
        for the real ones, too. Then all costs are scaled to at most 1.

        Raises:
            RuntimeError: if the network simplex fails.
        """
        x, y, n, m = self.x, self.y, len(self.x), len(self.y)
        costs = np.minimum(np.r_[pairs.cost, x.to_diagonal, y.to_diagonal, 0.0], known)
        scale = costs.max() or 1.0
        starts = (None, None) if start is None else (np.r_[np.minimum(s, known), 0.0] / scale for s in start)
        rows, columns, mass, _, alpha, beta, status = emd_c_sparse(
            np.r_[x.mass, y.mass.sum()].astype(np.float64),
            np.r_[y.mass, x.mass.sum()].astype(np.float64),
            np.r_[pairs.rows, np.arange(n), np.full(m, n), n].astype(np.uint64),
            np.r_[pairs.columns, np.full(n, m), np.arange(m), m].astype(np.uint64),
            costs / scale,
            _MAX_PIVOTS,
            *starts,
        )
        if status != _OPTIMAL:
            raise RuntimeError(f"POT's network simplex gave up on a matching of {n} and {m} points (status {status})")
        beta = np.minimum(scale * (beta[:m] + alpha[n]), y.to_diagonal)
        real = (rows < n) & (columns < m)
        rows, columns, mass = (part[real].astype(np.int64) for part in (rows, columns, np.rint(mass)))
        return Plan(rows, columns, mass, self._highest_alpha(pairs, beta), beta)

    def _sharpened(self, plan: Plan, pairs: Pairs) -> Plan:
        """The plan with its potentials computed anew, because those of POT have rounding errors of 1e-12.

        In an optimal plan the potentials of a matched pair sum to just its cost, so those of y follow from those of x.
        Those of x start as high as they can be and are lowered until for no pair in use they sum to more than its cost.
        The result is feasible even if the sweeps end before that.
        """
        matched = self.metric.costs(self.x.points[plan.rows], self.y.points[plan.columns])
        left_over = np.bincount(plan.columns, plan.mass, len(self.y)) < self.y.mass
        lowest = np.where(left_over, self.y.to_diagonal, -np.inf)
        sunk = self.x.to_diagonal
        for _ in range(_MAX_SWEEPS):
            alpha, beta = sunk, lowest.copy()
            np.maximum.at(beta, plan.columns, matched - alpha[plan.rows])
            np.minimum(beta, self.y.to_diagonal, out=beta)
            sunk = self._highest_alpha(pairs, beta)
            if np.array_equal(sunk, alpha):
                break
        return replace(plan, alpha=sunk, beta=beta)

    def _highest_alpha(self, pairs: Pairs, beta: Values) -> Values:
        """The highest potentials of x that are feasible with those of y."""
        alpha = self.x.to_diagonal.copy()
        np.minimum.at(alpha, pairs.rows, pairs.cost - beta[pairs.columns])
        return alpha

    def _dual_value(self, plan: Plan) -> float:
        """What the potentials sum to: a lower bound of the cost, if they are feasible for all pairs."""
        return float(self.x.mass @ plan.alpha + self.y.mass @ plan.beta)

    def _cost(self, plan: Plan) -> float:
        """Cost of matching the points that the plan matches, and of sending all others to the diagonal."""
        total = plan.mass @ self.metric.costs(self.x.points[plan.rows], self.y.points[plan.columns])
        for points, matched in ((self.x, plan.rows), (self.y, plan.columns)):
            total += (points.mass - np.bincount(matched, plan.mass, len(points))) @ points.to_diagonal
        return float(total)


def _nearest(points: Points, others: Points, norm: float) -> tuple[Indices, Indices]:
    """Pairs of every point with the nearest of the others."""
    count = min(_NEIGHBOURS, len(others))
    _, found = cKDTree(others).query(points, list(range(1, count + 1)), p=norm)
    return np.repeat(np.arange(len(points)), count), found.ravel()


def _among_best(group: Indices, value: Values) -> npt.NDArray[np.bool_]:
    """Whether a value is among the highest of its group."""
    order = np.lexsort((-value, group))
    ordered = group[order]
    best = np.empty(len(group), bool)
    best[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered) < _PROMISING
    return best


def _maximum(group: Indices, value: Values, num_groups: int) -> Values:
    """The highest value of each group, at least 0."""
    result = np.zeros(num_groups)
    np.maximum.at(result, group, value)
    return result
