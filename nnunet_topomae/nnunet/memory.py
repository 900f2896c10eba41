"""How much GPU memory a training step takes, found by tracing it without computing anything."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

GIB = 2**30

_STATE_BYTES = 16  # per parameter: float32 weight, gradient and two moments of AdamW
_CONTEXT = 0.6 * GIB  # CUDA context and cuDNN workspaces
_TEMPORARIES = 1.15  # activations' gradients during the backward pass and fragmentation


def training_memory(build: Callable[[], nn.Module], step: Callable[[nn.Module], Tensor], batch_size: int) -> float:
    """Estimated peak of a mixed-precision training step on CUDA, in bytes.

    Counts what autograd keeps for the backward pass of one sample, on tensors without storage, times the batch size,
    plus the state of weights and AdamW. PyTorch disables CUDA's autocast where there is no GPU, so the CPU's stands in
    and plans do not depend on the machine they are made on.

    Args:
        build: makes the network.
        step: the forward pass of a batch of one.
        batch_size: samples of a step.
    """
    with FakeTensorMode(), torch.device("cpu"):
        network = build()
        states = sum(p.numel() * _STATE_BYTES for p in network.parameters() if p.requires_grad)
        states += sum(p.numel() * 4 for p in network.parameters() if not p.requires_grad)
        activations = _saved_bytes(network, step)
    return states + _CONTEXT + _TEMPORARIES * batch_size * activations


def _saved_bytes(network: nn.Module, step: Callable[[nn.Module], Tensor]) -> int:
    """Bytes of distinct storages that autograd saves, without the parameters themselves."""
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    saved: dict[int, Tensor] = {}

    def remember(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        step(network)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
