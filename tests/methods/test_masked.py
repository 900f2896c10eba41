"""What masked methods share; what each of them must do is in test_contract.py."""

from dataclasses import replace

import pytest
import torch

from nnunet_topomae.methods.masked import TeacherConfig
from tiny import Volumes, make_spark


def _warnings(**settings):
    said = []
    make_spark(**settings).prepare(Volumes(), torch.device("cpu"), said.append)
    return said


def test_the_momentum_rises_in_the_first_quarter():
    momenta = [TeacherConfig().momentum(progress) for progress in (0, 0.125, 0.25, 1)]
    assert momenta == pytest.approx([0.999, 0.99945, 0.9999, 0.9999])


def test_a_teacher_that_follows_too_slowly_is_warned_of():
    """Ten epochs of 150 steps leave 0.999 ** 150 * 0.99936 ** 150 * 0.99972 ** 150 * 0.9999 ** 1050 of the start."""
    (said,) = _warnings(mask_source="anatomask", num_epochs=10, num_iterations_per_epoch=150)
    assert "after 1500 steps the teacher that chooses masks still keeps 67% of its random first weights" in said
    assert "set first_momentum and last_momentum of pretraining.anatomask in the plans to 0.9867" in said


def test_no_warning_where_the_teacher_can_follow():
    assert not _warnings(mask_source="anatomask", num_epochs=100, num_iterations_per_epoch=250)
    assert not _warnings(mask_source="random", num_epochs=10, num_iterations_per_epoch=150)
    followed = replace(TeacherConfig(), first_momentum=0.9867, last_momentum=0.9867)
    assert not _warnings(mask_source="anatomask", anatomask=followed, num_epochs=10, num_iterations_per_epoch=150)
