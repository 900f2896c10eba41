"""Initial weights, applied by nnU-Net as ``network.apply(network.initialize)``."""

from torch import nn


def initialize(module: nn.Module) -> None:
    """Truncated normal of sigma 0.02 for linear layers, as published; convolutions keep PyTorch's own.

    nnU-Net's He initialisation would multiply the features at every EPA block, whose skip no norm follows.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
