from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_topomae.methods.crops import Place
from nnunet_topomae.methods.mim import MiM, MiMConfig
from nnunet_topomae.methods.mim.task import plan_levels
from nnunet_topomae.methods.mim.views import Level, NestedViews, image_in, touching, zoomed
from tiny import TINY_CROP, Volumes, make_network

WHOLE = np.array([[0.0, 1.0]] * 3)
GRID = (4, 4, 4)


def make_views(**settings) -> NestedViews:
    config = replace(MiMConfig(projection_width=32), **settings)
    return MiM.build(make_network("unetr"), config, TINY_CROP).views()


def draw(views: NestedViews, images=None, case="large", seed=0) -> dict:
    return views.draw(images or Volumes(), case, np.random.default_rng(seed), mirror=True)


def test_one_crop_becomes_21_volumes():
    item = draw(make_views())
    assert item["crop"].shape == (1, *(2 * size for size in TINY_CROP))
    assert [item[f"mask_{level}"].shape for level in (1, 2, 3)] == [GRID, (4, *GRID), (4, 4, *GRID)]
    assert [item[f"children_{level}"].shape for level in (1, 2)] == [(4,), (4, 4)]


@pytest.mark.parametrize(("levels", "names"), [
    (1, {"crop", "mask_1"}),
    (2, {"crop", "mask_1", "mask_2", "children_1"}),
])  # fmt: skip
def test_fewer_levels(levels, names):
    assert set(draw(make_views(levels=levels))) == names


def test_units_are_cubes_of_space():
    """The slip of the released code is to take runs of tokens in raster order in place of octants."""
    mask = draw(make_views())["mask_1"]
    octants = mask.reshape(2, 2, 2, 2, 2, 2).movedim((1, 3, 5), (3, 4, 5)).flatten(3)
    assert octants.sum(dim=3).unique().tolist() == [0, 8]
    assert octants.any(dim=3).sum() == 4


@pytest.mark.parametrize("children", ["masked", "visible"])
@pytest.mark.parametrize("seed", range(5))
def test_children_come_from_hidden_units_and_patches_only(children, seed):
    item = draw(make_views(children=children), seed=seed)
    is_hidden = children == "masked"
    units = item["mask_1"][::2, ::2, ::2].flatten()
    assert (units[item["children_1"]] == is_hidden).all()
    for mask, own in zip(item["mask_2"], item["children_2"], strict=True):
        assert (mask.flatten()[own] == is_hidden).all()
    assert all(len(set(each)) == 4 for each in (item["children_1"].tolist(), *item["children_2"].tolist()))


@pytest.mark.parametrize("seed", range(10))
def test_children_touch_the_image(seed):
    """The image of 20 x 8 x 12 voxels lies in a crop of 32 x 32 x 64: most of the crop is padding."""
    volume = np.ones((1, 20, 8, 12), np.float32)
    images = Volumes()
    images.volumes["small"] = volume
    item = draw(make_views(), images, "small", seed)
    crop = item["crop"][0].numpy()
    for unit, patches in zip(item["children_1"].tolist(), item["children_2"].tolist(), strict=True):
        z, y, x = (16 * unit_index for unit_index in np.unravel_index(unit, (2, 2, 2)))
        x *= 2
        child = crop[z : z + 16, y : y + 16, x : x + 32]
        assert child.any()
        for patch in patches:
            k, j, i = np.unravel_index(patch, GRID)
            assert child[4 * k : 4 * k + 4, 4 * j : 4 * j + 4, 8 * i : 8 * i + 8].any()


def test_if_few_parts_touch_the_image_some_are_cut_twice():
    thin = np.array([[0.0, 1.0], [0.1, 0.2], [0.1, 0.2]])  # touches 2 of 8 octants
    mask, children = Level((2, 2, 2), num_hidden=4, num_children=4).draw(thin, np.random.default_rng(0))
    assert sorted(children) == [0, 0, 4, 4]
    assert mask.sum() == 4
    assert mask[0, 0, 0]
    assert mask[1, 0, 0]


def test_without_padding_every_set_of_hidden_units_and_every_child_is_as_likely():
    rng = np.random.default_rng(0)
    level = Level((2, 2, 2), num_hidden=4, num_children=1)
    drawn = [level.draw(WHOLE, rng) for _ in range(4000)]
    hidden = np.mean([mask.ravel() for mask, _ in drawn], axis=0)
    children = np.bincount([own[0] for _, own in drawn], minlength=8) / len(drawn)
    np.testing.assert_allclose(hidden, 1 / 2, atol=0.05)  # six standard deviations
    np.testing.assert_allclose(children, 1 / 8, atol=0.032)


def test_the_part_of_a_crop_that_the_image_fills():
    place = Place(start=(-2, 3, 0), crop_shape=(8, 8, 8), volume_shape=(4, 20, 6))
    np.testing.assert_allclose(image_in(place), [[0.25, 0.75], [0, 1], [0, 0.75]])


def test_parts_that_touch_the_image():
    touched = touching(np.array([[0.25, 0.75], [0.0, 1.0], [0.5, 1.0]]), (4, 1, 2))
    assert touched[:, 0].tolist() == [[False, False], [False, True], [False, True], [False, False]]


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12)), min_size=3, max_size=3), st.integers(0, 26))
def test_what_the_image_fills_of_a_part_is_what_it_fills_there(intervals, index):
    """Checked against counting voxels: 12 per axis, 3 parts of 4 each."""
    image = np.array([(start, max(start + 1, end)) for start, end in intervals]) / 12
    voxels = np.zeros((12, 12, 12), bool)
    voxels[tuple(slice(*map(round, each * 12)) for each in image)] = True
    z, y, x = (4 * int(i) for i in np.unravel_index(index, (3, 3, 3)))
    part = voxels[z : z + 4, y : y + 4, x : x + 4]
    touched = touching(image, (3, 3, 3)).flatten()[index]
    assert touched == part.any()
    if touched:
        filled = zoomed(image, index, (3, 3, 3))
        assert np.prod(filled[:, 1] - filled[:, 0]) == pytest.approx(part.mean())


def test_mirroring_is_off_unless_it_is_asked_for():
    ramp = np.arange(64.0, dtype=np.float32).reshape(1, 1, 1, 64) + np.zeros((1, 32, 32, 1), np.float32)
    images = Volumes()
    images.volumes["ramp"] = ramp
    rising = {
        mirror: {bool(draw(views, images, "ramp", seed)["crop"].diff(dim=3).min() > 0) for seed in range(12)}
        for mirror in (False, True)
        for views in [make_views(mirror=mirror)]
    }
    assert rising == {False: {True}, True: {True, False}}


@pytest.mark.parametrize(
    ("grid", "expected"),
    [((6, 6, 6), (2, 2, 2)), ((5, 7, 5), (5, 7, 5)), ((1, 8, 9), (1, 2, 3))],
)
def test_default_units(grid, expected):
    assert plan_levels(MiMConfig(gamma=1), grid)[0].grid == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"units": (4, 2, 2)},
            "units [4, 2, 2] in the plans must divide the 6 x 6 x 6 patches of a crop; use [2, 2, 2], or null",
        ),
        (
            {"gamma": 5},
            "gamma in the plans must be at most 4, as many as there are masked units in a volume of level 1, got 5",
        ),
        (
            {"beta": 131},
            "beta in the plans must be at most 130, as many as there are masked patches in a volume of level "
            "2, got 131",
        ),
        (
            {"beta": 87, "children": "visible"},
            "beta in the plans must be at most 86, as many as there are visible patches in a volume of level 2, got 87",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=r"in the plans must") as error:
        plan_levels(replace(MiMConfig(), **settings), (6, 6, 6))
    assert str(error.value) == f"pretraining.{message}"
