from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnunet_topomae.methods.alice import Alice, AliceConfig
from nnunet_topomae.methods.alice import views as alice_views
from nnunet_topomae.methods.alice.augmentation import view_of
from nnunet_topomae.methods.alice.landmarks.matcher import ACCEPTED, CYCLE, SIMILARITY, TRIES
from nnunet_topomae.methods.alice.modules import CASA, FEATURES
from nnunet_topomae.methods.alice.similarity import cosine_loss, dino_loss, moved_centre, spread, teacher_temperature
from nnunet_topomae.methods.alice.views import exchanged
from nnunet_topomae.methods.base import to_float32
from nnunet_topomae.methods.masked import HARDNESS_SCORES, TeacherConfig
from tiny import TINY_CROP, Volumes, draw_batch, make_network

CONFIG = AliceConfig(matcher="position", head_width=32)


KINDS = ["unetr", "hybrid"]


def make_alice(kind: str = "unetr", **settings) -> Alice:
    return Alice.build(make_network(kind), replace(CONFIG, **settings), TINY_CROP)


def terms_of(task: Alice, batch: dict) -> dict[str, torch.Tensor]:
    return task.loss_terms(to_float32(task(batch)), batch)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["l_r", "l_dv", "l_st"]),
        ({"casa": False}, ["l_r", "l_dv", "l_st"]),
        ({"l_dv": False, "matcher": "same_volume"}, ["l_r", "l_st"]),
        ({"l_dv": False, "casa": False, "similarity": "dino"}, ["l_r", "l_st"]),
        ({"similarity": "dino"}, ["l_r", "l_dv", "l_st"]),
    ],
)
def test_the_loss_is_the_sum_of_its_terms_and_all_that_is_trained_gets_a_gradient(settings, expected):
    task, images = make_alice(**settings), Volumes()
    terms = terms_of(task, draw_batch(task, images))
    assert list(terms) == ["total", *expected, "cls_std"]
    torch.testing.assert_close(terms["total"], sum(terms[name] for name in expected))
    terms["total"].backward()
    assert [n for n, p in task.named_parameters() if p.grad is None] == task.untrained_parameters()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("similarity", ["cosine", "dino"])
def test_no_gradient_reaches_the_target_even_if_it_could(kind, similarity):
    task, images = make_alice(kind, similarity=similarity), Volumes()
    task.target.requires_grad_(True)
    terms_of(task, draw_batch(task, images))["total"].backward()
    assert all(parameter.grad is None for parameter in task.target.parameters())
    assert task.autoencoder.encoder_of(task).blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_l_st_teaches_casa_through_the_student_alone(kind):
    """Its gradient is the same if the teacher's features are constants."""
    task, images = make_alice(kind), Volumes()
    batch = draw_batch(task, images)
    gradients = []
    for constant in (False, True):
        output = task(batch)
        if constant:
            output = output._replace(teacher=output.teacher.detach().clone())
        task.zero_grad()
        task.loss_terms(output, batch)["l_st"].backward()
        gradients.append([parameter.grad.clone() for parameter in task.casa.parameters()])
    for of_both, of_student in zip(*gradients, strict=True):
        torch.testing.assert_close(of_both, of_student)
        assert of_student.abs().sum() > 0


def test_student_and_teacher_share_casas_queries_and_projections():
    task, images = make_alice(), Volumes()
    calls: dict[str, list] = {"query": [], "key": [], "value": [], "projection": []}
    for name, seen in calls.items():
        part = getattr(task.casa, name)
        weight = part.weight if isinstance(part, nn.Linear) else part[0].weight
        part.register_forward_hook(lambda _, inputs, __, s=seen, w=weight: s.append((inputs[0].detach(), w)))
    task(draw_batch(task, images))
    for seen in calls.values():
        (_, first), (_, second) = seen  # once for S, once for T
        assert first is second
    (of_student, _), (of_teacher, _) = calls["query"]
    torch.testing.assert_close(of_student, of_teacher, rtol=0, atol=0)
    (of_student, _), (of_teacher, _) = calls["key"]
    assert not torch.equal(of_student, of_teacher)  # H and Y


def test_casa_is_equations_3_and_4():
    casa, visible, whole = CASA(6).eval(), torch.randn(1, 2, 6), torch.randn(1, 5, FEATURES)
    nn.init.normal_(casa.query.weight)
    nn.init.normal_(casa.key.weight)
    found, attention = casa(visible, whole)
    q = F.layer_norm(visible[0], (6,)) @ casa.query.weight.T
    k, v = (F.layer_norm(whole[0], (FEATURES,)) @ part.weight.T for part in (casa.key, casa.value))
    expected = torch.softmax(q @ k.T / FEATURES**0.5, dim=1)
    torch.testing.assert_close(attention[0], expected)
    projected = expected @ v @ casa.projection[0].weight.T
    torch.testing.assert_close(found[0], F.batch_norm(projected, None, None, training=True))


def test_l_dv_compares_queries_with_keys_and_l_st_each_with_itself():
    task, images = make_alice(similarity="cosine", casa=False), Volumes()
    batch = draw_batch(task, images)
    output = task(batch)
    cls, target = output.predicted_cls, output.target_cls
    terms = task.loss_terms(output, batch)
    across = [1 - F.cosine_similarity(cls[n], target[m], dim=0) for n, m in ((0, 2), (1, 3), (2, 0), (3, 1))]
    within = [1 - F.cosine_similarity(cls[n], target[n], dim=0) for n in range(4)]
    torch.testing.assert_close(terms["l_dv"], torch.stack(across).reshape(2, 2).mean(dim=1).sum())
    torch.testing.assert_close(terms["l_st"], torch.stack(within).reshape(2, 2).mean(dim=1).sum())


def test_queries_and_keys_can_change_places():
    task, images = make_alice(), Volumes()
    task.eval()
    batch = draw_batch(task, images)
    terms, others = terms_of(task, batch), terms_of(task, exchanged(batch))
    for name, term in terms.items():
        torch.testing.assert_close(others[name], term)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("progress", "momentum"), [(0.0, 0.996), (0.5, 0.998), (1.0, 1.0)])
def test_the_target_follows_with_the_stated_momentum(kind, progress, momentum):
    task, images = make_alice(kind), Volumes()
    batch = draw_batch(task, images)
    before = {name: value.clone() for name, value in task.target.named_parameters()}
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
        task.after_step(task(batch), batch, progress)
    parts = {"encoder": task.autoencoder.encoder_of(task), "tokens": task.autoencoder.tokens, "head": task.head}
    online = {f"{part}.{name}": value for part in parts for name, value in parts[part].named_parameters()}
    assert online.keys() == before.keys()
    for name, value in task.target.named_parameters():
        torch.testing.assert_close(value, momentum * before[name] + (1 - momentum) * online[name])


def test_a_step_moves_the_centre_of_cls_by_targets_and_that_of_tokens_by_casas_teacher():
    task, images = make_alice(similarity="dino"), Volumes()
    batch = draw_batch(task, images)
    output = task(batch)
    task.after_step(output, batch, 0.5)
    for centre, teacher in zip(task.centres, (output.target_cls, output.teacher), strict=True):
        torch.testing.assert_close(centre, moved_centre(torch.zeros(FEATURES), teacher.detach()))


def test_a_step_sets_the_teachers_temperature():
    task, images = make_alice(similarity="dino"), Volumes()
    batch = draw_batch(task, images)
    output = task(batch)
    for progress, expected in ((0.0, 0.008), (0.015, 0.009), (0.5, 0.01)):
        task.after_step(output, batch, progress)
        assert task.temperature.item() == pytest.approx(expected)


def test_pairs_that_are_not_accepted_do_not_count_in_l_dv():
    task, images = make_alice(), Volumes()
    quality = {ACCEPTED: [1.0, 0.0], TRIES: [3.0, 5.0], SIMILARITY: [0.9, 0.5], CYCLE: [2.0, 30.0]}
    batch = draw_batch(task, images) | {name: torch.tensor(values) for name, values in quality.items()}
    output = task(batch)
    terms = task.loss_terms(output, batch)
    cls, target = output.predicted_cls, output.target_cls
    counted = [1 - F.cosine_similarity(cls[n], target[m], dim=0) for n, m in ((0, 2), (2, 0))]
    torch.testing.assert_close(terms["l_dv"], torch.stack(counted).sum())
    shown = {name: round(terms[f"pairs_{name}"].item(), 4) for name in (ACCEPTED, SIMILARITY, CYCLE)}
    assert shown == {ACCEPTED: 0.125, SIMILARITY: 0.7, CYCLE: 16.0}


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ({"cls_std": 0.5}, []),
        ({"cls_std": 0.5, "pairs_accepted": 0.5}, []),
        ({"cls_std": 0.5, "pairs_accepted": 0.4}, ["only 40% of the matches are accepted"]),
        ({"cls_std": 0.001}, ["all crops look the same to the encoder"]),
        ({}, []),  # no step of the epoch was made
    ],
)
def test_what_is_warned_of(terms, expected):
    warnings = make_alice().warnings(terms)
    assert [text in warning for text, warning in zip(expected, warnings, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("hardness", HARDNESS_SCORES)
def test_a_teacher_may_choose_both_masks(hardness):
    task, images = make_alice(mask_source="anatomask", anatomask=TeacherConfig(hardness=hardness)), Volumes()
    batch = draw_batch(task, images)
    chosen = task.choose(batch, 1.0)
    for name in ("mask", "key_mask"):
        assert chosen[name].flatten(1).sum(dim=1).tolist() == [task.num_hidden] * 2
        assert not torch.equal(chosen[name], batch[name])
    assert torch.equal(chosen["key_crop"], batch["key_crop"])


def test_the_hardness_of_patches_is_that_of_the_queries():
    """The first half of the predictions belongs to them: there the published score is the error against the crop."""
    task, images = make_alice(mask_source="anatomask", anatomask=TeacherConfig(hardness="mixed")), Volumes()
    batch = draw_batch(task, images)
    output = task(batch)
    errors = task.patch_errors(output, batch)
    depth, height, width = task.patch_size
    first = (output.prediction[0, 0] - batch["crop"][0, 0])[:depth, :height, :width]
    torch.testing.assert_close(errors[0, 0, 0, 0], first.square().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_l_r_is_the_error_of_normalised_patches_of_queries_and_of_keys(kind):
    """Query and key hide different patches of different crops; with a NumPy loop over the patches (equation 1)."""
    task = make_alice(kind)
    batch = draw_batch(task, Volumes())
    assert not torch.equal(batch["mask"], batch["key_mask"])
    output = task(batch)
    expected = sum(
        _error_of_hidden_patches(half.detach().numpy(), *(batch[name].numpy() for name in names), task.patch_size)
        for half, names in zip(output.prediction.chunk(2), (("crop", "mask"), ("key_crop", "key_mask")), strict=True)
    )
    assert task.loss_terms(output, batch)["l_r"].item() == pytest.approx(expected, rel=1e-4)


def _error_of_hidden_patches(prediction, crop, mask, patch_size):
    errors = []
    for sample, *corner in np.argwhere(mask):
        place = tuple(slice(at * edge, (at + 1) * edge) for at, edge in zip(corner, patch_size, strict=True))
        patch = crop[(sample, 0, *place)]
        normalised = (patch - patch.mean()) / np.sqrt(patch.var() + 1e-6)
        errors.append(np.square(prediction[(sample, 0, *place)] - normalised).mean())
    return np.mean(errors)


def test_the_target_encoder_sees_the_turned_crop_with_other_intensities(monkeypatch):
    """Section 4.2: strong augmentation for the target only; the online encoder's crops are resized, as MAE's are."""
    task, placements = make_alice(matcher="same_volume"), {}
    for name in ("resized_crop", "turned_crop"):
        drawn = getattr(alice_views, name)
        monkeypatch.setattr(
            alice_views, name, lambda *given, name=name, drawn=drawn: placements.setdefault(name, drawn(*given))
        )
    monkeypatch.setattr(alice_views, "changed_intensities", lambda view, rng: 100 + view)
    images = Volumes()
    item = task.views().draw(images, "large", np.random.default_rng(0), mirror=True)
    volume = images.load("large")
    torch.testing.assert_close(item["crop"], view_of(volume, placements["resized_crop"]))
    torch.testing.assert_close(item["target"], 100 + view_of(volume, placements["turned_crop"]))


def test_without_augmentation_both_views_are_the_crop():
    task, images = make_alice(matcher="same_volume"), Volumes()
    batch = draw_batch(task, images, mirror=False)
    for name in ("target", "key_crop", "key_target"):
        torch.testing.assert_close(batch[name], batch["crop"], rtol=0, atol=0)


def test_cosine_loss_stops_the_gradient_of_the_teacher():
    student, teacher = (torch.tensor([[1.0, 2.0]], requires_grad=True) for _ in range(2))
    cosine_loss(student, teacher).sum().backward()
    assert teacher.grad is None


def test_dino_loss_is_the_cross_entropy_of_sharpened_features():
    student, teacher, centre = torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0]), torch.tensor([0.5, 0.0])
    target = np.exp([0.5 / 0.01, 0.0]) / np.exp([0.5 / 0.01, 0.0]).sum()
    logits = np.array([0.6, 0.8]) / 0.1
    expected = -(target * (logits - np.log(np.exp(logits).sum()))).sum()
    assert dino_loss(student, teacher, centre, 0.01).item() == pytest.approx(expected, rel=1e-4)


def test_centre_temperature_and_spread():
    moved = moved_centre(torch.tensor([1.0, 0.0]), torch.tensor([[[0.0, 2.0]], [[0.0, 5.0]]]))
    torch.testing.assert_close(moved, torch.tensor([0.9, 0.1]))
    assert [teacher_temperature(p) for p in (0, 0.03, 1)] == pytest.approx([0.008, 0.01, 0.01])
    assert spread(torch.ones(4, 8)) == 0
    assert spread(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])).item() == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_sees_the_whole_crop_as_the_encoder_would(kind):
    """At the start it is the online encoder, which is shown every patch."""
    task = make_alice(kind).eval()
    batch = draw_batch(task, Volumes())
    whole = torch.cat([batch["target"], batch["key_target"]])
    every = torch.arange(64).expand(len(whole), -1)
    with torch.no_grad():
        tokens = task.autoencoder.tokens(task.autoencoder.encoder_of(task), whole, every)
        torch.testing.assert_close(task(batch).target_cls, task.head(tokens).mean(dim=1))


@pytest.mark.parametrize(("kind", "name"), [("plain", "PlainConvUNet"), ("residual", "ResidualEncoderUNet")])
def test_another_network_is_refused(kind, name):
    with pytest.raises(ValueError, match=f"Alice pre-trains a ViT or a hybrid encoder, but the plans name {name}"):
        Alice.build(make_network(kind), CONFIG, TINY_CROP)


@pytest.mark.parametrize("matcher", ["embedding", "position"])
@pytest.mark.parametrize("partners", [["large", "large"], ["large", "thin"]])  # fold all; a validation case beside it
def test_a_single_image_to_train_on_is_refused_before_the_landmark_network_is(matcher, partners, monkeypatch):
    task, images = make_alice(matcher=matcher), Volumes()
    images.identifiers, images.partners = ["large"], partners
    monkeypatch.setattr("nnunet_topomae.methods.alice.task.prepare_landmarks", None)  # to call it would fail
    with pytest.raises(ValueError, match=r"^large is the only image"):
        task.prepare(images, torch.device("cpu"), print)
