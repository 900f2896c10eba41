"""How much GPU memory a training step takes, found by tracing it without computing anything."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

GIB = 2**30

_STATE_BYTES = 16  # per parameter: float32 weight, gradient and two moments of AdamW
_CONTEXT = 0.6 * GIB  # CUDA context and cuDNN workspaces
_TEMPORARIES = 1.15  # activations' gradients during the backward pass and fragmentation


class StepMemory(NamedTuple):
    """Estimated memory of a mixed-precision training step on CUDA, in bytes.

    Attributes:
        fixed: weights, gradients, state of AdamW, CUDA context.
        per_sample: activations of one sample.
    """

    fixed: float
    per_sample: float

    def peak(self, batch_size: int) -> float:
        """Estimated peak of a step."""
        return self.fixed + batch_size * self.per_sample


def trace_step(build: Callable[[], nn.Module], step: Callable[[nn.Module], Any]) -> StepMemory:
    """Trace a forward pass on tensors without storage and count what autograd keeps for the backward pass.

    PyTorch disables CUDA's autocast where there is no GPU, so the CPU's stands in and plans do not depend on the
    machine they are made on.

    Args:
        build: makes the network.
        step: its forward pass on one sample.
    """
    with FakeTensorMode(), torch.device("cpu"):
        network = build()
        states = sum(p.numel() * _STATE_BYTES for p in network.parameters() if p.requires_grad)
        states += sum(p.numel() * 4 for p in network.parameters() if not p.requires_grad)
        activations = _saved_bytes(network, step)
    return StepMemory(states + _CONTEXT, _TEMPORARIES * activations)


def _saved_bytes(network: nn.Module, step: Callable[[nn.Module], Any]) -> int:
    """Bytes of distinct storages that autograd saves, without the parameters themselves."""
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    saved: dict[int, Tensor] = {}

    def remember(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        step(network)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
