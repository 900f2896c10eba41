"""What masked methods share; what each of them must do is in test_contract.py."""

import pytest
import torch

from nnunet_topomae.methods.masked import TeacherConfig
from nnunet_topomae.methods.spark import AnatoMask, AnatoMaskConfig, SparK, SparKConfig
from tiny import TINY_CROP, Volumes, draw_batch, make_method, make_network


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
