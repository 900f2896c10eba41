"""Brings tokens of a ViT to the scales of a convolutional encoder."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from nnunet_topomae.networks.blocks import residual_block, upsampling
from nnunet_topomae.networks.geometry import Size, size_of


class ScaleAdapter(nn.Module):
    """Resamples a token map to one scale, refines it there, and changes to that scale's channels.

    Transposed convolutions with kernel = stride of at most 2 per axis upsample; the first also changes the channels.
    One strided convolution after them downsamples. The scale may be finer than the tokens along one axis and coarser
    along another.

    Args:
        input_channels: width of the tokens.
        output_channels: channels of the scale.
        source: tokens per axis.
        target: voxels per axis of the scale.
        channels: channels in between; None for ``output_channels``.
        num_blocks: residual blocks at the target resolution.

    Raises:
        ValueError: unless along every axis the scale is a power of 2 finer or a whole number coarser than the tokens.
    """

    def __init__(
        self,
        input_channels: int,
        output_channels: int,
        source: Size,
        target: Size,
        channels: int | None = None,
        num_blocks: int = 0,
    ):
        super().__init__()
        channels = channels or output_channels
        up, down = resampling_factors(source, target)
        layers: list[nn.Module] = []
        for stride in upsampling_steps(up):
            layers.append(upsampling(input_channels, channels, stride))
            input_channels = channels
        if max(down) > 1:
            layers.append(nn.Conv3d(channels, channels, down, down, bias=False))
        layers += [residual_block(channels, channels) for _ in range(num_blocks)]
        if channels != output_channels:
            layers.append(nn.Conv3d(channels, output_channels, 1, bias=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, input_channels, *source)`` to ``(B, output_channels, *target)``."""
        return self.layers(tokens)


class TokenPyramid(nn.Module):
    """One :class:`ScaleAdapter` per scale, each followed by a learned gain per channel.

    A gain that starts at 0 lets a fused network start exactly as the network it is added to.

    Args:
        width: channels of the tokens.
        token_grid: tokens per axis.
        grids: voxels per axis of the scales, finest first.
        features_per_stage: channels of the scales.
        channels: channels within each adapter; see :class:`ScaleAdapter`.
        num_blocks: residual blocks of each adapter.
        initial_gain: initial value of all gains.
    """

    def __init__(
        self,
        width: int,
        token_grid: Size,
        grids: Sequence[Size],
        features_per_stage: Sequence[int],
        channels: Sequence[int | None],
        num_blocks: Sequence[int],
        initial_gain: float,
    ):
        super().__init__()
        self.scales = nn.ModuleList(
            ScaleAdapter(width, features, token_grid, grid, middle, blocks)
            for features, grid, middle, blocks in zip(features_per_stage, grids, channels, num_blocks, strict=True)
        )
        self.gains = nn.ParameterList(
            torch.full((features, 1, 1, 1), float(initial_gain)) for features in features_per_stage
        )

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """Token maps (B, width, d, h, w), shallow first, to one feature map per scale, finest first."""
        return [gain * adapter(tap) for adapter, gain, tap in zip(self.scales, self.gains, taps, strict=True)]

    def no_weight_decay(self) -> set[str]:
        """The gains."""
        return {f"gains.{scale}" for scale in range(len(self.gains))}


def resampling_factors(source: Size, target: Size) -> tuple[Size, Size]:
    """Factors of up- and downsampling per axis that turn one grid into another.

    Raises:
        ValueError: see :class:`ScaleAdapter`.
    """
    up = size_of(max(t // s, 1) for s, t in zip(source, target, strict=True))
    down = size_of(max(s // t, 1) for s, t in zip(source, target, strict=True))
    exact = all(s * u == t * d for s, t, u, d in zip(source, target, up, down, strict=True))
    if not exact or any(u & (u - 1) for u in up):
        raise ValueError(
            f"a token grid of {source} cannot be brought to {target}: each axis must be a power of 2 finer, "
            f"or a whole number coarser; choose another ViT patch size"
        )
    return up, down


def upsampling_steps(factors: Size) -> Iterator[Size]:
    """Strides of at most 2 per axis whose product is ``factors``; at least one step, which may be (1, 1, 1)."""
    remaining = factors
    while True:
        step = size_of(min(factor, 2) for factor in remaining)
        yield step
        remaining = size_of(factor // s for factor, s in zip(remaining, step, strict=True))
        if max(remaining) == 1:
            return
