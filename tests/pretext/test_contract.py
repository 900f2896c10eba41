"""What every pretext task must do; a new method joins METHODS."""

import pytest
import torch

from nnunet_topomae.networks import FusedViTUNETRPP
from nnunet_topomae.pretext import TopoMAE
from tiny import TINY_CROP, TINY_NETWORK, make_crops, make_masks, make_task

METHODS = {TopoMAE: make_task}


@pytest.fixture(params=METHODS.values(), ids=[method.__name__ for method in METHODS])
def task(request):
    return request.param()


def test_loss_falls_on_a_tiny_set(task):
    crop, mask = make_crops(), make_masks(task)
    keypoints = torch.rand(2, 9, 3) * 2 - 1
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    totals = []
    for _ in range(25):
        total = task.loss_terms(task(crop, mask), crop, mask, keypoints)["total"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        task.after_step()
        totals.append(total.item())
    assert totals[-1] < 0.7 * totals[0]


def test_state_dict_is_a_superset_of_the_downstream_networks(task):
    network = FusedViTUNETRPP(1, 3, **TINY_NETWORK)
    weights = task.state_dict()
    for name, tensor in network.state_dict().items():
        if ".seg_layers." not in name:
            assert weights[name].shape == tensor.shape, name


def test_frozen_parameters_are_the_untrained_ones_and_all_others_get_gradients(task):
    crop, mask = make_crops(), make_masks(task)
    task.loss_terms(task(crop, mask), crop, mask, torch.zeros(2, 9, 3))["total"].backward()
    without = [name for name, parameter in task.named_parameters() if parameter.grad is None]
    assert without == task.untrained_parameters()


def test_masks_are_one_patch_grid_over_the_crop(task):
    covered = [n * size for n, size in zip(task.mask_grid, task.patch_size, strict=True)]
    assert covered == list(TINY_CROP)
