"""Initial weights, applied by nnU-Net as ``network.apply(network.initialize)``."""

from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

_NEGATIVE_SLOPE = 1e-2


def initialize(module: nn.Module) -> None:
    """He initialisation of convolutions as in nnU-Net, truncated normal of sigma 0.02 for linear layers."""
    InitWeights_He(_NEGATIVE_SLOPE)(module)
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
