"""How much memory a training step takes, found by tracing it without computing anything."""

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30

_TRAINED_BYTES = 12  # per parameter: float32 weight and two moments of AdamW
_FROZEN_BYTES = 4
_GRADIENT_BYTES = 4
_OPTIMISER_BYTES = 4  # temporaries of AdamW on CUDA, which updates all parameters at once
CONTEXT = 0.6 * GIB  # CUDA context and cuDNN workspaces


def trace_step(build: Callable[[], nn.Module], loss: Callable[[Any], Tensor], *, cuda: bool = True) -> float:
    """The most bytes that a training step takes at once.

    Forward and backward pass run on tensors without storage, and what is alive is followed.

    Args:
        build: makes the network.
        loss: computes the loss of a batch, a scalar, with the network.
        cuda: true for a step in mixed precision on CUDA, false for one in float32 on the CPU. PyTorch switches CUDA's
            autocast off where there is no GPU. The CPU's is used in its place, so that plans are the same on any
            machine.
    """
    autocast = torch.autocast("cpu", torch.bfloat16) if cuda else nullcontext()
    with _FakeTensorMode(), torch.device("cpu"):
        network = build()
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
        with _LiveMemory((*network.parameters(), *network.buffers())) as live:
            with autocast:
                value = loss(network)
            value.backward()
        num_trained = sum(parameter.numel() for parameter in trained)
        num_frozen = sum(tensor.numel() for tensor in network.state_dict().values()) - num_trained
    update = num_trained * (_GRADIENT_BYTES + cuda * _OPTIMISER_BYTES)
    return num_trained * _TRAINED_BYTES + num_frozen * _FROZEN_BYTES + cuda * CONTEXT + max(live.peak, update)


def largest_batch(needed: Callable[[int], float], target: float, smallest: int, limit: float) -> int:
    """The largest batch that fits into the memory.

    Once activations outweigh the optimiser's temporaries, memory grows along a straight line with the batch. So the
    search goes at once to where the line through the last two batches meets the target.

    Args:
        needed: bytes that a step with a batch of some size takes; asked for the same size more than once.
        target: bytes that there are.
        smallest: size of a batch that fits; taken even if it is above the limit.
        limit: the batch is not to be larger.
    """
    batch_size, step = smallest, 1
    while step > 0:
        larger = batch_size + step
        if larger > limit or needed(larger) > target:
            step //= 2
            continue
        bytes_per_crop = (needed(larger) - needed(batch_size)) / step
        batch_size = larger
        step = max(int((target - needed(larger)) / bytes_per_crop), 1) if bytes_per_crop > 0 else larger
    return batch_size


class _FakeTensorMode(FakeTensorMode):
    """The one mode, also for copies of modules, such as teachers: tensors of different modes cannot be mixed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FakeTensorMode":
        return self


def _forget_gradient(parameter: Tensor) -> None:
    """Drop the gradient of a weight as soon as it is there; all of them are counted apart.

    They grow while activations are freed, so together they are largest when no activation is left.
    """
    parameter.grad = None


class _LiveMemory(TorchDispatchMode):
    """Follows the storages that operations make, until they are freed.

    Args:
        own: tensors of the network, which are not counted, nor are views of them.

    Attributes:
        peak: the most bytes that were alive at once.
    """

    def __init__(self, own: Iterable[Tensor]):
        super().__init__()
        self.peak = 0
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._alive: dict[int, int] = {}  # bytes of every storage
        self._total = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive and key not in self._own:
            self._alive[key] = storage.nbytes()
            self._total += self._alive[key]
            self.peak = max(self.peak, self._total)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._total -= self._alive.pop(key)
