"""What every pretext task must do; a new method joins METHODS in tests/tiny.py."""

from math import prod

import pytest
import torch

from tiny import METHODS, TINY_CROP, make_crops, make_masks, make_method, make_network

KEYPOINTS = torch.zeros(2, 9, 3)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def task(method):
    return make_method(method)


def _train(task, steps):
    """Losses of a few steps as the trainer makes them, on one batch."""
    crop, given = make_crops(), make_masks(task)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    totals = []
    for step in range(steps):
        mask = task.choose_mask(crop, given, step / steps)
        total = task.loss_terms(task(crop, mask).to_float32(), crop, mask, KEYPOINTS)["total"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        task.after_step(step / steps)
        totals.append(total.item())
    return totals


def test_loss_falls_on_a_tiny_set(task):
    totals = _train(task, 25)
    assert sum(totals[-3:]) < 0.9 * sum(totals[:3])


def test_a_fixed_seed_gives_the_same_run(method):
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        task = make_method(method)
        runs.append((_train(task, 4), task.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[1][1][name], tensor) for name, tensor in runs[0][1].items())


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_masks_hide_exactly_the_asked_share(task, progress):
    mask = task.choose_mask(make_crops(3), make_masks(task, 3), progress)
    assert mask.dtype == torch.bool
    assert mask.shape == (3, *task.mask_grid)
    assert mask.flatten(1).sum(dim=1).tolist() == [round(task.config.mask_ratio * prod(task.mask_grid))] * 3


def test_hidden_voxels_do_not_reach_the_network(task):
    task.eval()
    crop, mask = make_crops(), make_masks(task)
    hidden = mask
    for axis, size in enumerate(task.patch_size, start=1):
        hidden = hidden.repeat_interleave(size, dim=axis)
    changed = torch.where(hidden[:, None], torch.rand_like(crop), crop)
    assert not torch.equal(changed, crop)
    with torch.no_grad():
        outputs = task(crop, mask), task(changed, mask)
    for before, after in zip(*outputs, strict=True):
        for branch, prediction in before.items():
            assert torch.equal(prediction, after[branch]), branch


def test_state_dict_is_a_superset_of_the_downstream_networks(method, task):
    weights = task.state_dict()
    network = make_network(METHODS[method][0], classes=3, deep_supervision=True)
    for name, tensor in network.state_dict().items():
        if ".seg_layers." not in name:
            assert weights[name].shape == tensor.shape, name


def test_frozen_parameters_are_the_untrained_ones_and_all_others_get_gradients(task):
    crop, mask = make_crops(), make_masks(task)
    task.loss_terms(task(crop, mask), crop, mask, KEYPOINTS)["total"].backward()
    without = [name for name, parameter in task.named_parameters() if parameter.grad is None]
    assert without == task.untrained_parameters()


def test_masks_are_one_patch_grid_over_the_crop(task):
    covered = [n * size for n, size in zip(task.mask_grid, task.patch_size, strict=True)]
    assert covered == list(TINY_CROP)


def test_images_are_like_the_crop(task):
    crop, mask = make_crops(channels=1), make_masks(task)
    images = task.images(task(crop, mask), crop)
    assert {image.shape for image in images.values()} == {crop.shape}


def test_several_channels(method):
    task = make_method(method, channels=3)
    crop, mask = make_crops(channels=3), make_masks(task)
    terms = task.loss_terms(task(crop, mask), crop, mask, KEYPOINTS)
    assert terms["total"].isfinite()


def test_compiles_without_a_break(method, task):
    task.eval()
    crop, mask = make_crops(), make_masks(task)
    with torch.no_grad():
        expected = task(crop, mask)
        compiled = torch.compile(task, backend="aot_eager", fullgraph=True)(crop, mask)
    for branch, prediction in expected.reconstructions.items():
        torch.testing.assert_close(compiled.reconstructions[branch], prediction)
