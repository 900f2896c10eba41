import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from nnunet_topomae.methods.topomae import TopoMAE
from nnunet_topomae.networks import FusedViTUNETRPP
from nnunet_topomae.nnunet.planning.memory import CONTEXT, largest_batch, trace_step
from nnunet_topomae.nnunet.planning.traces import StepSizes, trace_finetuning, trace_pretraining
from tiny import TINY_NETWORK

WIDTH, BATCH = 1000, 500


class Wide(nn.Module):
    """Keeps its input for the gradient of its weight."""

    def __init__(self, frozen=False):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.linear.requires_grad_(not frozen)
        self.other = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x):
        return self.other(self.linear(x)).sum()


def _loss(batch_size):
    return lambda network: network(torch.empty(batch_size, WIDTH))


def test_many_samples_are_bound_by_their_activations():
    peak = trace_step(Wide, _loss(100 * BATCH), cuda=False)
    weights = WIDTH * WIDTH + WIDTH
    activation = 4 * 100 * BATCH * WIDTH
    # input, output of the first layer, and its gradient; the rest is a column of numbers
    assert peak == pytest.approx(12 * weights + 3 * activation, rel=0.01)


def test_few_samples_are_bound_by_the_update_of_the_weights():
    peak = trace_step(Wide, _loss(1), cuda=False)
    weights = WIDTH * WIDTH + WIDTH
    assert peak == pytest.approx(16 * weights, rel=0.01)  # weights, gradients and two moments
    assert trace_step(Wide, _loss(1), cuda=True) == pytest.approx(20 * weights + CONTEXT, rel=0.01)


def test_frozen_weights_have_neither_gradients_nor_moments():
    peak = trace_step(lambda: Wide(frozen=True), _loss(1), cuda=False)
    assert peak == pytest.approx(4 * WIDTH * WIDTH + 16 * WIDTH, rel=0.01)


@pytest.mark.parametrize("trace", [partial(trace_pretraining, TopoMAE), trace_finetuning])
def test_steps_of_real_networks(trace):
    few = StepSizes(FusedViTUNETRPP, json.dumps(TINY_NETWORK), num_channels=1, num_classes=3, batch_size=4)
    many = replace(few, batch_size=16)
    full = trace(replace(many, cuda=False))
    assert CONTEXT < trace(few) < trace(many)
    assert trace(many) - CONTEXT < full  # half precision takes less


@pytest.mark.parametrize(
    ("needed", "target", "limit", "expected"),
    [
        (lambda n: 5 + 3 * n, 100, float("inf"), 31),  # a line: 98 fit, 101 do not
        (lambda n: max(90, 3 * n), 100, float("inf"), 33),  # what does not depend on the batch outweighs small ones
        (lambda n: max(50 + n, 10 * n), 100, float("inf"), 10),
        (lambda n: 5 + 3 * n, 100, 9.5, 9),
        (lambda n: 5 + 3 * n, 100, 0.5, 2),  # never less than the smallest
        (lambda n: 50 * n, 100, float("inf"), 2),
    ],
)
def test_largest_batch(needed, target, limit, expected):
    assert largest_batch(needed, target, 2, limit) == expected


def test_few_traces_find_a_large_batch():
    traced = set()

    def needed(batch_size):
        traced.add(batch_size)
        return 5 + 3 * batch_size

    assert largest_batch(needed, 3005, 2, float("inf")) == 1000
    assert len(traced) <= 4
