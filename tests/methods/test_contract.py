"""What every method must do; a new one joins METHODS in tests/tiny.py."""

import dataclasses
import pickle
from math import prod

import numpy as np
import pytest
import torch

from nnunet_topomae.methods import to_float32
from nnunet_topomae.methods.inpainting import harmonic_inpainting
from nnunet_topomae.methods.losses import masked_mse, patch_means
from nnunet_topomae.methods.masked import MaskedReconstruction
from nnunet_topomae.methods.topomae.task import Prediction
from nnunet_topomae.settings import read_block, to_block
from tiny import MASKED_METHODS, METHODS, TINY_CROP, Volumes, draw_batch, make_method, make_network


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def task(method):
    return make_method(method)


@pytest.fixture(params=MASKED_METHODS)
def masked_task(request):
    return make_method(request.param)


@pytest.fixture
def images():
    return Volumes()


def _train(task, images, steps):
    """Losses of a few steps as the trainer makes them, on one batch."""
    drawn = draw_batch(task, images)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    totals = []
    for step in range(steps):
        batch = task.choose(drawn, step / steps)
        output = to_float32(task(batch))
        total = task.loss_terms(output, batch)["total"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        task.after_step(output, batch, step / steps)
        totals.append(total.item())
    return totals


def test_an_item_depends_on_its_random_generator_alone(task, images):
    first, again, other = (draw_batch(task, images, seed) for seed in (1, 1, 2))
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert any(not torch.equal(other[name], tensor) for name, tensor in first.items())


def test_the_example_is_like_what_is_drawn(task):
    drawn, example = draw_batch(task, Volumes(channels=3)), task.views().example(2, 3)
    described = [{name: (t.shape, t.dtype) for name, t in batch.items()} for batch in (drawn, example)]
    assert described[0] == described[1]


def test_views_reach_the_processes_of_the_loader(task, images):
    sent = pickle.loads(pickle.dumps(task.views()))
    item = sent.draw(images, "large", np.random.default_rng(0), True)
    assert all(tensor.isfinite().all() for tensor in item.values())


def test_loss_falls_on_a_tiny_set(task, images):
    totals = _train(task, images, 25)
    assert sum(totals[-3:]) < 0.9 * sum(totals[:3])


def test_a_fixed_seed_gives_the_same_run(method, images):
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        task = make_method(method)
        runs.append((_train(task, images, 4), task.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[1][1][name], tensor) for name, tensor in runs[0][1].items())


def test_state_dict_is_a_superset_of_the_downstream_networks(method, task):
    weights = task.state_dict()
    network = make_network(METHODS[method][0], classes=3, deep_supervision=True)
    for name, tensor in network.state_dict().items():
        if ".seg_layers." not in name:
            assert weights[name].shape == tensor.shape, name


@pytest.mark.parametrize(
    ("method", "part"), [("Alice", "head"), ("Alice", "teacher"), ("MAE", "autoencoder"), ("AnatoMask", "teacher")]
)
def test_a_network_is_refused_that_has_a_part_of_the_same_name(method, part):
    kind, task_class, config = METHODS[method]
    network = make_network(kind)
    network.add_module(part, torch.nn.Linear(2, 2))
    said = rf'^{type(network).__name__} has a part named "{part}", which is also an attribute of {task_class.__name__}'
    with pytest.raises(ValueError, match=said):
        task_class.build(network, config, TINY_CROP)


def test_a_network_is_refused_that_has_a_buffer_of_the_same_name():
    _, task_class, config = METHODS["Alice"]
    network = make_network("unetr")
    network.register_buffer("centres", torch.zeros(2))
    with pytest.raises(ValueError, match=r'UNETR has a part named "centres", which is also an attribute of Alice'):
        task_class.build(network, config, TINY_CROP)


def test_frozen_parameters_are_the_untrained_ones_and_all_others_get_gradients(task, images):
    batch = draw_batch(task, images)
    task.loss_terms(task(batch), batch)["total"].backward()
    without = [name for name, parameter in task.named_parameters() if parameter.grad is None]
    assert without == task.untrained_parameters()


def test_fixed_parameters_are_the_sine_cosine_positions_of_vits(method, task):
    copies = {"vit.pos_embed", "teacher.vit.pos_embed", "encoder.pos_embed", "target.encoder.pos_embed"}
    expected = copies & {name for name, _ in task.named_parameters()}
    assert set(task.fixed_parameters()) == expected


def test_the_report_has_pictures_and_figures(task, images):
    task.eval()
    with torch.no_grad():
        batch = {name: tensor[:1] for name, tensor in draw_batch(task, images, mirror=False).items()}
        with task.without_loss():
            output = to_float32(task(batch))
        report = task.shown(output, batch)
    assert {volume.shape for volume in report.columns.values()} == {(1, *TINY_CROP)}
    assert set(task.headings) <= set(report.metrics)
    assert not isinstance(task, MaskedReconstruction) or task.yardstick in report.metrics
    for figures in report.metrics.values():
        assert all(value is not None and np.isfinite(value) for value in figures.values())


def test_errors_of_all_branches_can_be_compared_with_the_yardstick(task, images):
    batch = draw_batch(task, images)
    errors, baseline = task.errors(to_float32(task(batch)), batch), task.baseline_error(batch)
    assert task.yardstick
    assert errors
    assert set(errors) <= set(task.headings)
    assert all(error.shape == () and error > 0 for error in (*errors.values(), baseline))


def test_what_the_planner_sets_can_be_read_again(task):
    planned = task.planned(task.config_class(), (96, 96, 96), (1.5, 1.5, 1.5))
    assert read_block(task.config_class, to_block(planned), "pretraining") == planned
    assert dataclasses.is_dataclass(task.for_memory(planned))


def test_several_channels(method):
    batch = draw_batch(task := make_method(method, channels=3), Volumes(channels=3))
    assert task.loss_terms(task(batch), batch)["total"].isfinite()


def test_compiles_without_a_break(method, images):
    """With gradients, as in training, where MiM computes a part of them again in the backward pass.

    Without what a method computes on the CPU, where the graph has to break.
    """
    kind, task_class, config = METHODS[method]
    network = make_network(kind, 1, 1)
    task = task_class.build(network, task_class.for_memory(config), TINY_CROP).eval()
    batch = draw_batch(task, images)
    compiled = torch.compile(task, backend="aot_eager", fullgraph=True)(batch)
    torch.testing.assert_close(compiled, task(batch))


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_masks_hide_exactly_the_asked_share(masked_task, images, progress):
    mask = masked_task.choose(draw_batch(masked_task, images), progress)["mask"]
    assert mask.dtype == torch.bool
    assert mask.shape == (2, *masked_task.mask_grid)
    hidden = round(masked_task.config.mask_ratio * prod(masked_task.mask_grid))
    assert mask.flatten(1).sum(dim=1).tolist() == [hidden] * 2


def test_hidden_voxels_do_not_reach_the_network(masked_task, images):
    masked_task.eval()
    batch = draw_batch(masked_task, images)
    hidden = batch["mask"]
    for axis, size in enumerate(masked_task.patch_size, start=1):
        hidden = hidden.repeat_interleave(size, dim=axis)
    changed = torch.where(hidden[:, None], torch.rand_like(batch["crop"]), batch["crop"])
    assert not torch.equal(changed, batch["crop"])
    with torch.no_grad(), masked_task.without_loss():
        before, after = masked_task(batch), masked_task({**batch, "crop": changed})
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_masks_are_one_patch_grid_over_the_crop(masked_task):
    covered = [n * size for n, size in zip(masked_task.mask_grid, masked_task.patch_size, strict=True)]
    assert covered == list(TINY_CROP)


def test_images_are_like_the_crop(masked_task, images):
    batch = draw_batch(masked_task, images)
    reconstructed = masked_task.images(masked_task(batch), batch)
    assert {image.shape for image in reconstructed.values()} == {batch["crop"].shape}


def test_the_yardstick_is_harmonic_inpainting_of_the_hidden_voxels(images):
    task = make_method("TopoMAE")
    batch = draw_batch(task, images)
    inpainted = harmonic_inpainting(batch["crop"], task.hidden_voxels(batch))
    errors = task.errors(Prediction({"vit": inpainted, "unetrpp": batch["crop"]}, {}, {}), batch)
    assert errors["vit"] == task.baseline_error(batch)
    assert errors["unetrpp"] == 0


@pytest.mark.parametrize("name", ["MAE", "SparK, PlainConvUNet"])
def test_with_normalised_targets_the_yardstick_is_told_the_means_of_patches_too(images, name):
    """Predicting 0 everywhere gives the mean of every patch, although nothing has been learned."""
    task = make_method(name)
    batch = draw_batch(task, images)
    nothing = task.errors(dict.fromkeys(task.headings, torch.zeros_like(batch["crop"])), batch)
    hidden = task.hidden_voxels(batch)
    told = task.baselines(batch)
    (error,) = nothing.values()
    torch.testing.assert_close(masked_mse(told["true patch mean"], batch["crop"], hidden), error)
    for image in (told["true patch mean"], told[task.yardstick]):
        torch.testing.assert_close(*(patch_means(each, task.patch_size) for each in (image, batch["crop"])))
    torch.testing.assert_close(masked_mse(told[task.yardstick], batch["crop"], hidden), task.baseline_error(batch))
