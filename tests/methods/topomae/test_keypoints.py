import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_topomae.methods.crops import mirrored_start
from nnunet_topomae.methods.topomae.keypoints import centred, crop_keypoints, keypoint_error, scaled_interval

sizes = st.tuples(*[st.integers(1, 60)] * 3)


@pytest.mark.parametrize(
    ("start", "shape", "volume", "low", "high"),
    [
        ((0, 0, 0), (10, 20, 30), (10, 20, 30), (-1, -1, -1), (1, 1, 1)),  # the whole volume
        ((5, 0, 15), (5, 10, 15), (10, 20, 30), (0, -1, 0), (1, 0, 1)),
        ((2, 5, 3), (2, 5, 6), (8, 20, 12), (-0.5, -0.5, -0.5), (0, 0, 0.5)),
        ((-2, 0, 0), (12, 4, 4), (8, 8, 8), (-1, -1, -1), (1, 0, 0)),  # padded by 2 on both sides of z
        ((-4, 0, 0), (8, 8, 8), (8, 8, 8), (-1, -1, -1), (1 / 3, 1, 1)),  # interval [-4, 8) of 12
    ],
)
def test_corners_and_centre_by_hand(start, shape, volume, low, high):
    points = crop_keypoints(start, shape, volume)
    assert points.shape == (9, 3)
    assert points.dtype == np.float32
    expected = [(z, y, x) for z in (low[0], high[0]) for y in (low[1], high[1]) for x in (low[2], high[2])]
    np.testing.assert_allclose(points[:8], expected, atol=1e-6)
    np.testing.assert_allclose(points[8], (np.array(low) + high) / 2, atol=1e-6)


@given(start=st.tuples(*[st.integers(-40, 60)] * 3), shape=sizes, volume=sizes)
def test_every_point_is_within_reach_of_tanh(start, shape, volume):
    assert np.abs(crop_keypoints(start, shape, volume)).max() <= 1 + 1e-6


@given(start=st.tuples(*[st.integers(-40, 60)] * 3), shape=sizes, volume=sizes, axis=st.integers(0, 2))
def test_mirroring_negates_one_coordinate_and_twice_is_nothing(start, shape, volume, axis):
    mirrored = mirrored_start(start, shape, volume, [axis])
    points, flipped = crop_keypoints(start, shape, volume), crop_keypoints(mirrored, shape, volume)
    np.testing.assert_allclose(flipped[8, axis], -points[8, axis], atol=1e-5)
    np.testing.assert_allclose(np.sort(flipped[:, axis]), np.sort(-points[:, axis]), atol=1e-5)
    others = [a for a in range(3) if a != axis]
    np.testing.assert_allclose(flipped[:, others], points[:, others])
    assert mirrored_start(mirrored, shape, volume, [axis]) == start


def test_interval_turns_errors_into_voxels():
    low, length = scaled_interval((-2, 3, 0), (12, 4, 4), (8, 8, 8))
    assert low.tolist() == [-2, 0, 0]
    assert length.tolist() == [12, 8, 8]


def test_empty_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes must be positive"):
        crop_keypoints((0, 0, 0), (0, 4, 4), (8, 8, 8))


def test_a_crop_of_the_same_size_in_the_middle():
    shapes = (4, 6, 2), (10, 12, 2)
    middle = centred(crop_keypoints((5, 0, 0), *shapes))
    assert middle == pytest.approx(crop_keypoints((3, 3, 0), *shapes), abs=1e-6)


def test_keypoint_error_in_mm():
    actual = np.zeros((9, 3), np.float32)
    predicted = actual + np.array([0.3, 0.4, 0], np.float32)
    assert keypoint_error(predicted, actual, (20, 20, 80)) == pytest.approx(5.0)  # 3 mm and 4 mm
    assert keypoint_error(predicted, actual, (20, 10, 80)) == pytest.approx(math.hypot(3, 2))
