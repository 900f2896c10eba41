import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR

from nnunet_topomae.nnunet.training.schedule import learning_rate_factor


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [(0, 1 / 10), (8, 9 / 10), (9, 1.0), (10, 1.0), (60, 0.5), (110, 0.0)],
)
def test_warm_up_and_cosine(iteration, expected):
    assert learning_rate_factor(iteration, warmup=10, total=110) == pytest.approx(expected, abs=1e-12)


def _rates(make, steps):
    """The learning rates that a scheduler of another library sets, step by step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for step in range(steps):
        if isinstance(scheduler, PolyLRScheduler):  # stepped before each epoch, as nnU-Net does
            scheduler.step(step)
            rates.append(optimizer.param_groups[0]["lr"])
        else:
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("shape", "make"),
    [
        ("poly", lambda optimizer: PolyLRScheduler(optimizer, 1.0, 20)),
        ("cosine", lambda optimizer: CosineAnnealingLR(optimizer, T_max=20)),
    ],
)
def test_shapes_are_those_of_nnunet_and_torch(shape, make):
    ours = [learning_rate_factor(step, 0, 20, shape) for step in range(20)]
    assert ours == pytest.approx(_rates(make, 20), abs=1e-12)


def test_a_warm_up_of_part_of_a_step_does_not_exceed_the_full_rate():
    assert [learning_rate_factor(step, 2.5, 10) for step in range(3)] == pytest.approx([0.4, 0.8, 1.0])
