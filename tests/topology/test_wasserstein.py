import numpy as np
import pytest
import torch
from gudhi.wasserstein import wasserstein_distance as gudhi_distance
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_topomae.topology import wasserstein_distance

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
    ("x", "message"),
    [(torch.zeros(3), "shape"), (torch.zeros(2, 3), "shape"), (torch.tensor([[torch.inf, 0.0]]), "NaN or inf")],
)
def test_ill_inputs(x, message):
    with pytest.raises(ValueError, match=message):
        wasserstein_distance(x, torch.zeros(0, 2))
