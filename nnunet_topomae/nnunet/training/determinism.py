"""Same input, same output on a GPU, as far as PyTorch goes; on a CPU this is always so."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import cudnn
from torch.nn.attention import SDPBackend, sdpa_kernel

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # environment variable, read when cuBLAS is used for the first time
_FIXED_WORKSPACE = ":4096:8"


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """For a while, let GPUs compute in an order that is the same in every run; then all is set as it was before.

    - PyTorch takes deterministic algorithms, and warns of every operation that has none. It is not told to raise an
      error there, as those in question give the same weights all the same: the cross entropy, of which the printed
      value is summed up in any order, and the average pooling of residual U-Nets, whose windows do not overlap.
    - cuDNN does not choose its algorithms by timing, which nnU-Net's command lets it do.
    - cuBLAS has a workspace of fixed size, unless ``CUBLAS_WORKSPACE_CONFIG`` is set already.
    - Attention is computed step by step: the backward passes of the fused kernels add up in any order.
    """
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    chosen_by_timing, fixed = cudnn.benchmark, cudnn.deterministic
    workspace = os.environ.get(_WORKSPACE)
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark, cudnn.deterministic = False, True
    os.environ.setdefault(_WORKSPACE, _FIXED_WORKSPACE)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if workspace is None:
            del os.environ[_WORKSPACE]
        cudnn.benchmark, cudnn.deterministic = chosen_by_timing, fixed
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
