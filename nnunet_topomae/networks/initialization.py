"""Initial weights, applied by nnU-Net as ``network.apply(network.initialize)``."""

from torch import nn


def initialize(module: nn.Module) -> None:
    """Truncated normal of sigma 0.02 for linear layers, as published; convolutions keep PyTorch's own.

    nnU-Net's He initialisation is not used: no norm follows the skip connection of an EPA block, so features would grow
    from block to block.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
