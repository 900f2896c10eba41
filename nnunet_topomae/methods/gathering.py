"""What a method needs of a whole batch, where several processes share it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(rows: Tensor) -> Tensor:
    """The rows of the whole batch, of which every process has made a share; those of this process if it is alone.

    Gradients flow to the rows of all processes. So a loss over the whole batch, such as one that contrasts its items,
    has the gradient that it would have in a single process, if every process computes it.

    Args:
        rows: (B, ...), as many in every process.

    Returns:
        (B x number of processes, ...), in the order of the batch that a single process would have.
    """
    return _Gather.apply(rows) if dist.is_available() and dist.is_initialized() else rows


class _Gather(torch.autograd.Function):
    """Process r of W has items r, r + W, r + 2W ... of the batch; see StreamSampler."""

    @staticmethod
    def forward(_: Any, rows: Tensor) -> Tensor:
        shares = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, rows.contiguous())
        return torch.stack(shares, dim=1).flatten(0, 1)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # a sum, which DDP's mean over the processes divides again
        return gradient[dist.get_rank() :: dist.get_world_size()]
