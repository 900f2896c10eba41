"""Training by several processes on any device, where nnU-Net knows CUDA and a single machine."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from nnunet_topomae.transport.processes import usable_cores


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among those that train together, counted from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def in_any_process(here: bool, device: torch.device) -> bool:
    """Whether something is so in any of the processes that train together; all of them have to ask.

    Args:
        here: whether it is so in this one.
        device: of this process.
    """
    if world_size() == 1:
        return here
    anywhere = torch.tensor(float(here), device=device)
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    return bool(anywhere)


def place(trainer: nnUNetTrainer, device: torch.device) -> None:
    """Let a trainer compute on its share of its machine: one GPU, or some of the cores.

    nnU-Net takes the GPU whose number is that of the process, which is right on the first machine only. ``torchrun``
    says in ``LOCAL_RANK`` which process of its machine this is.

    Args:
        trainer: of a process that trains together with others.
        device: of the kind to be used.
    """
    if device.type == "cuda":
        trainer.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", dist.get_rank())))
        return
    trainer.device, trainer.grad_scaler = device, None
    torch.set_num_threads(max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def distribute(network: nn.Module, device: torch.device, *, sync_batch_norm: bool) -> DistributedDataParallel:
    """A network whose gradients are the means over all processes.

    Args:
        network: on its device.
        device: that of the network.
        sync_batch_norm: whether BatchNorm computes its statistics over the whole batch, as in a single process, and not
            over the share of each process.
    """
    on_gpu = device.type == "cuda"
    if sync_batch_norm:
        if on_gpu:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        _join_batch_norms(norm for norm in _batch_norms(network) if not on_gpu or norm.running_mean is None)
    # buffers are the same everywhere already, and evaluation must not wait for processes with fewer cases
    return DistributedDataParallel(network, device_ids=[device.index] if on_gpu else None, broadcast_buffers=False)


def unwrap(network: nn.Module) -> Any:
    """The module inside DDP's and torch.compile's wrappers."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def seed_step(*seed: int) -> None:
    """Seed what is random in a step by some integers, such as seed, step and process.

    So nothing has to be restored when a run goes on, also with another number of processes.
    """
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1)))


class JoinedBatchNorm(_BatchNorm):
    """BatchNorm over the batch of all processes, on any device.

    ``nn.SyncBatchNorm`` refuses a CPU; in evaluation without running statistics it takes those of a process's share.

    Attributes:
        alone: whether this process evaluates by itself, see :func:`alone`.
    """

    alone: bool = False

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # done by the layer that this one stands for

    def forward(self, input: Tensor) -> Tensor:
        """The input (B, C, ...), normalised per channel."""
        if self.alone or not (self.training or self.running_mean is None):
            return super().forward(input)
        running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(input.ndim)]
        count = input.numel() / input.shape[1] * world_size()
        values = input.to(torch.promote_types(input.dtype, torch.float32))  # also in mixed precision
        mean = _Sum.apply(values.sum(axes)) / count
        deviations = values - mean.reshape(shape)
        variance = _Sum.apply(deviations.square().sum(axes)) / count
        if running_mean is not None and running_var is not None and batches is not None:
            with torch.no_grad():
                batches += 1
                momentum = 1 / float(batches) if self.momentum is None else self.momentum
                running_mean.lerp_(mean, momentum)
                running_var.lerp_(variance * count / (count - 1), momentum)
        normalised = deviations * (variance + self.eps).rsqrt().reshape(shape)
        if self.affine:
            normalised = normalised * self.weight.reshape(shape) + self.bias.reshape(shape)
        return normalised.to(input.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes; each gets the sum of all gradients."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return _all_reduced(values)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient)


def _all_reduced(values: Tensor) -> Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values)
    return values


def _batch_norms(network: nn.Module) -> Iterator[_BatchNorm]:
    return (module for module in network.modules() if isinstance(module, _BatchNorm))


def _join_batch_norms(norms: Iterable[_BatchNorm]) -> None:
    """Let them compute over the batch of all processes; parameters stay the same objects."""
    for norm in norms:
        norm.__class__ = JoinedBatchNorm


@contextmanager
def alone(network: nn.Module) -> Iterator[None]:
    """Let this process evaluate a network without waiting for the others."""
    joined = [norm for norm in _batch_norms(network) if isinstance(norm, JoinedBatchNorm)]
    for norm in joined:
        norm.alone = True
    try:
        yield
    finally:
        for norm in joined:
            norm.alone = False
