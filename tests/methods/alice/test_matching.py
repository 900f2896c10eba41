import numpy as np
import pytest

from nnunet_topomae.methods.alice.matching import Position, SameVolume, body, bounding_box
from tiny import Volumes

CROP = (4, 4, 4)


class Boxes(Volumes):
    """Bright bodies in the dark; the second is twice as large, and elsewhere."""

    def __init__(self):
        self.volumes = {"small": np.zeros((1, 12, 14, 16), np.float32), "large": np.zeros((1, 30, 30, 30), np.float32)}
        self.volumes["small"][0, 2:10, 3:11, 4:12] = 1
        self.volumes["large"][0, 10:26, 8:24, 6:22] = 1
        self.identifiers = self.partners = list(self.volumes)


def middle(start) -> np.ndarray:
    return np.array(start) + 1.5


@pytest.mark.parametrize("seed", range(5))
def test_position_has_the_same_relative_coordinates_in_both_bodies(seed):
    pair = Position(CROP).pair(Boxes(), "small", np.random.default_rng(seed))
    assert (pair.query[0], pair.key[0]) == ("small", "large")
    relative = (middle(pair.query[1]) - [1.5, 2.5, 3.5]) / 8
    np.testing.assert_allclose(middle(pair.key[1]), np.array([9.5, 7.5, 5.5]) + relative * 16, atol=0.5)


def test_same_volume_takes_one_place_of_one_volume():
    pair = SameVolume(CROP).pair(Boxes(), "large", np.random.default_rng(0))
    assert pair.query == pair.key
    assert pair.query[0] == "large"


def test_one_image_is_refused_where_two_are_needed():
    images = Boxes()
    images.partners = ["small"]
    with pytest.raises(ValueError, match=r"small is the only image.* set pretraining\.matcher to same_volume"):
        Position(CROP).pair(images, "small", np.random.default_rng(0))


def test_the_body_is_what_is_not_darkest():
    image = Boxes().volumes["small"][0]
    np.testing.assert_array_equal(body(image), image == 1)
    np.testing.assert_array_equal(bounding_box(image == 1), [[1.5, 2.5, 3.5], [9.5, 10.5, 11.5]])
    assert body(np.full((2, 2, 2), -1000.0)).all()
