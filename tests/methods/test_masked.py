"""What masked methods share; what each of them must do is in test_contract.py."""

import numpy as np
import pytest
import torch

from nnunet_topomae.methods.masked import HARDNESS_SCORES, TeacherConfig
from nnunet_topomae.methods.spark import AnatoMask, AnatoMaskConfig, SparK, SparKConfig
from tiny import TINY_CROP, Volumes, draw_batch, make_batch, make_crops, make_method, make_network


def test_the_momentum_rises_in_the_first_quarter():
    momenta = [TeacherConfig().momentum(progress, steps=250_000) for progress in (0, 0.125, 0.25, 1)]
    assert momenta == pytest.approx([0.999, 0.99945, 0.9999, 0.9999])


def test_a_teacher_averages_over_the_same_share_of_every_training():
    """1 / (1 - momentum) steps: 0.4 % of 2,500 steps are 10, 4 % are 100; nothing is averaged over less than one."""
    momenta = [TeacherConfig().momentum(progress, steps=2_500) for progress in (0, 1)]
    assert momenta == pytest.approx([1 - 1 / 10, 1 - 1 / 100])
    assert TeacherConfig().momentum(0, steps=100) == 0


def test_a_momentum_of_ones_own_does_not_depend_on_the_length():
    own = TeacherConfig(first_momentum=0.5, last_momentum=0.7)
    assert [own.momentum(0.125, steps) for steps in (100, 250_000)] == pytest.approx([0.6, 0.6])


def test_a_teacher_chooses_in_evaluation_mode():
    task, modes = make_method("AnatoMask").train(), []
    task.teacher.register_forward_pre_hook(lambda teacher, _: modes.extend(m.training for m in teacher.modules()))
    task.choose(draw_batch(task, Volumes()), 0.5)
    assert modes
    assert not any(modes)
    assert task.training


@pytest.mark.parametrize("progress", [0, 0.3, 1])
def test_a_teacher_hides_the_hardest_of_the_hidden_patches_and_random_others(progress, monkeypatch):
    """Section 3.3: the share of the hidden patches that are chosen by their error rises linearly from 0 to a half."""
    task = make_method("AnatoMask")
    batch = draw_batch(task, Volumes())
    drawn, order = (batch[name].flatten(1).numpy() for name in ("mask", "order"))
    errors = np.random.default_rng(0).permutation(drawn.size).reshape(drawn.shape) + 1.0
    errors[~drawn] += 1000  # visible patches are not compared, however hard they are
    monkeypatch.setattr(task.teacher, "patch_errors", lambda *_: torch.from_numpy(errors).reshape(batch["mask"].shape))
    chosen = task.choose(batch, progress)["mask"].flatten(1)
    num_hidden = drawn[0].sum()
    for sample in range(len(drawn)):
        hidden = sorted(np.flatnonzero(drawn[sample]), key=lambda patch: -errors[sample, patch])
        hardest = hidden[: int(num_hidden * 0.5 * progress)]
        others = sorted(set(range(drawn.shape[1])).difference(hardest), key=lambda patch: -order[sample, patch])
        expected = {*hardest, *others[: num_hidden - len(hardest)]}
        assert set(np.flatnonzero(chosen[sample].numpy())) == expected


@pytest.mark.parametrize("hardness", HARDNESS_SCORES)
def test_how_hard_a_patch_is_with_two_channels(hardness):
    """A NumPy loop over the patches; the prediction is of patches with mean 0 and deviation 1 in every channel."""
    config = AnatoMaskConfig(decoder_width=16, anatomask=TeacherConfig(hardness=hardness))
    task = AnatoMask.build(make_network("plain", 2, 2), config, TINY_CROP)
    crop = make_crops(1, channels=2)
    batch = make_batch(task, crop)
    output = task(batch)
    (prediction,) = (volume.detach().numpy()[0] for volume in output.values())
    errors = task.patch_errors(output, batch)[0].detach()
    for corner in np.ndindex(*errors.shape):
        place = tuple(slice(at * edge, (at + 1) * edge) for at, edge in zip(corner, task.patch_size, strict=True))
        by_channel = []
        for channel in range(2):
            predicted, true = prediction[(channel, *place)], crop[0].numpy()[(channel, *place)]
            mean, deviation = true.mean(), np.sqrt(true.var() + 1e-6)
            compared = {
                "denormalised": (predicted * deviation + mean, true),
                "normalised": (predicted, (true - mean) / deviation),
                "mixed": (predicted, true),
            }
            by_channel.append(np.square(np.subtract(*compared[hardness])).mean())
        assert errors[corner].item() == pytest.approx(np.mean(by_channel), rel=1e-4)


@pytest.mark.parametrize(("progress", "momentum"), [(0.0, 0.5), (0.125, 0.6), (0.25, 0.7), (1.0, 0.7)])
def test_a_teacher_follows_with_the_momentum_at_this_time_of_the_training(progress, momentum):
    config = AnatoMaskConfig(decoder_width=16, anatomask=TeacherConfig(first_momentum=0.5, last_momentum=0.7))
    task = AnatoMask.build(make_network("plain"), config, TINY_CROP)
    teacher, student = (dict(each.autoencoder.named_parameters()) for each in (task.teacher, task))
    with torch.no_grad():
        for name, parameter in student.items():
            teacher[name].fill_(0)
            parameter.fill_(1)
    task.after_step({}, {}, progress)
    for parameter in teacher.values():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 1 - momentum))


@pytest.mark.parametrize(("task_class", "config"), [(SparK, SparKConfig()), (AnatoMask, AnatoMaskConfig())])
def test_a_crop_that_the_patches_do_not_divide_is_refused(task_class, config):
    said = r"crop size \(16, 20, 36\) is not divisible by patch size \(4, 8, 8\); choose a crop size"
    with pytest.raises(ValueError, match=said):
        task_class.build(make_network("plain"), config, (16, 20, 36))
