import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gudhi import CubicalComplex
from gudhi.wasserstein import wasserstein_distance as gudhi_distance

from nnunet_topomae.topology import TopologicalLoss
from nnunet_topomae.topology import loss as loss_module
from nnunet_topomae.topology.loss import choose_grid, pool_to_grid
from nnunet_topomae.topology.persistence import persistence_pairs
from nnunet_topomae.transport.matching import match
from nnunet_topomae.transport.processes import Processes


def _gudhi_loss(a, b):
    """The paper's equation with gudhi, for one channel of one sample."""
    total = 0.0
    diagrams = []
    for volume in (a, b):
        complex_ = CubicalComplex(vertices=-volume)
        complex_.compute_persistence(min_persistence=0)
        diagrams.append([complex_.persistence_intervals_in_dimension(k).reshape(-1, 2) for k in range(3)])
        diagrams[-1][0][np.isinf(diagrams[-1][0])] = -volume.min()
    for x, y in zip(*diagrams, strict=True):
        total += gudhi_distance(x, y, order=2, internal_p=np.inf) ** 2
    return np.sqrt(total)


def test_is_the_mean_over_samples_and_channels_of_the_papers_equation():
    target, reconstruction = (torch.rand(2, 2, 6, 7, 5, dtype=torch.float64) for _ in range(2))
    expected = np.mean(
        [_gudhi_loss(target[i, c].numpy(), reconstruction[i, c].numpy()) for i in range(2) for c in range(2)]
    )
    assert TopologicalLoss()(target, reconstruction)[0].item() == pytest.approx(expected, rel=1e-9)


def test_several_reconstructions_share_a_target():
    target, a, b = (torch.rand(1, 1, 5, 5, 5) for _ in range(3))
    loss = TopologicalLoss()
    together = loss(target, a, b)
    assert [t.item() for t in together] == [loss(target, a)[0].item(), loss(target, b)[0].item()]


def test_gradient_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    values = torch.randperm(125, generator=generator).double() / 125  # no ties within an interval of eps
    target = torch.rand(1, 1, 5, 5, 5, generator=generator, dtype=torch.float64)
    reconstruction = values.reshape(1, 1, 5, 5, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: TopologicalLoss()(target, r)[0], (reconstruction,), eps=1e-6)


def test_constant_volumes_and_equal_volumes_give_zero_without_nan():
    for target in (torch.full((1, 1, 4, 4, 4), 0.5), torch.rand(1, 1, 4, 4, 4)):
        reconstruction = target.clone().requires_grad_()
        (distance,) = TopologicalLoss()(target, reconstruction)
        distance.backward()
        assert distance.item() == 0
        assert reconstruction.grad.abs().sum().item() == 0


def test_half_precision_is_computed_in_float32():
    target = torch.rand(1, 1, 4, 4, 4).half()
    assert TopologicalLoss()(target, target.clone())[0].dtype == torch.float32


def test_grid_that_divides_is_a_mean_over_cells():
    crop = torch.rand(2, 1, 8, 6, 4)
    assert torch.allclose(pool_to_grid(crop, (4, 2, 4)), F.avg_pool3d(crop, (2, 3, 1)))


def test_grid_that_does_not_divide_has_a_smaller_last_cell():
    crop = torch.arange(5.0).reshape(1, 1, 5, 1, 1)
    assert pool_to_grid(crop, (3, 1, 1)).flatten().tolist() == [0.5, 2.5, 4.0]


@pytest.mark.parametrize("grid", [(16, 8, 8), (5, 8, 8)])
def test_grid_that_cannot_be_had_is_refused(grid):
    with pytest.raises(ValueError, match="does not fit a crop of"):
        pool_to_grid(torch.zeros(1, 1, 8, 8, 8), grid)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="reconstruction 1 has shape"):
        TopologicalLoss()(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 5))


@pytest.mark.parametrize("num_threads", [1, 4])
def test_threads_change_nothing(num_threads):
    target, a, b = (torch.rand(2, 1, 6, 6, 6) for _ in range(3))
    expected = TopologicalLoss(num_threads=2)(target, a, b)
    assert [t.item() for t in TopologicalLoss(num_threads=num_threads)(target, a, b)] == [t.item() for t in expected]


def test_processes_change_nothing(monkeypatch):
    target, a, b = (torch.rand(2, 1, 6, 6, 6) for _ in range(3))
    a.requires_grad_()
    expected = TopologicalLoss()(target, a, b)
    asked, in_process = [], Processes.run

    def run(processes, function, *arguments):
        asked.append(function)
        return in_process(processes, function, *arguments)

    monkeypatch.setattr(Processes, "run", run)
    losses = TopologicalLoss(num_processes=1)(target, a, b)
    assert asked == [match] * 12  # 2 samples, 2 reconstructions, 3 dimensions
    assert [each.item() for each in losses] == [each.item() for each in expected]
    assert torch.equal(*(torch.autograd.grad(each[0], a)[0] for each in (losses, expected)))


@pytest.mark.parametrize(
    ("arguments", "device", "number"),
    [
        ({"num_threads": 16}, "cuda", 6),
        ({"num_threads": 2}, "cuda", 2),
        ({"num_threads": 16}, "cpu", 0),
        ({"num_processes": 0}, "cuda", 0),
        ({"num_processes": 9}, "cpu", 9),
    ],
)
def test_processes_are_for_gpus_unless_a_number_is_given(arguments, device, number):
    assert TopologicalLoss(**arguments).processes_for(torch.device(device)) == number


def test_tolerance_bounds_the_loss():
    target, reconstruction = torch.rand(1, 1, 10, 10, 10), torch.rand(1, 1, 10, 10, 10)
    exact, near = (TopologicalLoss(tolerance=t)(target, reconstruction)[0].item() for t in (0.0, 0.05))
    assert exact * (1 - 1e-6) <= near <= exact * 1.05


def test_start_returns_before_the_threads_are_done(monkeypatch):
    asked, working = threading.Event(), threading.Event()

    def slow_pairs(array):
        working.set()
        assert asked.wait(30)
        return persistence_pairs(array)

    monkeypatch.setattr(loss_module, "persistence_pairs", slow_pairs)
    target, reconstruction = (torch.rand(1, 1, 5, 5, 5) for _ in range(2))
    pending = TopologicalLoss(num_threads=1).start(target).compare(reconstruction)  # would not return if it waited
    assert working.wait(30)
    asked.set()
    value = pending.result()
    monkeypatch.undo()
    assert value.item() == TopologicalLoss()(target, reconstruction)[0].item()


def test_nan_is_raised_with_the_result():
    target = torch.rand(1, 1, 4, 4, 4)
    pending = TopologicalLoss().start(target).compare(torch.full_like(target, torch.nan))
    with pytest.raises(ValueError, match="NaN or inf"):
        pending.result()


def test_callers_may_change_their_tensors_before_the_loss_is_read():
    target, reconstruction = torch.rand(2, 1, 1, 6, 6, 6)
    expected = TopologicalLoss()(target, reconstruction)[0].item()
    started = TopologicalLoss().start(target)
    target.zero_()
    pending = started.compare(reconstruction)
    reconstruction.zero_()
    assert pending.result().item() == expected


def test_small_values_have_a_small_loss_and_gradient():
    target, reconstruction = torch.rand(2, 1, 1, 8, 8, 8)
    scaled = (reconstruction * 1e-6).requires_grad_()
    (expected,), (loss,) = TopologicalLoss()(target, reconstruction), TopologicalLoss()(target * 1e-6, scaled)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item() * 1e-6, rel=1e-5)
    assert scaled.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 2}, "tolerance must be at least 0 and below 1, got 2"),
        ({"tolerance": float("nan")}, "tolerance must be"),
        ({"grid": (4, 4)}, r"grid must be None or three numbers of cells of at least 1, got \(4, 4\)"),
        ({"grid": (0, 4, 4)}, "grid must be None or three numbers"),
        ({"num_threads": 0}, "num_threads must be None or at least 1, got 0"),
        ({"num_processes": -1}, "num_processes must be None or at least 0, got -1"),
    ],
)
def test_ill_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopologicalLoss(**arguments)


@pytest.mark.parametrize(
    ("target", "reconstruction", "message"),
    [
        (torch.zeros(8, 8, 8), torch.zeros(8, 8, 8), "the target must be a floating point tensor of shape"),
        (torch.zeros(1, 0, 8, 8, 8), torch.zeros(1, 0, 8, 8, 8), "that is not empty"),
        (torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4, dtype=int), "reconstruction 1 must be a floating"),
        (torch.zeros(1, 1, 4, 4, 4), torch.full((1, 1, 4, 4, 4), torch.nan), "reconstruction 1 holds NaN or inf"),
        (torch.full((1, 1, 4, 4, 4), torch.inf), torch.zeros(1, 1, 4, 4, 4), "the target holds NaN or inf"),
    ],
)
def test_ill_crops(target, reconstruction, message):
    with pytest.raises(ValueError, match=message):
        TopologicalLoss()(target, reconstruction)


def test_a_grid_that_does_not_fit_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match=r"use \(16, 16, 16\) or another grid of whole cells"):
        TopologicalLoss(grid=(24, 24, 24))(*torch.rand(2, 1, 1, 32, 32, 32))


def test_chosen_grid():
    assert choose_grid((96, 96, 96), (1, 1, 1)) == (24, 24, 24)
    assert choose_grid((24, 24, 24), (1, 1, 1)) is None
    assert choose_grid((16, 160, 160), (10, 1.5, 1.5)) == (16, 27, 27)
    assert choose_grid((32, 128, 128), (3, 3, 3)) == (8, 32, 32)
