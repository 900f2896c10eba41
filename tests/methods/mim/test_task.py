import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_topomae.methods.autoencoders import MaskedAutoencoder
from nnunet_topomae.methods.mae import MAE, MAEConfig
from nnunet_topomae.methods.mim import MiM, MiMConfig
from nnunet_topomae.methods.mim.levels import resize
from nnunet_topomae.methods.mim.task import Prediction, level_weights
from nnunet_topomae.networks import UNETR
from nnunet_topomae.nnunet.planning.traces import StepSizes, trace_pretraining
from tiny import TINY_CROP, TINY_UNETR, Volumes, draw_batch, make_network

PATCH, GRID = (4, 4, 8), (4, 4, 4)


def make_mim(kind: str = "unetr", **settings) -> MiM:
    config = replace(MiMConfig(projection_width=16), **settings)
    return MiM.build(make_network(kind), config, TINY_CROP)


@pytest.fixture
def batch():
    return draw_batch(make_mim(), Volumes())


class Intensities(MaskedAutoencoder):
    """Takes the intensities of a volume for its features, and for its reconstruction."""

    encoder_name, patch_size, width = "vit", PATCH, 1

    def decode(self, encoder, crop, mask, num_visible):
        return crop

    def predict(self, features):
        return features


def test_the_positive_is_the_region_that_the_volume_was_cut_from(batch):
    """Features that are means of intensities are equal just there, because resizing keeps means."""
    task = make_mim()
    task.autoencoder, task.query_head, task.candidate_head = Intensities(), nn.Identity(), nn.Identity()
    output = task(batch)
    assert [tuple(each.shape) for each in output.queries] == [(2, 4, 1), (8, 4, 1)]
    assert [tuple(each.shape) for each in output.candidates] == [(2, 8, 1), (8, 64, 1)]
    for pair, (queries, candidates) in enumerate(zip(output.queries, output.candidates, strict=True), start=1):
        positives = batch[f"children_{pair}"].flatten(0, -2)
        torch.testing.assert_close(candidates[..., 0].gather(1, positives), queries[..., 0])


@pytest.mark.parametrize("kind", ["unetr", "hybrid", "fused", "plain", "residual"])
def test_queries_of_different_volumes_differ(kind):
    """Features may be nearly the same for all volumes, as after a norm over the volume; what is compared may not."""
    task = make_mim(kind, gamma=2, beta=2, decoder_width=16).eval()
    with torch.no_grad():
        output = task(draw_batch(task, Volumes()))
    for queries in output.queries:
        directions = nn.functional.normalize(queries.flatten(0, 1), dim=-1)
        cosines = (directions @ directions.T)[~torch.eye(len(directions), dtype=torch.bool)]
        assert cosines.mean() < 0.9


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_features_of_u_nets_are_those_before_the_last_norm(kind):
    """After it, the mean over a volume is the same for all volumes."""
    task = make_mim(kind, gamma=2, beta=2, decoder_width=16).eval()
    with torch.no_grad():
        vectors = task._decode(task._parts(draw_batch(task, Volumes()))[1]).vector
    assert (vectors[0] - vectors[1]).norm() > 1e-3 * vectors.norm(dim=1).min()
    assert vectors.norm(dim=1).min() > 0.01


class SameAnatomy(Volumes):
    """Images that agree in what lies where, and differ in the details."""

    def __init__(self, seed: int):
        super().__init__()
        anatomy, details = _smooth(1, seed=0), _smooth(4, seed)
        self.volumes = {f"case_{n}": 1.5 * anatomy[0] + 0.4 * own for n, own in enumerate(details)}
        self.identifiers = self.partners = list(self.volumes)


def _smooth(number, seed):
    """(number, 1, D, H, W), twice as large as a crop."""
    coarse = np.random.default_rng(seed).random((number, 1, *(size // 4 for size in TINY_CROP)), np.float32)
    return nn.functional.interpolate(torch.from_numpy(coarse), scale_factor=8, mode="trilinear").numpy()


def test_the_alignment_learns_what_lies_where():
    """Half of the eight regions are hidden, and only these become volumes, so log 4 needs no look at the images."""
    torch.manual_seed(0)
    task = make_mim(levels=2, gamma=4)
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95))

    def alignment(seed):
        batch = draw_batch(task, SameAnatomy(seed), seed)
        return task.loss_terms(task(batch), batch)["alignment_1_2"]

    for step in range(1, 61):
        optimizer.zero_grad()
        alignment(step).backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.stack([alignment(seed) for seed in range(1000, 1006)]).mean() < 0.85 * np.log(4)


def test_if_the_positive_is_moved_the_contrast_rises(batch):
    task = make_mim(temperature=0.5)
    candidates = [torch.randn(2, 8, 16), torch.randn(8, 64, 16)]
    children = [batch["children_1"], batch["children_2"].flatten(0, 1)]
    queries = [
        each.gather(1, own[..., None].expand(-1, -1, 16)) for each, own in zip(candidates, children, strict=True)
    ]
    output = Prediction(task(batch).reconstructions, queries, candidates)
    moved = {**batch, "children_1": (batch["children_1"] + 1) % 8}
    right, wrong = task.loss_terms(output, batch), task.loss_terms(output, moved)
    assert wrong["alignment_1_2"] > right["alignment_1_2"] + 1


def test_gradients_of_the_alignment_stop_at_the_parent(batch):
    """So voxels outside the volumes that are compared with it get none."""
    task = make_mim()
    crop = batch["crop"].clone().requires_grad_(True)
    task.loss_terms(task({**batch, "crop": crop}), batch)["alignment_1_2"].backward()
    octants = crop.grad.reshape(2, 2, 16, 2, 16, 2, 32).abs().sum(dim=(2, 4, 6)).flatten(1)
    chosen = torch.zeros(2, 8, dtype=torch.bool).scatter(1, batch["children_1"], True)
    assert (octants[chosen] > 0).all()
    assert (octants[~chosen] == 0).all()


@pytest.mark.parametrize("kind", ["unetr", "hybrid"])
def test_levels_share_one_encoder_and_one_decoder(batch, kind):
    task = make_mim(kind)
    batch = draw_batch(task, Volumes())
    terms = task.loss_terms(task(batch), batch)
    parts = (task.autoencoder.encoder_of(task), task.autoencoder)
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    for level in (1, 2, 3):
        gradients = torch.autograd.grad(terms[f"level_{level}_mse"], trained, retain_graph=True)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
    other = {name for name, _ in task.named_parameters()} - {name for name, _ in make_network(kind).named_parameters()}
    assert {name.split(".")[0] for name in other} == {"autoencoder", "query_head", "candidate_head"}


def test_one_level_is_mae(batch):
    """On the crop at half the size, hidden by octants."""
    task = make_mim(levels=1)
    mae = MAE.build(make_network("unetr"), MAEConfig(mask_ratio=0.5), TINY_CROP)
    mae.vit.load_state_dict(task.vit.state_dict())
    mae.autoencoder.decoder.load_state_dict(task.autoencoder.decoder.state_dict())
    small = {"crop": resize(batch["crop"], TINY_CROP), "mask": batch["mask_1"]}
    expected = mae.loss_terms(mae(small), small)
    terms = task.loss_terms(task(batch), batch)
    assert set(terms) == {"total", "level_1_mse"}
    torch.testing.assert_close(terms["total"], expected["vit_mse"])


def _interpolated(where: np.ndarray, line: np.ndarray) -> np.ndarray:
    return np.interp(where, np.arange(len(line)), line)


def enlarged(volume: np.ndarray, size) -> np.ndarray:
    """Linear interpolation axis by axis, values beyond the outermost voxels repeated."""
    for axis, new in enumerate(size):
        old = volume.shape[axis]
        where = (np.arange(new) + 0.5) * old / new - 0.5
        volume = np.apply_along_axis(partial(_interpolated, where), axis, volume)
    return volume


def error_by_hand(volume: np.ndarray, prediction: np.ndarray, mask: np.ndarray) -> float:
    errors = []
    for k, j, i in np.argwhere(mask):
        where = slice(4 * k, 4 * k + 4), slice(4 * j, 4 * j + 4), slice(8 * i, 8 * i + 8)
        target = (volume[where] - volume[where].mean()) / np.sqrt(volume[where].var() + 1e-6)
        errors.append(np.square(prediction[where] - target).mean())
    return float(np.mean(errors))


def contrast_by_hand(queries, candidates, positives, temperature) -> float:
    losses = []
    for own, regions, right in zip(queries, candidates, positives, strict=True):
        for query, positive in zip(own, regions[right], strict=True):

            def similarity(region, query=query):
                return np.exp(query @ region / np.linalg.norm(query) / np.linalg.norm(region) / temperature)

            losses.append(-np.log(similarity(positive) / sum(map(similarity, regions))))
    return float(np.mean(losses))


def test_the_loss_of_an_example_by_hand():
    """All volumes cut and all terms summed again in NumPy (equations 2, 4 to 6 and 8 to 10)."""
    task = make_mim(temperature=0.3)
    batch = {name: tensor[:1] for name, tensor in draw_batch(task, Volumes()).items()}
    output = task(batch)
    crop, predictions = batch["crop"][0, 0].numpy(), [each.detach()[:, 0].numpy() for each in output.reconstructions]
    half = crop.reshape(16, 2, 16, 2, 32, 2).mean(axis=(1, 3, 5))
    expected = {"level_1_mse": error_by_hand(half, predictions[0][0], batch["mask_1"][0].numpy())}
    second, third = [], []
    for n, unit in enumerate(batch["children_1"][0].tolist()):
        z, y, x = np.unravel_index(unit, (2, 2, 2))
        child = crop[16 * z : 16 * z + 16, 16 * y : 16 * y + 16, 32 * x : 32 * x + 32]
        second.append(error_by_hand(child, predictions[1][n], batch["mask_2"][0, n].numpy()))
        for m, patch in enumerate(batch["children_2"][0, n].tolist()):
            k, j, i = np.unravel_index(patch, GRID)
            cut_out = child[4 * k : 4 * k + 4, 4 * j : 4 * j + 4, 8 * i : 8 * i + 8]
            grandchild = enlarged(cut_out, TINY_CROP)
            third.append(error_by_hand(grandchild, predictions[2 + m][n], batch["mask_3"][0, n, m].numpy()))
    expected |= {"level_2_mse": np.mean(second), "level_3_mse": np.mean(third)}
    for pair in (1, 2):
        vectors = (each[pair - 1].detach().numpy().astype(float) for each in (output.queries, output.candidates))
        positives = batch[f"children_{pair}"].flatten(0, -2).numpy()
        expected[f"alignment_{pair}_{pair + 1}"] = contrast_by_hand(*vectors, positives, 0.3)
    expected["total"] = sum(value * (0.1 if "align" in name else 1) for name, value in expected.items())
    terms = {name: term.item() for name, term in task.loss_terms(output, batch).items()}
    assert terms == pytest.approx(expected, rel=1e-4)


def test_byol_asks_for_likeness_alone(batch):
    task = make_mim(alignment="byol")
    output = task(batch)
    positives = batch["children_1"]
    chosen = output.candidates[0].gather(1, positives[..., None].expand(-1, -1, 32))
    cosine = nn.functional.cosine_similarity(output.queries[0], chosen, dim=-1)
    torch.testing.assert_close(task.loss_terms(output, batch)["alignment_1_2"], (2 - 2 * cosine).mean())
    assert isinstance(task.candidate_head, nn.Identity)  # two trained heads could agree on a constant


@pytest.mark.parametrize("kind", ["unetr", "hybrid"])
@pytest.mark.parametrize("level", [1, 2])
def test_hidden_patches_do_not_reach_the_network(kind, level):
    """The crop is changed where a level hides it; finer levels see it there, of course."""
    task = make_mim(kind, levels=level).eval()
    batch = draw_batch(task, Volumes())
    changed = batch["crop"].clone()
    for n, crop in enumerate(changed[:, 0]):
        hidden = batch["mask_1"][n].repeat_interleave(2 * task.autoencoder.patch_size[0], 0)
        hidden = hidden.repeat_interleave(2 * task.autoencoder.patch_size[1], 1)
        hidden = hidden.repeat_interleave(2 * task.autoencoder.patch_size[2], 2)
        if level == 2:
            hidden = torch.zeros_like(hidden)
            for unit, mask in zip(batch["children_1"][n].tolist(), batch["mask_2"][n], strict=True):
                for axis, size in enumerate(task.autoencoder.patch_size):
                    mask = mask.repeat_interleave(size, axis)
                octant = hidden.reshape(2, 16, 2, 16, 2, 32)[unit // 4, :, unit // 2 % 2, :, unit % 2]
                octant |= mask
        crop[hidden] += torch.rand(int(hidden.sum()))
    assert not torch.equal(changed, batch["crop"])
    with torch.no_grad():
        before, after = (task({**batch, "crop": crop}).reconstructions[level - 1] for crop in (batch["crop"], changed))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_computing_level_3_again_changes_nothing(batch):
    gradients = []
    for recompute in (True, False):
        torch.manual_seed(1)
        task = make_mim(recompute=recompute)
        task.loss_terms(task(batch), batch)["total"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in task.parameters() if p.requires_grad]))
    torch.testing.assert_close(gradients[0], gradients[1])


def _traced(**settings) -> float:
    config = replace(MiMConfig(projection_width=16), **settings)

    class Variant(MiM):
        config_class = staticmethod(lambda: config)

    big = {**TINY_UNETR, "crop_size": [48, 48, 64]}
    return trace_pretraining(Variant, StepSizes(UNETR, json.dumps(big), 1, 3, batch_size=8, cuda=False))


def test_the_planner_sees_what_levels_take_and_recomputing_saves():
    one, two, three = (_traced(levels=levels) for levels in (1, 2, 3))
    at_once = _traced(recompute=False)
    assert one < two < three < at_once
    assert three - two < 0.3 * (at_once - two)


def test_the_planner_sees_the_doubled_crop():
    """A step takes that much more than one of MAE, where images have so many channels that nothing else counts."""

    class OneLevel(MiM):
        config_class = staticmethod(lambda: MiMConfig(levels=1))

    sizes = StepSizes(UNETR, json.dumps(TINY_UNETR), num_channels=64, num_classes=3, batch_size=8, cuda=False)
    mae, mim = (trace_pretraining(method, sizes) for method in (MAE, OneLevel))
    assert mim - mae > 4 * 8 * 64 * (32 * 32 * 64)


@pytest.mark.parametrize(
    ("schedule", "start", "end"),
    [
        ("simultaneous", [1, 1, 0.5], [1, 1, 0.5]),
        ("coarse_to_fine", [2, 0, 0], [1, 1, 0.5]),
        ("fine_to_coarse", [1, 0, 1], [1, 1, 0.5]),
    ],
)
def test_weights_of_levels_change_as_in_table_14(batch, schedule, start, end):
    config = MiMConfig(weight_schedule=schedule, reconstruction_weights=(1, 1, 0.5))
    assert level_weights(config, 0) == pytest.approx(start)
    assert level_weights(config, 1) == pytest.approx(end)
    assert level_weights(config, 0.5) == pytest.approx(np.mean([start, end], axis=0))
    task = make_mim(weight_schedule=schedule, reconstruction_weights=(1, 1, 0.5), alignment="off")
    early, validation = task.choose(batch, 0.0), batch
    for weights, drawn in ((start, early), (end, validation)):
        total, *levels = task.loss_terms(task(drawn), drawn).values()
        torch.testing.assert_close(total, sum(w * level for w, level in zip(weights, levels, strict=True)))


def test_pictures_show_every_level_and_where_it_was_cut_from(batch):
    task = make_mim().eval()
    one = {name: tensor[:1] for name, tensor in batch.items()}
    with torch.no_grad():
        report = task.shown(task(one), one)
    assert list(report.columns) == [
        "level 1", "level 1, hidden", "level 1, reconstructed", "level 2 is cut from here",
        "level 2", "level 2, hidden", "level 2, reconstructed", "level 3 is cut from here",
        "level 3", "level 3, hidden", "level 3, reconstructed",
    ]  # fmt: skip
    assert set(report.metrics) == {"mim", "level 1", "level 2", "level 3"}
    z, y, x = np.unravel_index(int(one["children_1"][0, 0]), (2, 2, 2))
    outline = np.isnan(report.columns["level 2 is cut from here"][0, 8])  # the middle plane along the first axis
    expected = np.zeros((16, 32), bool)
    expected[8 * y : 8 * y + 8, 16 * x : 16 * x + 16] = True
    expected[8 * y + 1 : 8 * y + 7, 16 * x + 1 : 16 * x + 15] = False
    crossed = np.isnan(report.columns["level 2 is cut from here"][0, 8]) & ~expected
    assert (outline & expected).sum() == expected.sum()
    assert {tuple(each) for each in np.argwhere(crossed)} <= {(8, n) for n in range(32)} | {(n, 16) for n in range(16)}
    half = resize(one["crop"], TINY_CROP)[0].numpy()
    np.testing.assert_array_equal(report.columns["level 1"], half)


def test_a_batch_of_one_token_has_no_statistics():
    task = make_mim(gamma=1, beta=2)
    one = {name: tensor[:1] for name, tensor in draw_batch(task, Volumes()).items()}
    with pytest.raises(ValueError, match=r"^a batch norm needs more than one token; set a larger batch_size in a copy"):
        task(one)
