"""Initial weights, applied by nnU-Net as ``network.apply(network.initialize)``."""

from torch import nn

from nnunet_topomae.networks.vit import ViTEncoder


def initialize(module: nn.Module) -> None:
    """Truncated normal of sigma 0.02 for linear layers, as in UNETR++; ViTs have a rule of their own.

    The published UNETR++ does so in its encoder only, and leaves its decoder as PyTorch made it. Convolutions keep
    PyTorch's initial weights. nnU-Net's He initialisation is not used: no norm follows the skip connection of an EPA
    block, so features would grow from block to block. ``apply`` comes to a ViT after its parts, so that the ViT's own
    rule, :meth:`ViTEncoder.initialize`, has the last word.
    """
    if isinstance(module, ViTEncoder):
        module.initialize()
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
