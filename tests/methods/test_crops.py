import numpy as np

from nnunet_topomae.methods.crops import random_start


def test_every_place_inside_the_volume_is_drawn():
    rng = np.random.default_rng(0)
    starts = {random_start((6, 4, 3), (4, 4, 8), rng) for _ in range(100)}
    assert starts == {(0, 0, -2), (1, 0, -2), (2, 0, -2)}
