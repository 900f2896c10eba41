"""Convolution blocks that several networks share."""

from collections.abc import Sequence
from typing import Any

from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from torch import nn

from nnunet_topomae.networks.geometry import size_of

_RESIDUAL: dict[str, Any] = {
    "conv_op": nn.Conv3d,
    "kernel_size": 3,
    "stride": 1,
    "conv_bias": False,
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"negative_slope": 0.01, "inplace": True},
}


def residual_block(input_channels: int, output_channels: int, norm: type[nn.Module] = nn.InstanceNorm3d) -> BasicBlockD:
    """Two 3^3 convolutions with norm and LeakyReLU, and a skip connection around them.

    The instance norm that is used by default has no learned scale and shift.
    """
    return BasicBlockD(input_channels=input_channels, output_channels=output_channels, norm_op=norm, **_RESIDUAL)


def upsampling(input_channels: int, output_channels: int, stride: Sequence[int]) -> nn.ConvTranspose3d:
    """A transposed convolution without bias whose kernel equals its stride, so that no outputs overlap."""
    return nn.ConvTranspose3d(input_channels, output_channels, size_of(stride), size_of(stride), bias=False)
