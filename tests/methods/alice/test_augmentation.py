import numpy as np
import pytest
import torch
from scipy.ndimage import center_of_mass

from nnunet_topomae.methods.alice.augmentation import (
    Placement,
    changed_intensities,
    resized_crop,
    turned_crop,
    view_of,
)

SHAPE, SIZE, START = (40, 44, 36), (16, 20, 18), (12, 11, 8)


def blob(at: np.ndarray) -> np.ndarray:
    """A volume that is dark but for a ball around a voxel, which need not be a whole number."""
    places = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    return np.exp(-((places - at) ** 2).sum(axis=-1) / 3).astype(np.float32)[None]


def placements(kind: str, seed: int) -> Placement:
    rng = np.random.default_rng(seed)
    if kind == "resized":
        return resized_crop(START, SIZE, rng)
    return turned_crop(START, SIZE, (1.0, 1.0, 1.0), rng)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["resized", "turned"])
def test_a_voxel_can_be_followed_through_a_view(kind, seed):
    placement = placements(kind, seed)
    in_view = np.array(SIZE) / 2 + [1.5, -2, 1]
    in_volume = placement.to_volume(in_view)
    view = view_of(blob(in_volume), placement)
    assert view.shape == (1, *SIZE)
    np.testing.assert_allclose(center_of_mass(view[0].numpy() ** 2), in_view, atol=0.15)
    np.testing.assert_allclose(placement.from_volume(in_volume), in_view)


def test_an_upright_view_is_the_crop_itself_with_zeros_outside_of_the_volume():
    volume = np.random.default_rng(0).random((2, *SHAPE), dtype=np.float32)
    view = view_of(volume, Placement((-2, 30, 4), SIZE, mirrored=(False, False, True)))
    np.testing.assert_array_equal(view[:, 2:, :14].flip(3), volume[:, :14, 30:, 4:22])
    assert view[:, :2].abs().sum() == view[:, :, 14:].abs().sum() == 0


def test_what_is_resized_lies_inside_the_crop():
    rng = np.random.default_rng(0)
    shown = []
    for _ in range(200):
        placement = resized_crop(START, SIZE, rng)
        corners = placement.to_volume(np.array([[0, 0, 0], np.array(SIZE) - 1]))
        assert (corners >= np.array(START) - 1).all()
        assert (corners <= np.array(START) + SIZE).all()
        shown.append(placement.scale**3)
    assert 0.2 <= min(shown) < 0.25
    assert 0.95 < max(shown) <= 1


def test_turned_crops_keep_their_middle():
    placement = turned_crop(START, SIZE, (1, 1, 1), np.random.default_rng(0))
    np.testing.assert_allclose(placement.middle, np.array(START) + (np.array(SIZE) - 1) / 2)
    assert 1 / 1.4 <= placement.scale <= 1.4
    assert max(map(abs, placement.angles)) <= np.pi / 6


def test_turned_crops_zoom_in_as_far_as_out():
    rng = np.random.default_rng(0)
    scales = [turned_crop(START, SIZE, (1, 1, 1), rng).scale for _ in range(200)]
    assert 1 / 1.4 <= min(scales) < 1 / 1.35
    assert 1.35 < max(scales) <= 1.4
    assert 0.4 < np.mean(np.array(scales) < 1) < 0.6


def test_coarse_slices_are_turned_in_their_plane_only():
    angles = turned_crop(START, SIZE, (1.0, 5.0, 1.0), np.random.default_rng(0)).angles
    assert [angle != 0 for angle in angles] == [False, True, False]


def test_intensities_are_scaled_and_shifted_by_channel():
    """By a factor of 0.75 to 1.25, and by up to a quarter of the deviation, which is sqrt(5.25) here."""
    view = torch.stack([torch.arange(8.0), torch.arange(8.0)]).reshape(2, 2, 2, 2)
    found = []
    for seed in range(200):
        for channel in changed_intensities(view, np.random.default_rng(seed)):
            values = channel.flatten()
            slope, shift = (values[-1] - values[0]).item() / 7, values[0].item()  # the first voxel was 0
            torch.testing.assert_close(values, slope * torch.arange(8.0) + shift)
            found.append((slope, shift / 5.25**0.5))
    slopes, shifts = np.array(found).T
    assert (slopes.min(), slopes.max()) == pytest.approx((0.75, 1.25), abs=0.01)
    assert (shifts.min(), shifts.max()) == pytest.approx((-0.25, 0.25), abs=0.01)
    assert (slopes[::2] != slopes[1::2]).all()
    assert (shifts[::2] != shifts[1::2]).all()
