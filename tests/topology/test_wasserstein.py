import subprocess
import sys

import numpy as np
import pytest
import torch
from gudhi.wasserstein import wasserstein_distance as gudhi_distance
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_topomae.topology import wasserstein_distance
from nnunet_topomae.transport import matching

coordinate = st.floats(0, 1, width=32)


@st.composite
def diagrams(draw, max_size=12):
    points = draw(st.lists(st.tuples(coordinate, coordinate), max_size=max_size))
    return torch.tensor([(max(p), min(p)) for p in points], dtype=torch.float64).reshape(-1, 2)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([], [], 0.0),
        ([(1, 0)], [], 0.5),  # to the diagonal: half the persistence
        ([(1, 0)], [(0.9, 0.2)], 0.2),  # L-infinity, not Euclidean
        ([(1, 0)], [(1, 0), (0.6, 0.4)], 0.1),
        ([(1, 0.8)], [(0.2, 0)], np.sqrt(0.1**2 + 0.1**2)),  # dearer to match than to send both away
        ([(1, 0), (0.8, 0)], [(0.8, 0), (1, 0)], 0.0),
        ([(0.5, 0.5)], [], 0.0),  # on the diagonal
        ([(1, 0)] * 3, [(0.9, 0)] * 3, np.sqrt(3 * 0.01)),  # duplicates
    ],
)
def test_by_hand(x, y, expected):
    x, y = (torch.tensor(p, dtype=torch.float64).reshape(-1, 2) for p in (x, y))
    assert wasserstein_distance(x, y).item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@settings(max_examples=200, deadline=None)
@given(diagrams(), diagrams())
def test_agrees_with_gudhi(x, y):
    expected = gudhi_distance(x.numpy()[:, ::-1], y.numpy()[:, ::-1], order=2, internal_p=np.inf)
    assert wasserstein_distance(x, y).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_agrees_with_gudhi_on_large_diagrams():
    rng = np.random.default_rng(0)
    x, y = (np.sort(rng.random((n, 2)), axis=1)[:, ::-1].copy() for n in (700, 900))
    expected = gudhi_distance(x[:, ::-1], y[:, ::-1], order=2, internal_p=np.inf)
    value = wasserstein_distance(torch.tensor(x), torch.tensor(y)).item()
    assert value == pytest.approx(expected, rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(diagrams(), diagrams(), diagrams(), st.randoms(use_true_random=False))
def test_is_a_distance(x, y, z, random):
    xy, yz, xz = wasserstein_distance(x, y), wasserstein_distance(y, z), wasserstein_distance(x, z)
    assert wasserstein_distance(y, x).item() == pytest.approx(xy.item(), abs=1e-9)
    assert xz <= xy + yz + 1e-9
    order = list(range(len(x)))
    random.shuffle(order)
    assert wasserstein_distance(x[order], y).item() == pytest.approx(xy.item(), abs=1e-9)


def test_gradient_by_finite_differences():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(n, 2, generator=generator, dtype=torch.float64).sort(descending=True).values for n in (9, 7))
    assert torch.autograd.gradcheck(wasserstein_distance, (x.requires_grad_(), y.requires_grad_()), eps=1e-7)


def test_equal_diagrams_have_no_gradient_rather_than_nan():
    x = torch.rand(5, 2, dtype=torch.float64).sort(descending=True).values.requires_grad_()
    distance = wasserstein_distance(x, x.detach().clone())
    distance.backward()
    assert distance.item() == 0
    assert x.grad.abs().sum().item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_type(dtype):
    assert wasserstein_distance(torch.tensor([[1.0, 0.0]], dtype=dtype), torch.zeros(0, 2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("points", "dtype", "expected"),
    [
        ((600.0, 0.0), torch.float16, 300),  # whose squares half precision cannot hold
        ((3e30, 1e30), torch.float32, 1e30),
        ((3e-30, 1e-30), torch.float32, 1e-30),
    ],
)
def test_values_whose_powers_leave_the_range_of_their_type(points, dtype, expected):
    x = torch.tensor([points], dtype=dtype, requires_grad=True)
    distance = wasserstein_distance(x, torch.zeros(0, 2, dtype=dtype))
    distance.backward()
    assert distance.item() == pytest.approx(expected, rel=1e-3)
    assert x.grad.tolist() == [[pytest.approx(0.5), pytest.approx(-0.5)]]


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e-5, 1e4, 1e300])
def test_scales_with_the_values(scale):
    x, y = _random_pair(0, 600, 700)
    expected = wasserstein_distance(x, y).item()
    distance, certificate = wasserstein_distance(x * scale, y * scale, return_certificate=True)
    assert distance.item() / scale == pytest.approx(expected, rel=1e-9)
    assert certificate.gap < 1e-9


@pytest.mark.parametrize("size", [1e4, 1e6, 1e8])
def test_one_outlier_in_both_does_not_spoil_the_rest(size):
    x, y = _random_pair(1, 600, 700)
    outlier = torch.tensor([[size, -1.0]], dtype=torch.float64)
    exact = gudhi_distance(x.numpy()[:, ::-1], y.numpy()[:, ::-1], order=2, internal_p=np.inf)
    distance, certificate = wasserstein_distance(
        torch.cat([x, outlier]), torch.cat([y, outlier]), return_certificate=True
    )
    assert distance.item() == pytest.approx(exact, rel=1e-9)
    assert certificate.gap < 1e-8


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), "shape"),
        (torch.zeros(2, 3), "shape"),
        (torch.tensor([[torch.inf, 0.0]]), "NaN or inf"),
        (torch.zeros(2, 2, dtype=int), "floating point numbers, got torch.int64"),
        (np.zeros((2, 2)), "floating point numbers, got ndarray"),
    ],
)
def test_ill_inputs(x, message):
    with pytest.raises(ValueError, match=message):
        wasserstein_distance(x, torch.zeros(0, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "2"}, "order must be a finite number of at least 1, got '2'"),
        ({"order": 0.5}, "order must be"),
        ({"ground": "l2"}, "ground must be \"inf\" or a number of at least 1, got 'l2'"),
        ({"ground": 0}, "ground must be"),
        ({"tolerance": -0.1}, "tolerance must be at least 0 and below 1, got -0.1"),
    ],
)
def test_ill_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        wasserstein_distance(torch.zeros(1, 2), torch.zeros(1, 2), **arguments)


@pytest.mark.parametrize(("order", "ground"), [(1, "inf"), (2, 2), (3, 1), (1.5, 2)])
def test_other_orders_and_norms_agree_with_gudhi(order, ground):
    rng = np.random.default_rng(0)
    x, y = (np.sort(rng.random((n, 2)), axis=1)[:, ::-1].copy() for n in (30, 45))
    expected = gudhi_distance(x[:, ::-1], y[:, ::-1], order=order, internal_p=float(ground))
    value = wasserstein_distance(torch.tensor(x), torch.tensor(y), order=order, ground=ground).item()
    assert value == pytest.approx(expected, rel=1e-9)


def _random_pair(seed, n=150, m=220):
    rng = np.random.default_rng(seed)
    births = [rng.random(k) for k in (n, m)]
    x, y = (np.stack([b, b - rng.exponential(0.05, len(b))], axis=1) for b in births)
    y[: n // 2] = x[: n // 2]  # as where a reconstruction copies visible patches
    return torch.tensor(x), torch.tensor(y)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.2])
@pytest.mark.parametrize(("few_pairs", "all_at_once"), [(0, 0), (10**9, 0), (10**9, 10**9)])
def test_growing_set_of_pairs_reaches_the_optimum_and_its_bounds_hold(
    monkeypatch, seed, tolerance, few_pairs, all_at_once
):
    x, y = _random_pair(seed)
    exact = gudhi_distance(x.numpy()[:, ::-1], y.numpy()[:, ::-1], order=2, internal_p=np.inf)
    monkeypatch.setattr(matching, "_FEW_PAIRS", few_pairs)
    monkeypatch.setattr(matching, "_ALL_AT_ONCE", all_at_once)
    monkeypatch.setattr(matching, "_NEIGHBOURS", 1)
    value, certificate = wasserstein_distance(x, y, tolerance=tolerance, return_certificate=True)
    assert certificate.lower_bound <= exact * (1 + 1e-9)
    assert certificate.upper_bound >= exact * (1 - 1e-9)
    assert certificate.upper_bound == pytest.approx(value.item(), rel=1e-9)
    assert certificate.gap <= tolerance + 1e-9
    if tolerance == 0:
        assert value.item() == pytest.approx(exact, rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(diagrams(), diagrams())
def test_certificate_of_the_optimum_is_tight_and_its_matching_costs_the_distance(x, y):
    value, certificate = wasserstein_distance(x, y, return_certificate=True)
    assert certificate.lower_bound == pytest.approx(certificate.upper_bound, rel=1e-7, abs=1e-7)
    i, j = certificate.x_indices, certificate.y_indices
    assert len(set(i)) == len(i)
    assert len(set(j)) == len(j)
    moved = np.abs(x.numpy()[i] - y.numpy()[j]).max(axis=1, initial=0) ** 2
    others = sum(
        (np.delete(d.numpy(), used, axis=0) @ [0.5, -0.5]) @ (np.delete(d.numpy(), used, axis=0) @ [0.5, -0.5])
        for d, used in ((x, i), (y, j))
    )
    assert moved.sum() + others == pytest.approx(value.item() ** 2, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0.5}, "order must be a finite number of at least 1"),
        ({"order": np.inf}, "order must be"),
        ({"ground": 0.5}, "ground must be"),
        ({"tolerance": -0.1}, "tolerance must be at least 0 and below 1"),
        ({"tolerance": 1.0}, "tolerance must be"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        wasserstein_distance(torch.zeros(0, 2), torch.zeros(0, 2), **options)


few_values = st.integers(0, 8).map(lambda k: k / 8)


@settings(max_examples=150, deadline=None)
@given(*[st.lists(st.tuples(few_values, few_values), max_size=15)] * 2)
def test_duplicates_and_points_on_the_diagonal_agree_with_gudhi(x, y):
    x, y = (np.array([(max(p), min(p)) for p in points], dtype=float).reshape(-1, 2) for points in (x, y))
    expected = gudhi_distance(x[:, ::-1], y[:, ::-1], order=2, internal_p=np.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_FEW_PAIRS", 0)
        value, certificate = wasserstein_distance(torch.tensor(x), torch.tensor(y), return_certificate=True)
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    for indices in (certificate.x_indices, certificate.y_indices):
        assert len(set(indices)) == len(indices)


@pytest.mark.parametrize("digits", [2, 15])
def test_lattices_lead_to_the_optimum(monkeypatch, digits):
    x, y = (d.numpy().round(digits) for d in _random_pair(3, 600, 800))
    monkeypatch.setattr(matching, "_MERGES", 1.0)
    monkeypatch.setattr(matching, "_FEW_PAIRS", 0)
    metric = matching.Metric()
    assert len(matching.Problem(*(matching.Merged.of(d, metric) for d in (x, y)), metric).on_lattices()) == 4
    value, certificate = wasserstein_distance(torch.tensor(x), torch.tensor(y), return_certificate=True)
    expected = gudhi_distance(x[:, ::-1], y[:, ::-1], order=2, internal_p=np.inf)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    assert certificate.gap <= 1e-9


def test_tiny_distances_of_large_diagrams():
    x, _ = _random_pair(0, 1000, 1000)
    shift = torch.tensor([1e-9, 0.0], dtype=torch.float64)
    assert wasserstein_distance(x, x + shift).item() == pytest.approx(1000**0.5 * 1e-9, rel=1e-6)


def test_failure_of_the_solver_is_an_error(monkeypatch):
    monkeypatch.setattr(matching, "_MAX_PIVOTS", 1)
    with pytest.raises(RuntimeError, match="network simplex gave up on a matching of 150 and 220 points"):
        wasserstein_distance(*_random_pair(0))


_HUGE = """
import resource
import numpy as np, torch
from nnunet_topomae.topology import wasserstein_distance
rng = np.random.default_rng(0)
births = rng.random((2, 100_000))
x, y = (torch.tensor(np.stack([b, b - rng.exponential(0.05, len(b))], axis=1)) for b in births)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, certificate = wasserstein_distance(x, y, tolerance=0.01, return_certificate=True)
print(certificate.gap, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.slow
def test_hundred_thousand_points_within_four_gib():
    output = subprocess.run([sys.executable, "-c", _HUGE], capture_output=True, text=True, check=True).stdout
    gap, gib = map(float, output.split())
    assert gap <= 0.01
    assert gib < 4
