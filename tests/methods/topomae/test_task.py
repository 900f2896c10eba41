from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from nnunet_topomae.methods.masking import mask_to_voxels
from nnunet_topomae.methods.topomae import SpatialConfig, TopologyConfig, TopoMAE, TopoMAEConfig
from nnunet_topomae.methods.topomae.task import loss_weights
from nnunet_topomae.networks import UNETRPP, FusedViTUNETRPP
from nnunet_topomae.nnunet.training.schedule import learning_rate_factor
from nnunet_topomae.topology import TopologicalLoss
from nnunet_topomae.topology.loss import Target
from tiny import TINY_CROP, TINY_NETWORK, Volumes, draw_batch, make_batch, make_crops, make_task

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
    batch = {**make_batch(task, crop), "keypoints": torch.full((2, 9, 3), 0.5)}
    output = task(batch)
    return task, output, batch, task.loss_terms(output, batch)


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
    _, output, batch, terms = _terms(TopoMAEConfig())
    crop = batch["crop"]
    hidden = mask_to_voxels(batch["mask"], (4, 4, 8)).expand_as(crop)
    vit, unetrpp = output.reconstructions["vit"], output.reconstructions["unetrpp"]
    assert terms["vit_mse"].item() == pytest.approx((vit - crop)[hidden].square().mean().item(), rel=1e-5)
    assert terms["reconstruction_consistency"].item() == pytest.approx(
        (vit - unetrpp)[hidden].square().mean().item(), rel=1e-5
    )
    assert terms["unetrpp_mse"].item() == pytest.approx((unetrpp - crop)[hidden].square().mean().item(), rel=1e-5)
    points = output.keypoints
    for branch in ("vit", "unetrpp"):
        expected = (points[branch] - 0.5).square().mean().item()
        assert terms[f"{branch}_spatial"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["spatial_consistency"].item() == pytest.approx(
        (points["vit"] - points["unetrpp"]).square().mean().item(), rel=1e-5
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
    task, _, _, terms = _terms(replace(TopoMAEConfig(), **changes))
    assert set(terms) == {"total", *TERMS} - left_out
    terms["total"].backward()
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_single_branch_has_all_of_the_weight():
    weights = loss_weights(replace(TopoMAEConfig(), branches=("vit",)))
    assert weights["vit_mse"] == pytest.approx(0.8)
    assert weights["unetrpp_mse"] == 0


def test_hidden_voxels_reach_neither_branch():
    task = make_task().eval()
    batch = make_batch(task, make_crops(1))
    other = torch.where(task.hidden_voxels(batch), torch.rand_like(batch["crop"]), batch["crop"])
    a, b = task(batch), task({**batch, "crop": other})
    for branch in ("vit", "unetrpp"):
        assert torch.equal(a.reconstructions[branch], b.reconstructions[branch])
        assert torch.equal(a.keypoints[branch], b.keypoints[branch])


def test_topological_gradient_reaches_hidden_voxels_only():
    task, output, batch, terms = _terms(TopoMAEConfig())
    for branch, reconstruction in output.reconstructions.items():
        (gradient,) = torch.autograd.grad(terms[f"{branch}_topological"], reconstruction)
        hidden = task.hidden_voxels(batch)
        assert gradient[~hidden].abs().max() == 0
        assert gradient[hidden].abs().max() > 0


def test_the_topological_terms_are_those_of_the_composed_volumes():
    task, output, batch, terms = _terms(TopoMAEConfig())
    hidden = task.hidden_voxels(batch)
    composed = [torch.where(hidden, r, batch["crop"]) for r in output.reconstructions.values()]
    expected = TopologicalLoss()(batch["crop"], *composed)
    assert [terms[f"{b}_topological"].item() for b in ("vit", "unetrpp")] == [e.item() for e in expected]


def test_threads_have_the_topology_of_the_vit_before_unetrpp_runs(monkeypatch):
    """So the threads work on it while the GPU is busy with UNETR++."""
    task = make_task(TopoMAEConfig())
    events = []
    for name in ("start", "compare"):
        owner = TopologicalLoss if name == "start" else Target
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, f=original: (events.append(name), f(*a))[1])
    for name in ("vit", "encoder"):
        getattr(task, name).register_forward_pre_hook(lambda *_, name=name: events.append(name))
    task(make_batch(task))
    assert events == ["start", "vit", "compare", "encoder", "compare"]


def test_nothing_is_started_where_no_loss_follows():
    task = make_task(TopoMAEConfig())
    batch = make_batch(task)
    with task.without_loss():
        assert not task(batch).topology
    assert set(task(batch).topology) == {"vit", "unetrpp"}


def test_a_teacher_computes_no_topology(monkeypatch):
    task = make_task(TopoMAEConfig(mask_source="anatomask"))
    started = []
    monkeypatch.setattr(TopologicalLoss, "start", lambda *_: started.append(1))
    assert "mask" in task.choose(draw_batch(task, Volumes()), 0.5)
    assert not started


def test_compiled_losses_are_the_same():
    """The graph breaks only where topology is started: for the crop and for each of the branches."""
    task = make_task(TopoMAEConfig()).eval()
    batch = {**make_batch(task), "keypoints": torch.full((2, 9, 3), 0.5)}
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(task, backend=graphs)
    terms, expected = (task.loss_terms(run(batch), batch) for run in (compiled, task))
    assert graphs.frame_count == 4
    torch.testing.assert_close(terms, expected)
    terms["total"].backward()
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_constant_crop_trains():
    task, *_, terms = _terms(TopoMAEConfig(), torch.full((2, 1, *TINY_CROP), 0.25))
    terms["total"].backward()
    gradients = [p.grad for p in task.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients)


def test_several_channels():
    task = make_task(channels=3)
    batch = make_batch(task, make_crops(channels=3))
    assert torch.isfinite(task.loss_terms(task(batch), batch)["total"])


def test_key_point_heads_start_as_the_vit_does():
    """Xavier-uniform, whose bound is sqrt(6 / (inputs + outputs)), and biases of 0."""
    for head in make_task().keypoint_heads.values():
        for layer in (head.mlp[0], head.mlp[2]):
            bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
            assert 0.98 * bound < layer.weight.abs().max() <= bound
            assert not layer.bias.any()


def test_another_network_is_refused():
    kwargs = {key: TINY_NETWORK[key] for key in ("crop_size", "strides", "features_per_stage", "depths")}
    with pytest.raises(ValueError, match="the plans name UNETRPP"):
        TopoMAE(UNETRPP(1, 1, **kwargs), TopoMAEConfig(), kwargs["crop_size"])


@pytest.mark.parametrize(("rate", "rates"), [(0.0, {0.0}), (0.3, {0.3}), (None, {0.15, 0.1})])
def test_dropout_of_unetrpp_is_that_of_the_settings(rate, rates):
    """Null leaves the network's own: 0.15 on attention maps, as asked for, and 0.1 on channels."""
    network = FusedViTUNETRPP(1, 1, deep_supervision=False, attention_dropout=0.15, **TINY_NETWORK)
    task = TopoMAE.build(network, TopoMAEConfig(dropout=rate), TINY_CROP)
    parts = [*task.encoder.modules(), *task.decoder.modules()]
    assert {part.p for part in parts if isinstance(part, nn.Dropout | nn.Dropout3d)} == rates


@pytest.mark.parametrize(("branch", "learning_rate", "steps"), [("vit", 2e-3, 300), ("unetrpp", 3e-3, 250)])
def test_each_branch_learns_one_crop_by_heart(branch, learning_rate, steps):
    """A sound network does so within some hundred steps. The error is that of the crop in [0, 1]."""
    torch.manual_seed(0)
    vit = {"patch_size": (8, 8, 8), "width": 96, "depth": 4, "num_heads": 4, "local_start": True}
    network = FusedViTUNETRPP(1, 1, deep_supervision=False, **{**TINY_NETWORK, "vit": vit})
    network.apply(network.initialize)
    settings = {"topology": TopologyConfig(enabled=False), "spatial": SpatialConfig(enabled=False), "dropout": 0.0}
    task = TopoMAE.build(network, TopoMAEConfig(branches=[branch], **settings), TINY_CROP)
    crop = make_crops(1)
    deviation = crop.std()
    batch = make_batch(task, (crop - crop.mean()) / deviation)
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, 20, steps))
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss_terms(task(batch), batch)["total"].backward()
        nn.utils.clip_grad_norm_(trained, 1)
        optimizer.step()
        schedule.step()
    task.eval()
    with torch.no_grad():
        error = task.errors(task(batch), batch)[branch]
    assert error * deviation**2 < 1e-4


@pytest.mark.parametrize(
    ("sizes", "said"), [({"a": TINY_CROP, "b": (4, 4, 4), "c": (16, 16, 33)}, True), (None, False)]
)
def test_whoever_takes_crops_as_large_as_the_images_is_told(sizes, said):
    images, lines = Volumes(), []
    if sizes:
        images.volumes = {case: np.zeros((1, *size), np.float32) for case, size in sizes.items()}
        images.identifiers = list(sizes)
    make_task().prepare(images, torch.device("cpu"), lines.append)
    assert [line.startswith("WARNING: 2 of 3 images") for line in lines] == [True] * said


def test_without_the_spatial_loss_the_size_of_images_does_not_matter():
    images, lines = Volumes(), []
    images.volumes = {case: volume[:, :8, :8, :8] for case, volume in images.volumes.items()}
    make_task(replace(TopoMAEConfig(), spatial=SpatialConfig(enabled=False))).prepare(
        images, torch.device("cpu"), lines.append
    )
    assert lines == []
