import cripser
import numpy as np
import pytest
import surface_distance
from scipy.ndimage import gaussian_filter

from nnunet_topomae.studies.measures import Measures, betti_numbers, measure, measure_case

EMPTY = np.zeros((6, 7, 8), bool)


def cube(*corner, size=3):
    mask = EMPTY.copy()
    mask[tuple(slice(start, start + size) for start in corner)] = True
    return mask


def without(mask, *voxel):
    mask = mask.copy()
    mask[voxel] = False
    return mask


def blobs(seed, shape=(18, 22, 20)):
    """Two smooth random structures that overlap."""
    rng = np.random.default_rng(seed)
    first = gaussian_filter(rng.normal(size=shape), 2)
    second = first + 0.5 * gaussian_filter(rng.normal(size=shape), 2)
    return first > 0.8 * first.std(), second > 0.8 * second.std()


@pytest.mark.parametrize(
    ("predicted", "labelled", "expected"),
    [
        (cube(1, 1, 1), cube(1, 1, 1), Measures(1, 0, 1, 0, 0, 0)),
        (EMPTY, EMPTY, Measures(1, None, 1, 0, 0, 0)),
        (EMPTY, cube(1, 1, 1), Measures(0, None, 0, 1, 0, 0)),
        (cube(1, 1, 1), EMPTY, Measures(0, None, 0, 1, 0, 0)),
        (cube(0, 0, 0, size=1), cube(0, 0, 3, size=1), Measures(0, 1.5 * 3, 0, 0, 0, 0)),  # 3 voxels of 1.5 mm apart
        (cube(0, 0, 0, size=1), cube(2, 0, 0, size=1), Measures(0, 3 * 2, 0, 0, 0, 0)),  # 2 voxels of 3 mm apart
        (cube(0, 0, 0, size=1) | cube(3, 3, 3), cube(3, 3, 3), Measures(54 / 55, 0, None, 1, 0, 0)),
        (without(cube(1, 1, 1), 2, 2, 2), cube(1, 1, 1), Measures(52 / 53, 0, None, 0, 0, 1)),
    ],
    ids=[
        "equal", "both empty", "nothing predicted", "nothing labelled", "apart along x", "apart along z", "speck",
        "void",
    ],
)  # fmt: skip
def test_measures_worked_out_by_hand(predicted, labelled, expected):
    found = measure(predicted, labelled, spacing=(3.0, 2.0, 1.5), tolerance=1.0)
    for name, value in vars(expected).items():
        if name in ("hd95", "nsd") and expected.nsd is None:
            continue  # shares of the surface; compared with surface-distance below
        assert getattr(found, name) == (value if value is None else pytest.approx(value, abs=1e-6)), name


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.5, 1.0)])
@pytest.mark.parametrize("seed", range(4))
def test_surface_measures_are_those_of_deepmind(seed, spacing):
    predicted, labelled = blobs(seed)
    found = measure(predicted, labelled, spacing, tolerance=1.2)
    distances = surface_distance.compute_surface_distances(labelled, predicted, spacing)
    assert found.dice == pytest.approx(surface_distance.compute_dice_coefficient(labelled, predicted), abs=1e-6)
    assert found.nsd == pytest.approx(surface_distance.compute_surface_dice_at_tolerance(distances, 1.2), abs=1e-5)
    theirs = surface_distance.compute_robust_hausdorff(distances, 95)  # between surface elements, not voxels
    assert abs(found.hd95 - theirs) < np.linalg.norm(spacing)


def test_measures_do_not_depend_on_what_is_around():
    predicted, labelled = blobs(0)
    around = [np.pad(mask, ((3, 9), (2, 0), (0, 5))) for mask in (predicted, labelled)]
    assert measure(*around, (1, 1, 2), 1.0) == measure(predicted, labelled, (1, 1, 2), 1.0)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (EMPTY, (0, 0, 0)),
        (cube(1, 1, 1), (1, 0, 0)),
        (without(cube(1, 1, 1), 2, 2, 2), (1, 0, 1)),
        (cube(0, 0, 0, size=2) | cube(2, 2, 2, size=2), (1, 0, 0)),  # they touch at a corner
        (cube(0, 0, 0, size=2) | cube(3, 3, 3, size=2), (2, 0, 0)),
        (without(without(without(cube(0, 0, 0), 0, 1, 1), 1, 1, 1), 2, 1, 1), (1, 1, 0)),  # a tunnel
    ],
    ids=["nothing", "ball", "hollow ball", "touching at a corner", "two", "ring"],
)
def test_betti_numbers_of_known_shapes(mask, expected):
    assert betti_numbers(mask) == expected


@pytest.mark.parametrize("seed", range(5))
def test_betti_numbers_are_those_of_cubical_ripser(seed):
    """Features of the T-construction, in which voxels are cubes: born at the value of the structure, 0."""
    mask = np.random.default_rng(seed).random((7, 8, 9)) < 0.3
    table = cripser.computePH_T(np.where(mask, 0.0, 1.0), maxdim=2)
    alive = [
        int(((table[:, 0] == dimension) & (table[:, 1] == 0) & (table[:, 2] != 0)).sum()) for dimension in range(3)
    ]
    assert betti_numbers(mask) == tuple(alive)


def test_regions_and_ignored_voxels():
    labelled = np.zeros((4, 4, 4), int)
    labelled[0], labelled[1], labelled[3] = 1, 2, 9
    predicted = np.where(labelled == 9, 2, labelled)
    found = measure_case(predicted, labelled, (1, 1, 1), {"both": [1, 2], "second": [2]}, 1.0, ignored=9)
    assert {name: of_it.dice for name, of_it in found.items()} == {"both": 1, "second": 1}
    counted = measure_case(predicted, labelled, (1, 1, 1), {"second": [2]}, 1.0)
    assert counted["second"].dice == pytest.approx(2 * 16 / (32 + 16))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"the prediction has \(2, 2, 2\) voxels, the label \(2, 2, 3\)"):
        measure_case(np.zeros((2, 2, 2), int), np.zeros((2, 2, 3), int), (1, 1, 1), {"a": [1]}, 1.0)
