import gudhi
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunet_topomae.topology import persistence_diagrams


def _distance_from_centre(n=11):
    z, y, x = np.meshgrid(*[np.arange(n) - n // 2] * 3, indexing="ij")
    return z, y, x, np.sqrt(z**2 + y**2 + x**2)


def ball():
    return (_distance_from_centre()[3] <= 3).astype(float)


def hollow_ball():
    radius = _distance_from_centre()[3]
    return ((radius <= 4) & (radius >= 2)).astype(float)


def torus():
    z, y, x, _ = _distance_from_centre(13)
    return ((np.sqrt(y**2 + x**2) - 4) ** 2 + z**2 <= 1.5**2).astype(float)


def two_balls():
    volume = np.zeros((5, 5, 11))
    volume[1:4, 1:4, 1:4] = 1.0
    volume[1:4, 1:4, 7:10] = 0.8
    return volume


@pytest.mark.parametrize(
    ("volume", "dimension", "expected"),
    [
        (ball(), 0, [(1, 0)]),  # the essential component, closed at the minimum
        (ball(), 1, []),
        (ball(), 2, []),
        (hollow_ball(), 0, [(1, 0)]),
        (hollow_ball(), 1, []),
        (hollow_ball(), 2, [(1, 0)]),  # one void, born with the shell, filled at the background
        (torus(), 0, [(1, 0)]),
        (torus(), 1, [(1, 0)]),
        (torus(), 2, []),
        (two_balls(), 0, [(0.8, 0), (1, 0)]),
        (np.full((4, 4, 4), 0.3), 0, []),
        (np.full((4, 4, 4), 0.3), 1, []),
    ],
)
def test_diagrams_of_known_shapes(volume, dimension, expected):
    (diagram,) = persistence_diagrams(torch.tensor(volume), (dimension,))
    assert sorted(map(tuple, diagram.tolist())) == sorted(expected)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float64, (4, 5, 3), elements=st.floats(-1, 1, width=16)))
def test_agrees_with_gudhi(volume):
    complex_ = gudhi.CubicalComplex(vertices=-volume)
    complex_.compute_persistence(homology_coeff_field=2, min_persistence=0)
    for dimension, diagram in enumerate(persistence_diagrams(torch.tensor(volume))):
        expected = -complex_.persistence_intervals_in_dimension(dimension).reshape(-1, 2)
        expected[np.isinf(expected)] = volume.min()
        expected = expected[expected[:, 0] != expected[:, 1]]
        assert sorted(map(tuple, diagram.tolist())) == sorted(map(tuple, expected.tolist()))


def test_gradients_reach_exactly_the_voxels_of_birth_and_death():
    two_peaks = torch.tensor([[[0.9, 0.2, 0.6, 0.4, 0.1]]], dtype=torch.float64)  # the lower one dies at 0.2
    volume = two_peaks.requires_grad_()
    (diagram,) = persistence_diagrams(volume, (0,))
    assert sorted(map(tuple, diagram.tolist())) == [(0.6, 0.2), (0.9, 0.1)]
    (diagram[:, 0] - diagram[:, 1]).sum().backward()
    assert volume.grad.flatten().tolist() == [1, -1, 1, 0, -1]


@pytest.mark.parametrize(
    ("volume", "dimensions", "message"),
    [
        (torch.full((3, 3, 3), torch.nan), (0,), "NaN or inf"),
        (torch.full((3, 3, 3), torch.inf), (0,), "NaN or inf"),
        (torch.zeros(3, 3), (0,), "shape"),
        (torch.zeros(3, 3, 3, dtype=torch.int32), (0,), "floating point"),
        (torch.zeros(3, 3, 3), (3,), "dimensions must be chosen"),
        (torch.zeros(3, 3, 3), (), "dimensions must be chosen"),
    ],
)
def test_ill_inputs(volume, dimensions, message):
    with pytest.raises(ValueError, match=message):
        persistence_diagrams(volume, dimensions)
