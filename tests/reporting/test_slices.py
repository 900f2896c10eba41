from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from nnunet_topomae.reporting.figures import Geometry, plane_names
from nnunet_topomae.reporting.slices import slices

SPACING = (2.0, 1.0, 1.0)
SHAPE = (20, 60, 60)
COLORS = {1: "#00c8ff", 2: "#ff8c00"}
OUTLINES = {1: (0, 200, 255), 2: (255, 140, 0)}
TINTS = {value: tuple(0.4 * np.array(color)) for value, color in OUTLINES.items()}  # on black


def _cube(*corner, size=(6, 12, 12)):
    volume = np.zeros(SHAPE, int)
    volume[tuple(slice(start, start + length) for start, length in zip(corner, size, strict=True))] = 1
    return volume


def _drawn(label, prediction, image=None):
    image = np.zeros(SHAPE, np.float32) if image is None else image
    found = slices(image, label, prediction, Geometry(SPACING, plane_names()), COLORS)
    return {plane: np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int) for plane, png in found.items()}


def _places(picture, color) -> np.ndarray:
    """Rows and columns (N, 2) of the pixels of a colour, as shares of the picture."""
    close = np.abs(picture - np.array(color)).sum(axis=-1) < 60
    return np.argwhere(close) / picture.shape[:2]


def test_three_planes_are_as_wide_as_they_are_in_mm():
    """15 mm around the cube, as far as there are voxels: all 40 mm along z, 12 + 2 * 15 mm along y and x."""
    drawn = _drawn(_cube(7, 24, 24), _cube(7, 24, 24))
    assert list(drawn) == ["axial", "coronal", "sagittal"]
    ratios = {plane: picture.shape[0] / picture.shape[1] for plane, picture in drawn.items()}
    assert ratios == {
        "axial": pytest.approx(1, abs=0.02),
        "coronal": pytest.approx(40 / 42, abs=0.02),
        "sagittal": pytest.approx(40 / 42, abs=0.02),
    }


@pytest.mark.parametrize("value", COLORS)
def test_label_and_prediction_are_drawn_where_they_are_in_the_colour_of_their_structure(value):
    """In the axial plane the cut begins 15 voxels before the label and ends 15 after what is predicted elsewhere."""
    other = 3 - value
    axial = _drawn(value * _cube(7, 20, 20), other * _cube(7, 20, 32))["axial"]
    rows, columns = 12 + 2 * 15, 24 + 2 * 15
    for color, begin in ((TINTS[value], 15), (OUTLINES[other], 27)):
        places = _places(axial, color)
        low, high = places.min(axis=0), places.max(axis=0)
        assert low == pytest.approx((15 / rows, begin / columns), abs=0.02)
        assert high == pytest.approx((27 / rows, (begin + 12) / columns), abs=0.02)
    assert len(_places(axial, OUTLINES[value])) == 0


def test_without_a_label_the_slice_is_that_with_most_predicted_voxels():
    predicted = _cube(3, 24, 24)
    predicted[12, 24:30, 24:36] = 1  # half of the cube's section
    axial = _drawn(np.zeros(SHAPE, int), predicted)["axial"]
    low, high = (edge(_places(axial, OUTLINES[1]), axis=0) for edge in (np.min, np.max))
    assert (high - low) * 42 == pytest.approx((12, 12), abs=1)


def test_the_slice_is_that_with_most_labelled_voxels():
    """The image is bright in the only slice with the larger part of the structure."""
    label = _cube(2, 24, 24)
    label[15, 10:50, 10:50] = 1
    image = np.zeros(SHAPE, np.float32)
    image[15, 30:, :] = 100
    axial = _drawn(label, np.zeros(SHAPE, int), image)["axial"]
    middle = axial.shape[0] // 2
    assert axial[middle + 20 :, :10].mean() > 200  # the lower half, as rows run from the front to the back
    assert axial[: middle - 20, :10].mean() < 50


def test_nothing_labelled_or_predicted_shows_everything():
    drawn = _drawn(np.zeros(SHAPE, int), np.zeros(SHAPE, int), np.random.rand(*SHAPE).astype(np.float32))
    for picture in drawn.values():
        assert all(len(_places(picture, color)) == 0 for color in OUTLINES.values())
        assert picture.std() > 10


def test_a_structure_at_the_border_has_a_closed_outline():
    axial = _drawn(np.zeros(SHAPE, int), _cube(0, 0, 0))["axial"]
    places = _places(axial, OUTLINES[1])
    assert places.min(axis=0) == pytest.approx((0, 0), abs=0.02)
