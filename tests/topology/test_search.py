import numpy as np
import pytest

from nnunet_topomae.topology.metric import Metric
from nnunet_topomae.topology.search import Tree, pairs_below_potentials


@pytest.mark.parametrize("sizes", [(1, 1), (3, 50), (8, 9), (257, 100)])
@pytest.mark.parametrize("metric", [Metric(), Metric(1, 2)])
@pytest.mark.parametrize("margin", [0.0, 0.01])
def test_finds_exactly_the_pairs_of_the_full_product(sizes, metric, margin):
    rng = np.random.default_rng(sum(sizes))
    x, y = (rng.random((size, 2)).round(2) for size in sizes)  # rounded: some coincide
    alpha, beta = (rng.normal(0.02, 0.05, size) for size in sizes)
    offsets = np.abs(x[:, None] - y[None])
    excess = alpha[:, None] + beta - metric.cost(offsets[..., 0], offsets[..., 1])
    expected = dict(zip(zip(*np.nonzero(excess > margin), strict=True), excess[excess > margin], strict=True))
    i, j, found = pairs_below_potentials(Tree.of(x), Tree.of(y), alpha, beta, metric, margin)
    assert dict(zip(zip(i, j, strict=True), found, strict=True)) == pytest.approx(expected)
    assert len(i) == len(expected)  # none twice


def test_tree_holds_every_point_once_and_its_boxes_enclose_them():
    points = np.random.default_rng(0).random((50, 2))
    tree = Tree.of(points)
    assert sorted(tree.order[tree.order >= 0]) == list(range(50))
    for low, high in tree.boxes:
        members = np.array_split(tree.order.ravel(), len(low))
        for corner, opposite, indices in zip(low, high, members, strict=True):
            inside = points[indices[indices >= 0]]
            assert (inside >= corner).all()
            assert (inside <= opposite).all()
