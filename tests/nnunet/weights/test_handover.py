from pathlib import Path

import pytest
import torch
from torch import nn

from nnunet_topomae.methods.mae import MAE, MAEConfig
from nnunet_topomae.methods.topomae import TopoMAE, TopoMAEConfig
from nnunet_topomae.nnunet.weights.handover import hand_over
from tiny import TINY_CROP, make_network


def _network(width=3):
    network = nn.Module()
    network.encoder = nn.Linear(2, width)
    network.pyramid = nn.Linear(2, 2)
    network.decoder = nn.Module()
    network.decoder.seg_layers = nn.ModuleList([nn.Linear(2, 4)])
    return network


def test_hand_over_loads_all_but_heads_and_reports_what_was_never_trained():
    source, target = _network(), _network()
    checkpoint = {
        "network_weights": {**source.state_dict(), "vit_decoder.weight": torch.rand(2)},
        "untrained_parameters": ["pyramid.weight", "pyramid.bias"],
    }
    pyramid, head = target.pyramid.weight.clone(), target.decoder.seg_layers[0].weight.clone()
    result = hand_over(checkpoint, target, Path("x.pth"))
    assert torch.equal(target.encoder.weight, source.encoder.weight)
    assert torch.equal(target.pyramid.weight, pyramid)
    assert torch.equal(target.decoder.seg_layers[0].weight, head)
    assert result.loaded == ["encoder.weight", "encoder.bias"]
    assert result.fresh == [
        "pyramid.weight",
        "pyramid.bias",
        "decoder.seg_layers.0.weight",
        "decoder.seg_layers.0.bias",
    ]
    report = result.report(target)
    assert "encoder                              9             0" in report
    assert "2 tensors of segmentation heads; 2 tensors of pyramid" in report


@pytest.mark.parametrize("outputs", [4, 5])
def test_heads_are_loaded_if_asked_for_and_if_they_fit(outputs):
    source, target = _network(), _network()
    source.decoder.seg_layers = nn.ModuleList([nn.Linear(2, outputs)])
    expected = (source if outputs == 4 else target).decoder.seg_layers[0].weight.clone()
    names = ["decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"]
    result = hand_over({"network_weights": source.state_dict()}, target, Path("x.pth"), with_heads=True)
    assert torch.equal(target.decoder.seg_layers[0].weight, expected)
    assert result.fresh == ([] if outputs == 4 else names)
    assert (result.loaded[-2:] == names) == (outputs == 4)


def test_a_head_that_the_checkpoint_lacks_is_fresh():
    weights = {name: tensor for name, tensor in _network().state_dict().items() if "seg_layers" not in name}
    result = hand_over({"network_weights": weights}, _network(), Path("x.pth"), with_heads=True)
    assert result.fresh == ["decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"]


def test_another_architecture_is_refused_and_nothing_is_loaded():
    target = _network(width=5)
    before = target.pyramid.weight.clone()
    weights = _network(width=3).state_dict()
    del weights["pyramid.bias"]
    with pytest.raises(
        ValueError,
        match=r"x.pth is of another architecture than the plans: 1 tensors are missing \(pyramid.bias\), "
        r"2 have another shape \(encoder.weight \(3, 2\) instead of \(5, 2\)",
    ):
        hand_over({"network_weights": weights}, target, Path("x.pth"))
    assert torch.equal(target.pyramid.weight, before)


def _checkpoint(task, named=True):
    fixed = {"fixed_parameters": task.fixed_parameters()} if named else {}
    return {"network_weights": task.state_dict(), "untrained_parameters": task.untrained_parameters(), **fixed}


@pytest.mark.parametrize("named", [True, False], ids=["of today", "of version 0.1"])
@pytest.mark.parametrize(
    "task",
    [
        lambda network: TopoMAE(network, TopoMAEConfig(branches=("vit",)), TINY_CROP),
        lambda network: MAE(network, MAEConfig(), TINY_CROP),
    ],
    ids=["TopoMAE's ViT alone", "MAE of the fused network"],
)
def test_learned_positions_that_nobody_trained_are_fresh_and_sine_cosine_ones_are_loaded(task, named):
    checkpoint = _checkpoint(task(make_network("fused")), named)
    result = hand_over(checkpoint, make_network("fused", classes=3, deep_supervision=True), Path("x.pth"))
    assert "vit.pos_embed" in result.loaded
    learned = [name for name in checkpoint["network_weights"] if name.startswith("encoder.") and "pos_embed" in name]
    assert len(learned) == 4
    assert set(learned) <= set(result.fresh)
