import pytest
import torch

from nnunet_topomae.methods.topomae import SpatialConfig, TopologyConfig, TopoMAE, TopoMAEConfig
from nnunet_topomae.networks import FusedViTUNETRPP
from nnunet_topomae.networks.grids import resize
from nnunet_topomae.networks.resizing import adapt_weights
from nnunet_topomae.networks.unetrpp import EPABlock
from nnunet_topomae.networks.vit import ViTEncoder
from tiny import TINY_NETWORK, make_batch

LARGER = {"crop_size": [32, 16, 48]}
FINER = {"vit": {**TINY_NETWORK["vit"], "patch_size": [4, 2, 4]}}
OTHER_STEM = {"strides": [[1, 1, 1], [4, 2, 2], [2, 2, 2], [1, 2, 2], [1, 1, 2]]}


def _task(channels=1, **changes):
    config = TopoMAEConfig(topology=TopologyConfig(enabled=False), spatial=SpatialConfig(enabled=False))
    arguments = {**TINY_NETWORK, **changes}
    network = FusedViTUNETRPP(channels, channels, deep_supervision=False, **arguments)
    return TopoMAE(network, config, arguments["crop_size"])


def _smooth_crops(task, channels=1, batch_size=4):
    size = [grid * patch for grid, patch in zip(task.mask_grid, task.patch_size, strict=True)]
    coarse = torch.rand(batch_size, channels, *(s // 8 for s in size))
    return torch.nn.functional.interpolate(coarse, size, mode="trilinear")


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    task = _task()
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=2e-3)
    for step in range(60):
        batch = make_batch(task, _smooth_crops(task), seed=step)
        optimizer.zero_grad()
        task.loss_terms(task(batch), batch)["total"].backward()
        optimizer.step()
    return task


def test_the_same_network_gets_the_same_weights():
    task = _task()
    result = adapt_weights(task.state_dict(), task, _task(), (1, 1))
    assert result.adapted == result.fresh == []
    assert all(torch.equal(result.weights[name], tensor) for name, tensor in task.state_dict().items())


@pytest.mark.parametrize(
    ("before", "after", "values", "expected"),
    [
        ((1, 1, 2), (1, 1, 4), [0.0, 1.0], [0, 0.25, 0.75, 1]),
        ((1, 1, 4), (1, 1, 2), [0.0, 1.0, 2.0, 5.0], [0.5, 3.5]),
        ((1, 2, 2), (1, 4, 1), [0.0, 2.0, 4.0, 6.0], [1, 2, 4, 5]),
    ],
)
def test_resizing(before, after, values, expected):
    assert resize(torch.tensor([values]), before, after).tolist() == [pytest.approx(expected)]


def test_projections_of_constant_tokens_stay_what_they_were():
    old, new = (EPABlock(grid, 8, 4, 2, separate_projections=True) for grid in ((2, 4, 4), (4, 4, 6)))
    with torch.no_grad():
        old.pos_embed.fill_(3)
    result = adapt_weights(old.state_dict(), old, new, (1, 1))
    new.load_state_dict(result.weights)
    assert result.adapted == ["pos_embed", "attention.project.weight", "attention.project_values.weight"]
    assert torch.allclose(new.pos_embed, torch.full((1, 96, 8), 3.0))
    for name in ("project", "project_values"):
        projected = [getattr(block.attention, name)(torch.ones(n)) for block, n in ((old, 32), (new, 96))]
        torch.testing.assert_close(*projected)


@pytest.mark.parametrize("channels", [(1, 4), (4, 1), (2, 3), (3, 2), (2, 4), (4, 2)])
def test_a_stem_answers_equal_channels_as_before(channels):
    old, new = (ViTEncoder(n, (8, 8, 8), (4, 4, 4), 12, 1, 2) for n in channels)
    new.load_state_dict(adapt_weights(old.state_dict(), old, new, channels).weights)
    crop = torch.rand(2, 1, 8, 8, 8)
    expected, got = (
        vit.patch_embed(crop.expand(-1, n, -1, -1, -1)) for vit, n in zip((old, new), channels, strict=True)
    )
    torch.testing.assert_close(got, expected)
    assert torch.equal(new.blocks[0].mlp.fc1.weight, old.blocks[0].mlp.fc1.weight)


def test_a_patch_embedding_of_another_size_answers_a_constant_as_before():
    old, new = (ViTEncoder(1, (16, 16, 16), patch, 12, 1, 2) for patch in ((8, 8, 8), (4, 8, 16)))
    new.load_state_dict(adapt_weights(old.state_dict(), old, new, (1, 1)).weights)
    constant = torch.full((1, 1, 16, 16, 16), 0.7)
    torch.testing.assert_close(new.patch_embed(constant)[..., 0, 0, 0], old.patch_embed(constant)[..., 0, 0, 0])


@pytest.mark.parametrize("changes", [LARGER, FINER, OTHER_STEM, {"channels": 3}, {**LARGER, **FINER, "channels": 2}])
def test_a_carried_network_reconstructs_better_than_a_fresh_one(trained, changes):
    torch.manual_seed(5)
    fresh, target = _task(**changes), _task(**changes)
    channels = changes.get("channels", 1)
    result = adapt_weights(trained.state_dict(), trained, target, (1, channels), fixed=["vit.pos_embed"])
    assert all(name.startswith("pyramid.") for name in result.fresh), result.fresh
    target.load_state_dict(result.weights)
    batch = make_batch(target, _smooth_crops(target, channels))
    errors = {}
    for name, task in (("fresh", fresh.eval()), ("carried", target.eval())):
        with torch.no_grad():
            terms = task.loss_terms(task(batch), batch)
        errors[name] = {term: value.item() for term, value in terms.items()}
    for term in ("vit_mse", "unetrpp_mse"):
        assert errors["carried"][term] < 0.5 * errors["fresh"][term], (term, errors)


def test_what_does_not_fit_is_named_and_keeps_its_initial_values():
    source, target = _task(), _task(features_per_stage=[8, 8, 16, 24])
    result = adapt_weights(source.state_dict(), source, target, (1, 1))
    assert "encoder.downsample.3.0.weight" in result.fresh
    assert torch.equal(result.weights["encoder.downsample.3.0.weight"], target.encoder.downsample[3][0].weight)
    assert "vit.norm.weight" not in result.fresh
