import numpy as np
import pytest

from nnunet_topomae.transport.metric import Metric
from nnunet_topomae.transport.search import Tree, pairs_below_potentials


@pytest.mark.parametrize("sizes", [(1, 1), (3, 50), (8, 9), (257, 100)])
@pytest.mark.parametrize("metric", [Metric(), Metric(1, 2)])
@pytest.mark.parametrize("mean", [0.01, 0.02])
def test_finds_exactly_the_pairs_of_the_full_product(sizes, metric, mean):
    rng = np.random.default_rng(sum(sizes))
    x, y = (rng.random((size, 2)).round(2) for size in sizes)  # rounded: some coincide
    alpha, beta = (rng.normal(mean, 0.05, size) for size in sizes)
    offsets = np.abs(x[:, None] - y[None])
    excess = alpha[:, None] + beta - metric.cost(offsets[..., 0], offsets[..., 1])
    expected = dict(zip(zip(*np.nonzero(excess > 0), strict=True), excess[excess > 0], strict=True))
    i, j, found = pairs_below_potentials(Tree.of(x), Tree.of(y), alpha, beta, metric)
    assert dict(zip(zip(i, j, strict=True), found, strict=True)) == pytest.approx(expected)
    assert len(i) == len(expected)  # none twice


@pytest.mark.parametrize("leaves_at_once", [1, 7, 10_000])
def test_pairs_of_small_excess_may_be_left_out(monkeypatch, leaves_at_once):
    monkeypatch.setattr("nnunet_topomae.transport.search._LEAVES_AT_ONCE", leaves_at_once)
    rng = np.random.default_rng(0)
    x, y, alpha, beta = rng.random((300, 2)), rng.random((200, 2)), rng.random(300), rng.random(200)
    offsets = np.abs(x[:, None] - y[None])
    excess = np.maximum(alpha[:, None] + beta - Metric().cost(offsets[..., 0], offsets[..., 1]), 0)
    of_row, of_column = excess.max(axis=1), excess.max(axis=0)
    must_stay = (excess > 0) & (excess >= 0.9 * np.minimum(of_row[:, None], of_column))
    i, j, found = pairs_below_potentials(Tree.of(x), Tree.of(y), alpha, beta, Metric(), share=0.9)
    assert found == pytest.approx(excess[i, j])
    stayed = np.zeros_like(must_stay)
    stayed[i, j] = True
    assert (stayed | ~must_stay).all()
    assert len(i) < np.count_nonzero(excess) / 2
    largest = np.where(stayed, excess, 0)
    assert largest.max(axis=1) == pytest.approx(of_row)
    assert largest.max(axis=0) == pytest.approx(of_column)


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
