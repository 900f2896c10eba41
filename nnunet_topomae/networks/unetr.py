"""UNETR (Hatamizadeh et al.) for any crop and patch size, in the form nnU-Net builds from plans."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_topomae.networks.blocks import residual_block, upsampling
from nnunet_topomae.networks.initialization import initialize
from nnunet_topomae.networks.vit import ViTEncoder, check_taps

_MIN_LEVELS = 2  # else nothing would be supervised: nnU-Net gives the coarsest output the weight 0


class TokenUpsampler(nn.Sequential):
    """Brings a token map to a finer scale: transposed convolutions, each but the first followed by a residual block.

    Args:
        width: channels of the tokens.
        channels: channels of the finer scale.
        strides: stride and kernel of each transposed convolution.
    """

    def __init__(self, width: int, channels: int, strides: Sequence[Sequence[int]]):
        first, *others = strides
        layers: list[nn.Module] = [upsampling(width, channels, first)]
        for stride in others:
            layers += [upsampling(channels, channels, stride), residual_block(channels, channels)]
        super().__init__(*layers)


class ConcatenatingUpBlock(nn.Module):
    """Upsamples by a transposed convolution, concatenates the skip, then applies a residual block."""

    def __init__(self, input_channels: int, output_channels: int, stride: Sequence[int]):
        super().__init__()
        self.upsample = upsampling(input_channels, output_channels, stride)
        self.block = residual_block(2 * output_channels, output_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Features (B, C, ...) and the skip at the finer resolution, to the skip's shape."""
        return self.block(torch.cat([self.upsample(x), skip], dim=1))


class UNETRDecoder(nn.Module):
    """From tokens to logits; ``deep_supervision`` and ``seg_layers`` carry the names that nnU-Net looks for."""

    def __init__(
        self,
        width: int,
        features: Sequence[int],
        strides: Sequence[Sequence[int]],
        num_classes: int,
        deep_supervision: bool,
    ):
        super().__init__()
        self.deep_supervision = deep_supervision
        inputs = (*features[1:], width)
        self.stages = nn.ModuleList(
            ConcatenatingUpBlock(before, after, stride)
            for before, after, stride in zip(inputs, features, strides, strict=True)
        )
        self.seg_layers = nn.ModuleList(nn.Conv3d(channels, num_classes, 1) for channels in features)

    def forward(self, tokens: Tensor, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """A token map and skips, finest first, to logits at full resolution, or a list of all, finest first."""
        x = tokens
        decoded: list[Tensor] = []
        for stage, skip in zip(reversed(self.stages), reversed(skips), strict=True):
            x = stage(x, skip)
            decoded.insert(0, x)
        if not self.deep_supervision:
            return self.seg_layers[0](x)
        return [head(features) for head, features in zip(self.seg_layers, decoded, strict=True)]


class UNETR(nn.Module):
    """A ViT whose hidden states feed a convolutional decoder at all scales.

    92.8 M parameters with ViT-B, patches of 16^3, a 96^3 crop and 14 classes (published: 92.49 M).

    Args:
        input_channels, num_classes, deep_supervision: given by nnU-Net.
        crop_size: voxels per axis; equals the configuration's ``patch_size`` in the plans.
        strides: first 1 on every axis, for full resolution; then the strides between the decoder's scales, whose
            product is the ViT's patch size.
        vit: keyword arguments of :class:`ViTEncoder`; ``patch_size`` is required.
        taps: blocks (0-based) whose hidden states feed the scales between full resolution and tokens, the finest first;
            planners write those of UNETR, 3, 6 and 9 of 12. None: 4, 7 and 10 of 12, as networks from older plans were
            trained.
        features: channels at full resolution, doubled at each coarser scale.
        drop_path: stochastic depth of the ViT.

    Raises:
        ValueError: if crop, patches and strides do not fit each other, or the taps do not fit the ViT.

    Example:
        >>> import torch
        >>> from nnunet_topomae.networks import UNETR
        >>> vit = {"patch_size": (4, 4, 4), "width": 24, "depth": 4, "num_heads": 2}
        >>> strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
        >>> network = UNETR(1, 3, (8, 8, 8), strides, vit, features=4, deep_supervision=False)
        >>> network(torch.rand(2, 1, 8, 8, 8)).shape
        torch.Size([2, 3, 8, 8, 8])
    """

    initialize = staticmethod(initialize)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        crop_size: Sequence[int],
        strides: Sequence[Sequence[int]],
        vit: Mapping[str, Any],
        taps: Sequence[int] | None = None,
        features: int = 16,
        drop_path: float = 0.0,
        deep_supervision: bool = True,
    ):
        super().__init__()
        self.vit = ViTEncoder(input_channels, crop_size, drop_path=drop_path, **vit)
        steps = [tuple(stride) for stride in strides[1:]]
        if max(strides[0]) != 1 or tuple(map(prod, zip(*steps, strict=True))) != self.vit.patch_size:
            raise ValueError(f"strides must start with 1 and multiply to the ViT patch size, got {strides}")
        if len(steps) < _MIN_LEVELS:
            raise ValueError(f"UNETR needs ViT patches of at least 4 voxels along an axis, got {self.vit.patch_size}")
        self.taps = check_taps(taps, len(self.vit.blocks), len(steps) - 1)
        widths = [features * 2**level for level in range(len(steps))]
        self.image_skip = residual_block(input_channels, widths[0])
        self.token_skips = nn.ModuleList(
            TokenUpsampler(self.vit.width, widths[level], steps[: level - 1 : -1]) for level in range(1, len(steps))
        )
        self.decoder = UNETRDecoder(self.vit.width, widths, steps, num_classes, deep_supervision)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer; see :meth:`ViTEncoder.layers`."""
        return self.vit.layers("vit")

    def encoder_parts(self) -> list[str]:
        """The ViT; see :func:`encoder_parameters`."""
        return ["vit"]

    def forward(self, crop: Tensor) -> Tensor | list[Tensor]:
        """(B, C, D, H, W) to logits (B, K, D, H, W), or a list of all resolutions with deep supervision."""
        *hidden, tokens = self.vit.taps(crop, self.taps)
        skips = [upsample(tap) for upsample, tap in zip(self.token_skips, hidden, strict=True)]
        return self.decoder(tokens, [self.image_skip(crop), *skips])
