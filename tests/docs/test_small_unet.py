"""The worked example of docs/adding_a_network.md."""

import json
import re
from pathlib import Path

import pytest
import torch
from crop_contrast import CropContrast, CropContrastConfig
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from small_unet import SmallUNet
from timm.optim import param_groups_layer_decay

from nnunet_topomae.networks.resizing import adapt_weights
from nnunet_topomae.networks.traits import constant_parameters, grid_tensors, no_weight_decay
from tiny import Volumes, draw_batch

CROP = (16, 16, 32)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding_a_network.md"


@pytest.fixture(scope="module")
def architecture():
    """The block of the plans that the page shows, with a tiny crop."""
    (block,) = re.findall(r'"architecture": (\{.*?\n\})', PAGE.read_text(), re.DOTALL)
    architecture = json.loads(block)
    architecture["arch_kwargs"]["crop_size"] = list(CROP)
    return architecture


def build(architecture, channels, classes, deep_supervision):
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        classes,
        deep_supervision=deep_supervision,
    )


def test_nnunet_builds_it_from_the_plans_of_the_page(architecture):
    network = build(architecture, 2, 3, True)
    assert type(network).__name__ == SmallUNet.__name__
    crop = torch.rand(2, 2, *CROP)
    assert [output.shape for output in network(crop)] == [(2, 3, *CROP), (2, 3, 8, 8, 16)]
    network.decoder.deep_supervision = False
    assert network(crop).shape == (2, 3, *CROP)


def test_there_is_an_output_for_every_weight_of_nnunets_deep_supervision(architecture):
    """nnU-Net weighs as many outputs as there are strides, less one."""
    outputs = build(architecture, 1, 3, True)(torch.rand(1, 1, *CROP))
    assert len(outputs) == len(architecture["arch_kwargs"]["strides"]) - 1
    loss = DeepSupervisionWrapper(torch.nn.functional.mse_loss, [1.0, 0.0])
    assert loss(outputs, [torch.zeros_like(output) for output in outputs]).isfinite()


def test_what_it_says_of_itself(architecture):
    network = build(architecture, 1, 3, True)
    assert no_weight_decay(network) == {"encoder.positions"}
    assert constant_parameters(network) == set()
    assert {name: tensor.grid for name, tensor in grid_tensors(network).items()} == {"encoder.positions": (4, 4, 8)}


def test_learning_rates_fall_towards_the_input(architecture):
    network = build(architecture, 1, 3, True)
    scales = {
        name: group["lr_scale"]
        for group in param_groups_layer_decay(network, layer_decay=0.5)
        for name, parameter in network.named_parameters()
        if any(parameter is each for each in group["params"])
    }
    wanted = (
        "encoder.stages.0.0.weight",
        "encoder.stages.2.0.weight",
        "encoder.positions",
        "decoder.upsample.0.weight",
    )
    assert [scales[name] for name in wanted] == [0.0625, 0.25, 0.5, 1.0]


def test_weights_are_carried_to_another_crop(architecture):
    larger = {**architecture, "arch_kwargs": {**architecture["arch_kwargs"], "crop_size": [32, 16, 32]}}
    source, target = (build(plans, 1, 1, False) for plans in (architecture, larger))
    torch.nn.init.normal_(source.encoder.positions)
    result = adapt_weights(source.state_dict(), source, target, (1, 1))
    assert (result.adapted, result.fresh) == (["encoder.positions"], [])
    assert result.weights["encoder.positions"].shape == (1, 8 * 4 * 8, 64)


def test_the_example_of_a_method_trains_it(architecture):
    network = build(architecture, 1, 1, False)
    task = CropContrast.build(network, CropContrastConfig(), CROP)
    batch = draw_batch(task, Volumes())
    task.loss_terms(task(batch), batch)["total"].backward()
    assert network.encoder.positions.grad is not None
    without = [name for name, parameter in task.named_parameters() if parameter.grad is None]
    assert without == task.untrained_parameters()
