"""The light decoder of SparK (Tian et al., section 3.2), which reconstructs from the features of visible patches."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from timm.layers import trunc_normal_
from torch import Tensor, nn

from nnunet_topomae.methods.masked_convolution import HiddenPatches, masked_instance_norm
from nnunet_topomae.networks.geometry import size_of

_MIN_WIDTH, _WIDEST_STAGE = 8, 4


class Densify(nn.Module):
    """Fills hidden positions of a feature map with a learned token per channel, after a norm, and projects it.

    Args:
        channels: of the feature map.
        output_channels: of the decoder at the scale of the feature map.
        deepest: whether this is the coarsest scale. Its projection is a 1^3 convolution, or none if the channels
            agree; at other scales it is a 3^3 convolution.
    """

    def __init__(self, channels: int, output_channels: int, deepest: bool):
        super().__init__()
        self.norm = nn.InstanceNorm3d(channels, affine=True)
        self.mask_token = nn.Parameter(trunc_normal_(torch.zeros(1, channels, 1, 1, 1), std=0.02))
        size = 1 if deepest else 3
        self.projection = (
            nn.Identity()
            if deepest and channels == output_channels
            else nn.Conv3d(channels, output_channels, size, padding=size // 2)
        )

    def no_weight_decay(self) -> set[str]:
        """The mask token."""
        return {"mask_token"}

    def forward(self, features: Tensor, visible: Tensor | None) -> Tensor:
        """Fill and project a feature map.

        Args:
            features: (B, channels, d, h, w).
            visible: (B, 1, d, h, w) bool; None if everything is.

        Returns:
            (B, output_channels, d, h, w).
        """
        if visible is None:
            visible = torch.ones_like(features[:, :1], dtype=torch.bool)
        normalised = masked_instance_norm(features, visible, self.norm)
        return self.projection(torch.where(visible, normalised, self.mask_token.to(normalised.dtype)))


class DecoderStage(nn.Module):
    """Upsampling by a transposed convolution (4^3 for a stride of 2), then conv, norm, ReLU6, conv, norm."""

    def __init__(self, input_channels: int, output_channels: int, stride: Sequence[int]):
        super().__init__()
        kernel = size_of(2 + step if step > 1 else 3 for step in stride)
        padding = size_of((size - step) // 2 for size, step in zip(kernel, stride, strict=True))
        self.upsample = nn.ConvTranspose3d(input_channels, input_channels, kernel, size_of(stride), padding)
        block = {"conv_op": nn.Conv3d, "input_channels": input_channels, "kernel_size": 3, "stride": 1}
        block |= {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}}
        self.blocks = nn.Sequential(
            ConvDropoutNormReLU(output_channels=input_channels, nonlin=nn.ReLU6, **block),
            ConvDropoutNormReLU(output_channels=output_channels, **block),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, input_channels, d, h, w) to (B, output_channels, d * stride, ...)."""
        return self.normalise(self.before_norm(x))

    def before_norm(self, x: Tensor) -> Tensor:
        """All but the last norm."""
        return self._last.conv(self.blocks[0](self.upsample(x)))

    def normalise(self, x: Tensor) -> Tensor:
        """The last norm, after which the mean over a volume is the same for all volumes."""
        return self._last.norm(x)

    @property
    def _last(self) -> ConvDropoutNormReLU:
        return cast(ConvDropoutNormReLU, self.blocks[1])


class SparKDecoder(nn.Module):
    """From the densified features of all scales but the finest to a reconstruction; skips are added.

    Args:
        features_per_stage: channels of the encoder's stages, finest first.
        strides: of the encoder's stages; the first is 1 on every axis.
        width: channels at the fifth and all coarser scales; each finer scale has half as many, but no less than 8. As
            published, the fifth scale is 16 x coarser than the crop.
        output_channels: of the reconstruction.
    """

    def __init__(
        self, features_per_stage: Sequence[int], strides: Sequence[Sequence[int]], width: int, output_channels: int
    ):
        super().__init__()
        count = len(features_per_stage)
        widths = [max(width >> max(_WIDEST_STAGE - stage, 0), _MIN_WIDTH) for stage in range(count)]
        self.densify = nn.ModuleList(
            Densify(features_per_stage[stage], widths[stage], deepest=stage == count - 1) for stage in range(1, count)
        )
        self.upsample = nn.ModuleList(
            DecoderStage(widths[stage], widths[stage - 1], strides[stage]) for stage in range(1, count)
        )
        self.output = nn.Conv3d(widths[0], output_channels, 1)

    def decode(self, features: Sequence[Tensor], hidden: HiddenPatches) -> Tensor:
        """Features at full resolution, (B, channels, D, H, W), before the last norm.

        Args:
            features: of all stages of the encoder, finest first.
            hidden: which patches were hidden from it.
        """
        x: Any = None  # nothing is added at the coarsest scale
        for densify, upsample, skip in zip(
            reversed(self.densify), reversed(self.upsample), reversed(features[1:]), strict=True
        ):
            dense = densify(skip, hidden.visible_at(skip))
            x = dense if x is None else x + dense
            x = self._finest.before_norm(x) if upsample is self._finest else upsample(x)
        return x

    def predict(self, features: Tensor) -> Tensor:
        """The reconstruction (B, output_channels, D, H, W) from the features of :meth:`decode`."""
        return self.output(self._finest.normalise(features))

    @property
    def _finest(self) -> DecoderStage:
        return cast(DecoderStage, self.upsample[0])
