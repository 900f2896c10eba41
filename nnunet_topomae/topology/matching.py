"""Optimal matchings of persistence diagrams, with proof.

Points may be matched to each other or sent to the diagonal: optimal transport, with the diagonal as one more point on
either side. POT's network simplex solves it for a set of pairs and gives potentials (duals) alpha and beta. A complete
search then finds every other pair whose potentials exceed its cost. Those would improve the matching and join the set,
until none is left: the matching is optimal. Feasible potentials also bound the optimum from below, which certifies a
matching before that.

Few pairs suffice if the first ones are good. So the points are first snapped to coarse lattices, where they merge into
few points with masses; potentials carried from lattice to finer lattice to the diagrams tell which pairs matter.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from ot.lp.emd_wrap import emd_c_sparse  # unlike ot.emd, it can start from potentials
from scipy.spatial import cKDTree

from nnunet_topomae.topology.metric import Metric, Points, Values
from nnunet_topomae.topology.search import Indices, Tree, pairs_below_potentials

_FEW_PAIRS = 100_000  # of all points, up to which every pair that can pay takes part from the start
_LATTICES = (1 / 64, 1 / 256, 1 / 1024, 1 / 4096)  # cells, relative to the range of births and deaths
_MERGES = 0.7  # share of the points that may be left on a lattice; finer ones are not worth it
_LATTICE_TOLERANCE = 0.03
_NEIGHBOURS = 5  # nearest ones, from either side, that take part from the start
_PROMISING = 30  # pairs per point that potentials of a lattice propose
_JOIN_SHARE = 0.9  # a pair joins if it exceeds by this share of the most of its row or its column
_PROVABLE = 1e-9  # relative gap; rounding of doubles adds up to about as much over many points
_NEARLY = 1e-4  # relative gap, below which the rounding of POT's potentials matters
_MAX_SWEEPS = 200
_ROUNDING = 1e-14  # of potentials, relative to the highest cost
_MAX_PIVOTS, _OPTIMAL = 10**12, 1  # of POT


@dataclass(frozen=True)
class Certificate:
    """A matching and what proves how good it is.

    Attributes:
        lower_bound, upper_bound: of the distance; the matching attains the upper one.
        x_indices, y_indices: matched points; all others go to the diagonal.
    """

    lower_bound: float
    upper_bound: float
    x_indices: Indices
    y_indices: Indices

    @property
    def gap(self) -> float:
        """Certified relative gap, upper / lower - 1; 0 for two distances of 0."""
        if self.upper_bound <= self.lower_bound:
            return 0.0
        return self.upper_bound / self.lower_bound - 1 if self.lower_bound > 0 else math.inf


def match(x: Points, y: Points, metric: Metric, tolerance: float) -> Certificate:
    """A matching whose distance is within ``tolerance`` of the least.

    Args:
        x, y: (N, 2) and (M, 2) finite float64.
        metric: of the plane.
        tolerance: relative gap of distances; 0 for the optimum, up to the rounding of doubles (1e-9).
    """
    if len(x) == 0 or len(y) == 0:
        distance = float((metric.to_diagonal(x).sum() + metric.to_diagonal(y).sum()) ** (1 / metric.order))
        return Certificate(distance, distance, np.empty(0, np.int64), np.empty(0, np.int64))
    merged = Merged.of(x, metric), Merged.of(y, metric)
    hint = None
    levels = [*_lattices(*merged, metric), merged]
    for coarse, fine in pairwise(levels):
        plan = _solve(*coarse, metric, _LATTICE_TOLERANCE, hint).plan
        hint = Hint.carried(plan, coarse, fine, metric)
    solution = _solve(*merged, metric, max(tolerance, _PROVABLE), hint)
    plan, root = solution.plan, 1 / metric.order
    return Certificate(
        float(solution.lower**root),
        float(solution.upper**root),
        merged[0].draw(np.repeat(plan.rows, plan.mass)),
        merged[1].draw(np.repeat(plan.columns, plan.mass)),
    )


@dataclass(frozen=True)
class Merged:
    """Points with masses: the points of a diagram, or of a lattice that it was snapped to.

    Attributes:
        points: (n, 2), all different.
        mass: (n,) how many points of the diagram each stands for.
        members: (N,) for each point of the diagram, which one stands for it.
        to_diagonal: (n,) cost of sending one there.
        cell: of the lattice; 0 without.
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
        """The diagram on a lattice."""
        return Merged.of(self.points[self.members], metric, cell)

    def draw(self, points: Indices) -> Indices:
        """A different point of the diagram for each time that a merged point is named."""
        by_point = np.argsort(self.members, kind="stable")
        first = np.searchsorted(self.members[by_point], np.arange(len(self)))
        order = np.argsort(points, kind="stable")
        times = np.arange(len(points)) - np.searchsorted(points[order], points[order])
        drawn = np.empty(len(points), np.int64)
        drawn[order] = by_point[first[points[order]] + times]
        return drawn


def _lattices(x: Merged, y: Merged, metric: Metric) -> list[tuple[Merged, Merged]]:
    """Both diagrams on lattices, coarse to fine; none for small diagrams."""
    if len(x) * len(y) <= _FEW_PAIRS:
        return []
    extent = np.ptp(np.concatenate([x.points, y.points]))
    levels = []
    for cell in _LATTICES:
        level = x.on_lattice(extent * cell, metric), y.on_lattice(extent * cell, metric)
        if max(len(on) / len(off) for on, off in zip(level, (x, y), strict=True)) > _MERGES:
            break
        levels.append(level)
    return levels


@dataclass(frozen=True)
class Pairs:
    """Pairs of points and the cost of matching them."""

    rows: Indices
    columns: Indices
    cost: Values

    @classmethod
    def of(cls, rows: Indices, columns: Indices, x: Merged, y: Merged, metric: Metric) -> "Pairs":
        """Pairs by the indices of their points."""
        return cls(rows, columns, metric.costs(x.points[rows], y.points[columns]))

    def joined(self, other: "Pairs") -> "Pairs":
        """Both sets."""
        parts = ((self.rows, other.rows), (self.columns, other.columns), (self.cost, other.cost))
        return Pairs(*map(np.concatenate, parts))


@dataclass(frozen=True)
class Plan:
    """How often which points are matched, and the potentials that this set of pairs gave."""

    rows: Indices
    columns: Indices
    mass: npt.NDArray[np.int64]
    alpha: Values
    beta: Values

    def cost(self, x: Merged, y: Merged, metric: Metric) -> float:
        """Of the matched points, and of sending all others to the diagonal."""
        others = [
            points.mass - np.bincount(matched, self.mass, len(points))
            for points, matched in ((x, self.rows), (y, self.columns))
        ]
        matched = metric.costs(x.points[self.rows], y.points[self.columns])
        return self.mass @ matched + others[0] @ x.to_diagonal + others[1] @ y.to_diagonal


@dataclass(frozen=True)
class Solution:
    """A plan and bounds of the least cost."""

    plan: Plan
    lower: float
    upper: float


def _solve(x: Merged, y: Merged, metric: Metric, tolerance: float, hint: "Hint | None") -> Solution:
    """Solve for a growing set of pairs, until the relative gap of distances is certified."""
    trees = Tree.of(x.points), Tree.of(y.points)
    pairs = _first_pairs(x, y, trees, metric, hint)
    start = None if hint is None else (hint.alpha, hint.beta)
    rounding = _ROUNDING * max(x.to_diagonal.max(initial=0), y.to_diagonal.max(initial=0))
    lower = 0.0
    while True:
        plan = _transport(x, y, pairs, start)
        upper = plan.cost(x, y, metric)
        if upper <= lower * (1 + _NEARLY) ** metric.order:
            plan = max(plan, _sharpened(plan, x, y, pairs, metric), key=lambda p: x.mass @ p.alpha + y.mass @ p.beta)
        start = plan.alpha, plan.beta
        rows, columns, excess = pairs_below_potentials(*trees, *start, metric, rounding)
        most_of_row, most_of_column = _maximum(rows, excess, len(x)), _maximum(columns, excess, len(y))
        excess_mass = min(x.mass @ most_of_row, y.mass @ most_of_column)
        lower = min(max(lower, x.mass @ plan.alpha + y.mass @ plan.beta - excess_mass), upper)
        if upper <= lower * (1 + tolerance) ** metric.order or len(rows) == 0:
            return Solution(plan, lower, upper)
        joining = excess >= _JOIN_SHARE * np.minimum(most_of_row[rows], most_of_column[columns])
        pairs = pairs.joined(Pairs.of(rows[joining], columns[joining], x, y, metric))


@dataclass(frozen=True)
class Hint:
    """Potentials known from a coarser lattice, and by how much they may be off."""

    alpha: Values
    beta: Values
    margin: float

    @classmethod
    def carried(cls, plan: Plan, coarse: tuple[Merged, Merged], fine: tuple[Merged, Merged], metric: Metric) -> "Hint":
        """From the points of a lattice to those of a finer one, by way of the diagram's points."""
        carried = []
        for values, a, b in zip((plan.alpha, plan.beta), coarse, fine, strict=True):
            potentials = np.empty(len(b))
            potentials[b.members] = values[a.members]
            carried.append(np.minimum(potentials, b.to_diagonal))
        return cls(*carried, coarse[0].cell**metric.order)


def _first_pairs(x: Merged, y: Merged, trees: tuple[Tree, Tree], metric: Metric, hint: Hint | None) -> Pairs:
    """All that can pay if they are few; else the nearest ones, and those that a hint proposes."""
    if len(x) * len(y) <= _FEW_PAIRS:
        rows, columns, _ = pairs_below_potentials(*trees, x.to_diagonal, y.to_diagonal, metric)
        return Pairs.of(rows, columns, x, y, metric)
    keys = [_nearest(x.points, y.points, metric), _nearest(y.points, x.points, metric)[::-1]]
    if hint is not None:
        half = hint.margin / 2
        rows, columns, excess = pairs_below_potentials(*trees, hint.alpha + half, hint.beta + half, metric)
        best = _among_best(rows, excess) | _among_best(columns, excess)
        keys.append((rows[best], columns[best]))
    rows, columns = (np.concatenate(side) for side in zip(*keys, strict=True))
    rows, columns = np.divmod(np.unique(rows * len(y) + columns), len(y))
    pairs = Pairs.of(rows, columns, x, y, metric)
    pays = pairs.cost < x.to_diagonal[rows] + y.to_diagonal[columns]
    return Pairs(rows[pays], columns[pays], pairs.cost[pays])


def _nearest(points: Points, others: Points, metric: Metric) -> tuple[Indices, Indices]:
    """The nearest others of every point."""
    count = min(_NEIGHBOURS, len(others))
    _, found = cKDTree(others).query(points, list(range(1, count + 1)), p=metric.norm)
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


def _transport(x: Merged, y: Merged, pairs: Pairs, start: tuple[Values, Values] | None) -> Plan:
    """Optimal transport along the pairs and to the diagonal, which is point n of x and point m of y.

    Returns:
        A plan whose potentials are feasible: no pair of the set, and no way to the diagonal, costs less than they sum to.

    Raises:
        RuntimeError: if the network simplex fails.
    """
    n, m = len(x), len(y)
    result = emd_c_sparse(
        np.r_[x.mass, y.mass.sum()].astype(np.float64),
        np.r_[y.mass, x.mass.sum()].astype(np.float64),
        np.r_[pairs.rows, np.arange(n), np.full(m, n), n].astype(np.uint64),
        np.r_[pairs.columns, np.full(n, m), np.arange(m), m].astype(np.uint64),
        np.r_[pairs.cost, x.to_diagonal, y.to_diagonal, 0.0],
        _MAX_PIVOTS,
        *((None, None) if start is None else (np.r_[potential, 0.0] for potential in start)),
    )
    rows, columns, mass, _, alpha, beta, status = result
    if status != _OPTIMAL:
        raise RuntimeError(f"POT's network simplex gave up on a matching of {n} and {m} points (status {status})")
    beta = np.minimum(beta[:m] + alpha[n], y.to_diagonal)
    alpha = _below(x.to_diagonal, pairs, beta)
    real = (rows < n) & (columns < m)
    return Plan(*(part[real].astype(np.int64) for part in (rows, columns, np.rint(mass))), alpha, beta)


def _sharpened(plan: Plan, x: Merged, y: Merged, pairs: Pairs, metric: Metric) -> Plan:
    """The plan with its potentials computed anew, the highest of x that it allows; POT's carry rounding of 1e-12.

    A matched pair costs just what its potentials sum to, so those of y follow from those of x, which sink until no
    pair of the set costs less. Feasible even before that.
    """
    matched = metric.costs(x.points[plan.rows], y.points[plan.columns])
    left_over = np.bincount(plan.columns, plan.mass, len(y)) < y.mass
    floor = np.where(left_over, y.to_diagonal, -np.inf)
    alpha = x.to_diagonal
    for _ in range(_MAX_SWEEPS):
        beta = floor.copy()
        np.maximum.at(beta, plan.columns, matched - alpha[plan.rows])
        np.minimum(beta, y.to_diagonal, out=beta)
        sunk = _below(x.to_diagonal, pairs, beta)
        if np.array_equal(sunk, alpha):
            break
        alpha = sunk
    return replace(plan, alpha=sunk, beta=beta)


def _below(highest: Values, pairs: Pairs, beta: Values) -> Values:
    """The highest potentials of x that are feasible for the pairs."""
    alpha = highest.copy()
    np.minimum.at(alpha, pairs.rows, pairs.cost - beta[pairs.columns])
    return alpha
