from dataclasses import replace

import pytest
import torch

from nnunet_topomae.config import SpatialConfig, TopologyConfig, TopoMAEConfig
from nnunet_topomae.masking import mask_to_voxels
from nnunet_topomae.networks import UNETRPP
from nnunet_topomae.pretext import TopoMAE
from nnunet_topomae.pretext.topomae import loss_weights
from tiny import TINY_CROP, TINY_NETWORK, make_crops, make_masks, make_task

TERMS = [
    "vit_mse",
    "unetrpp_mse",
    "vit_topological",
    "unetrpp_topological",
    "vit_spatial",
    "unetrpp_spatial",
    "spatial_consistency",
    "reconstruction_consistency",
]


def _terms(config, crop=None):
    task = make_task(config)
    crop = make_crops() if crop is None else crop
    mask = make_masks(task)
    output = task(crop, mask)
    return task, output, crop, mask, task.loss_terms(output, crop, mask, torch.full((2, 9, 3), 0.5))


def test_eight_terms_and_their_sum_by_the_papers_formula():
    config = replace(TopoMAEConfig(), lambda1=0.3, lambda2=0.2, lambda3=0.7, topology=TopologyConfig(weight=1.0))
    terms = _terms(config)[-1]
    assert set(terms) == {"total", *TERMS}
    vit_mse, upp_mse, vit_topo, upp_topo, vit_spa, upp_spa, spa_consis, rec_consis = (terms[t].item() for t in TERMS)
    l1, l2, l3 = 0.3, 0.2, 0.7
    expected = (
        (1 - l1) * (1 - 2 * l2) * vit_mse
        + (1 - l1) * l2 * vit_topo
        + (1 - l1) * l2 * vit_spa
        + l1 * (1 - 2 * l2) * upp_mse
        + l1 * l2 * upp_topo
        + l1 * l2 * upp_spa
        + l3 * spa_consis
        + l3 * rec_consis
    )
    assert terms["total"].item() == pytest.approx(expected, rel=1e-5)


def test_terms_by_hand():
    _, output, crop, mask, terms = _terms(TopoMAEConfig())
    hidden = mask_to_voxels(mask, (4, 4, 8)).expand_as(crop)
    vit, unetrpp = output.reconstructions["vit"], output.reconstructions["unetrpp"]
    assert terms["vit_mse"].item() == pytest.approx((vit - crop)[hidden].square().mean().item(), rel=1e-5)
    assert terms["reconstruction_consistency"].item() == pytest.approx(
        (vit - unetrpp)[hidden].square().mean().item(), rel=1e-5
    )
    assert terms["unetrpp_spatial"].item() == pytest.approx(
        (output.keypoints["unetrpp"] - 0.5).square().mean().item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"spatial": SpatialConfig(enabled=False)}, {"vit_spatial", "unetrpp_spatial", "spatial_consistency"}),
        ({"topology": TopologyConfig(enabled=False)}, {"vit_topological", "unetrpp_topological"}),
        ({"branches": ("vit",)}, {t for t in TERMS if "unetrpp" in t or "consistency" in t}),
        ({"branches": ("unetrpp",)}, {t for t in TERMS if "vit" in t or "consistency" in t}),
    ],
)
def test_switches_of_the_ablation(changes, left_out):
    task, _, _, _, terms = _terms(replace(TopoMAEConfig(), **changes))
    assert set(terms) == {"total", *TERMS} - left_out
    terms["total"].backward()
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_single_branch_has_all_of_the_weight():
    weights = loss_weights(replace(TopoMAEConfig(), branches=("vit",)))
    assert weights["vit_mse"] == pytest.approx(0.8)
    assert weights["unetrpp_mse"] == 0


def test_hidden_voxels_reach_neither_branch():
    task = make_task().eval()
    mask = make_masks(task, batch_size=1)
    hidden = mask_to_voxels(mask, task.patch_size)
    crop = make_crops(1)
    other = torch.where(hidden, torch.rand_like(crop), crop)
    a, b = task(crop, mask), task(other, mask)
    for group_a, group_b in zip(a, b, strict=True):
        for branch in ("vit", "unetrpp"):
            assert torch.equal(group_a[branch], group_b[branch])


def test_topological_gradient_reaches_hidden_voxels_only():
    task, output, crop, mask, _ = _terms(TopoMAEConfig())
    prediction = output.reconstructions["vit"].detach().requires_grad_()
    detached = output._replace(reconstructions={"vit": prediction, "unetrpp": prediction.detach()})
    task.loss_terms(detached, crop, mask, torch.zeros(2, 9, 3))["vit_topological"].backward()
    hidden = mask_to_voxels(mask, task.patch_size)
    assert prediction.grad[~hidden].abs().max() == 0
    assert prediction.grad[hidden].abs().max() > 0


def test_a_constant_crop_trains():
    task, *_, terms = _terms(TopoMAEConfig(), torch.full((2, 1, *TINY_CROP), 0.25))
    terms["total"].backward()
    gradients = [p.grad for p in task.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients)


def test_several_channels():
    task = make_task(channels=3)
    mask = make_masks(task)
    crop = make_crops(channels=3)
    assert torch.isfinite(task.loss_terms(task(crop, mask), crop, mask, torch.zeros(2, 9, 3))["total"])


def test_another_network_is_refused():
    kwargs = {key: TINY_NETWORK[key] for key in ("crop_size", "strides", "features_per_stage", "depths")}
    with pytest.raises(ValueError, match="the plans name UNETRPP"):
        TopoMAE(UNETRPP(1, 1, **kwargs), TopoMAEConfig(), kwargs["crop_size"])
