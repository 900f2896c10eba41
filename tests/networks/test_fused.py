import pytest
import torch
from timm.optim import param_groups_layer_decay

from nnunet_topomae.networks import UNETRPP, FusedViTUNETRPP
from nnunet_topomae.networks.pyramid import ScaleAdapter, resampling_factors, upsampling_steps
from nnunet_topomae.networks.vit import check_taps, choose_taps
from tiny import TINY_CROP, TINY_NETWORK


def _network(**kwargs):
    return FusedViTUNETRPP(1, 3, **{**TINY_NETWORK, **kwargs})


def test_starts_exactly_as_its_unetrpp():
    fused = _network(fusion_gain=0.0).eval()
    alone = UNETRPP(1, 3, **{k: TINY_NETWORK[k] for k in ("crop_size", "strides", "features_per_stage", "depths")})
    alone.load_state_dict(fused.state_dict(), strict=False)
    crop = torch.rand(1, 1, *TINY_CROP)
    for a, b in zip(fused(crop), alone.eval()(crop), strict=True):
        assert torch.equal(a, b)


def test_with_gain_the_vit_adds_to_all_four_scales():
    fused = _network(fusion_gain=1.0).eval()
    crop = torch.rand(1, 1, *TINY_CROP)
    features = fused.pyramid(fused.vit.taps(crop, fused.taps))
    for ours, encoders in zip(features, fused.encoder(crop), strict=True):
        assert ours.shape == encoders.shape
        assert ours.abs().max() > 0


def test_gradients_reach_every_parameter():
    fused = _network(fusion_gain=1.0)
    sum(output.square().sum() for output in fused(torch.rand(2, 1, *TINY_CROP))).backward()
    assert [name for name, p in fused.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("depth", "taps"), [(12, (3, 6, 9)), (24, (7, 13, 19)), (4, (0, 1, 2))])
def test_taps_are_those_of_unetr(depth, taps):
    """Hidden states 3, 6 and 9 of 12, counted from 0, in MONAI's and SelfMedMAE's UNETR."""
    assert choose_taps(depth, 3) == taps


def test_plans_without_taps_keep_those_that_they_were_trained_with():
    assert check_taps(None, 12, 3) == (4, 7, 10)
    assert _network().taps == (1, 2, 3)


def test_too_shallow_a_vit_is_refused():
    with pytest.raises(ValueError, match="at least 4 blocks"):
        _network(vit={**TINY_NETWORK["vit"], "depth": 3})


def test_taps_must_fit_the_depth():
    with pytest.raises(ValueError, match="3 increasing blocks of a ViT of depth 4"):
        _network(taps=(0, 1, 4))


@pytest.mark.parametrize(
    ("source", "target", "up", "down"),
    [
        ((4, 8, 8), (32, 32, 32), (8, 4, 4), (1, 1, 1)),
        ((4, 8, 8), (4, 4, 4), (1, 1, 1), (1, 2, 2)),
        ((4, 10, 10), (8, 5, 5), (2, 1, 1), (1, 2, 2)),  # finer along one axis, coarser along the others
    ],
)
def test_resampling_per_axis(source, target, up, down):
    assert resampling_factors(source, target) == (up, down)
    adapter = ScaleAdapter(6, 8, source, target)
    assert adapter(torch.rand(1, 6, *source)).shape == (1, 8, *target)


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="choose another ViT patch size"):
        resampling_factors((4, 4, 4), (6, 4, 4))


def test_upsampling_steps():
    assert list(upsampling_steps((8, 4, 1))) == [(2, 2, 1), (2, 2, 1), (2, 1, 1)]
    assert list(upsampling_steps((1, 1, 1))) == [(1, 1, 1)]


def test_learning_rates_fall_towards_the_input_of_the_vit():
    """SelfMedMAE: with 12 blocks and 0.75, last block 0.75, first 0.0317, patch embedding 0.0238, final norm 1."""
    fused = _network(vit={**TINY_NETWORK["vit"], "depth": 12})
    names = {id(p): name for name, p in fused.named_parameters()}
    groups = param_groups_layer_decay(fused, 0.05, layer_decay=0.75)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales["decoder.seg_layers.0.weight"] == scales["encoder.downsample.0.0.weight"] == 1
    assert scales["vit.norm.weight"] == 1
    last, first = (scales[f"vit.blocks.{i}.mlp.fc1.weight"] for i in (11, 0))
    assert (last, first) == pytest.approx((0.75, 0.0317), abs=5e-5)
    assert scales["vit.patch_embed.weight"] == scales["vit.pos_embed"] == pytest.approx(0.0238, abs=5e-5)
