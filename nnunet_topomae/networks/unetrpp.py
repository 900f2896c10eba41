"""UNETR++ (Shaker et al.) for any crop size and any strides, in the form nnU-Net builds from plans."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from math import gcd, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_topomae.networks.blocks import residual_block, upsampling
from nnunet_topomae.networks.geometry import Size, check_switch, grid_of, size_of
from nnunet_topomae.networks.grids import GridTensor, Positions, TokenProjection
from nnunet_topomae.networks.initialization import initialize

_CHANNEL_DROPOUT = 0.1


class EfficientPairedAttention(nn.Module):
    """Channel and spatial attention that share queries and keys (Shaker et al., section 3.2).

    Args:
        num_tokens: N, the number of tokens; the projections of keys and values are made for just this number.
        channels: C, divisible by ``2 * num_heads``.
        projection_size: P, the number of tokens that keys and values are projected to for spatial attention.
        num_heads: number of attention heads.
        dropout: dropout rate on both attention maps.
        separate_projections: whether values have a projection of their own (E and F in the paper); otherwise they share
            that of the keys.

    Raises:
        ValueError: if the channels are not divisible, or ``separate_projections`` is neither true nor false.
    """

    def __init__(
        self,
        num_tokens: int,
        channels: int,
        projection_size: int,
        num_heads: int,
        dropout: float = 0.1,
        separate_projections: bool = False,
    ):
        super().__init__()
        if channels % (2 * num_heads):
            raise ValueError(f"features_per_stage must be divisible by twice the {num_heads} heads, got {channels}")
        self.num_heads = num_heads
        self.qkvv = nn.Linear(channels, 4 * channels, bias=False)
        self.project = nn.Linear(num_tokens, projection_size)
        is_separate = check_switch(separate_projections, "separate_projections")
        self.project_values = nn.Linear(num_tokens, projection_size) if is_separate else None
        self.channel_temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.spatial_temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.dropout = nn.Dropout(dropout)
        self.spatial_out = nn.Linear(channels, channels // 2)
        self.channel_out = nn.Linear(channels, channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        query, key, value_channel, value_spatial = self._heads(self.qkvv(x))  # each (B, heads, d, N)
        key_projected = self.project(key)  # (B, heads, d, P)
        value_projected = (self.project_values or self.project)(value_spatial)
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)

        channel_map = self.dropout(((query @ key.transpose(-2, -1)) * self.channel_temperature).softmax(dim=-1))
        by_channel = channel_map @ value_channel  # (B, heads, d, N)

        scaled_keys = key_projected * self.spatial_temperature  # as scaling the map, which is much larger
        spatial_map = query.transpose(-2, -1) @ scaled_keys  # (B, heads, N, P)
        by_space = self.dropout(spatial_map.softmax(dim=-1)) @ value_projected.transpose(-2, -1)  # (B, heads, N, d)

        tokens = (by_space.transpose(1, 2).flatten(2), by_channel.permute(0, 3, 1, 2).flatten(2))
        return torch.cat([self.spatial_out(tokens[0]), self.channel_out(tokens[1])], dim=-1)

    def no_weight_decay(self) -> set[str]:
        """The temperatures, which scale the attention maps."""
        return {"channel_temperature", "spatial_temperature"}

    def _heads(self, qkvv: Tensor) -> tuple[Tensor, ...]:
        return qkvv.unflatten(2, (4, self.num_heads, -1)).permute(2, 0, 3, 4, 1).unbind()


class EPABlock(nn.Module):
    """Paired attention with learned positions and layer scale, then convolution blocks; there is no MLP.

    Channel dropout of 10 % precedes the last convolution.

    Args:
        grid: tokens per axis of the feature maps.
        channels, projection_size, num_heads, separate_projections: see :class:`EfficientPairedAttention`.
        attention_dropout: dropout rate on both attention maps.
        num_residual_blocks: number of residual convolution blocks after the attention.

    Raises:
        ValueError: if there is to be no residual block.
    """

    def __init__(
        self,
        grid: Size,
        channels: int,
        projection_size: int,
        num_heads: int,
        attention_dropout: float = 0.1,
        num_residual_blocks: int = 1,
        separate_projections: bool = False,
    ):
        super().__init__()
        if num_residual_blocks < 1:
            raise ValueError(f"num_residual_blocks must be at least 1, got {num_residual_blocks}")
        self.grid = tuple(grid)
        num_tokens = prod(grid)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, channels))
        self.norm = nn.LayerNorm(channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))
        self.attention = EfficientPairedAttention(
            num_tokens, channels, projection_size, num_heads, attention_dropout, separate_projections
        )
        self.residual = residual_block(channels, channels, nn.BatchNorm3d)
        self.more_residuals = nn.Sequential(
            *(residual_block(channels, channels, nn.BatchNorm3d) for _ in range(num_residual_blocks - 1))
        )
        self.output = nn.Sequential(nn.Dropout3d(_CHANNEL_DROPOUT), nn.Conv3d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, d, h, w) to the same shape."""
        tokens = x.flatten(2).transpose(1, 2) + self.pos_embed
        tokens = tokens + self.gamma * self.attention(self.norm(tokens))
        attended = tokens.transpose(1, 2).reshape(x.shape)
        return attended + self.output(self.more_residuals(self.residual(attended)))

    def no_weight_decay(self) -> set[str]:
        """The positions."""
        return {"pos_embed"}

    def resizing(self) -> dict[str, GridTensor]:
        """The positions, and the projections of keys and values over tokens."""
        projections = ["project"] if self.attention.project_values is None else ["project", "project_values"]
        by_name = {f"attention.{name}.weight": TokenProjection(self.grid) for name in projections}
        return {"pos_embed": Positions(self.grid), **by_name}


class UNETRPPEncoder(nn.Module):
    """Four stages: a stem or a downsampling with kernel = stride and group norm, then EPA blocks.

    Args:
        input_channels: channels C of the crop.
        grids: tokens per axis of the four stages.
        strides: per stage and axis, the stem first.
        features_per_stage: channels of the four stages.
        depths: number of EPA blocks of the four stages.
        projection_sizes: projection size of the EPA blocks of the four stages.
        make_block: makes an EPA block from its grid, channels and projection size.
    """

    def __init__(
        self,
        input_channels: int,
        grids: Sequence[Size],
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        depths: Sequence[int],
        projection_sizes: Sequence[int],
        make_block: Callable[[Size, int, int], EPABlock],
    ):
        super().__init__()
        self.features_per_stage = tuple(features_per_stage)
        inputs = (input_channels, *features_per_stage[:-1])
        self.downsample = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(before, after, size_of(stride), size_of(stride), bias=False),
                nn.GroupNorm(gcd(before, after), after),
            )
            for before, after, stride in zip(inputs, features_per_stage, strides, strict=True)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(make_block(grid, channels, projection) for _ in range(depth)))
            for grid, channels, depth, projection in zip(
                grids, features_per_stage, depths, projection_sizes, strict=True
            )
        )

    def forward(self, crop: Tensor) -> list[Tensor]:
        """(B, C, D, H, W) to the feature maps of the four stages, finest first."""
        features = []
        for downsample, stage in zip(self.downsample, self.stages, strict=True):
            crop = stage(downsample(crop))
            features.append(crop)
        return features


class AddingUpBlock(nn.Module):
    """Upsamples by a transposed convolution, adds the skip, then applies blocks."""

    def __init__(self, input_channels: int, output_channels: int, stride: Sequence[int], blocks: nn.Module):
        super().__init__()
        self.upsample = upsampling(input_channels, output_channels, stride)
        self.blocks = blocks

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Features (B, C, ...) and the skip at the finer resolution, to the skip's shape."""
        return self.blocks(self.upsample(x) + skip)


class UNETRPPDecoder(nn.Module):
    """Three EPA stages, a full-resolution stage, and segmentation heads at three resolutions.

    ``deep_supervision`` and ``seg_layers`` carry the names that nnU-Net looks for.
    """

    def __init__(
        self,
        num_classes: int,
        grids: Sequence[Size],
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        depths: Sequence[int],
        projection_size: int,
        make_block: Callable[[Size, int, int], EPABlock],
        full_resolution_features: int,
        deep_supervision: bool,
    ):
        super().__init__()
        self.num_classes, self.deep_supervision = num_classes, deep_supervision
        self.lowest_stride = tuple(strides[2])
        self.stages = nn.ModuleList(
            AddingUpBlock(
                features_per_stage[level + 1],
                features_per_stage[level],
                strides[level + 1],
                nn.Sequential(
                    *(
                        make_block(grids[level], features_per_stage[level], projection_size)
                        for _ in range(depths[level])
                    )
                ),
            )
            for level in (2, 1, 0)
        )
        width = full_resolution_features
        self.full_resolution = AddingUpBlock(features_per_stage[0], width, strides[0], residual_block(width, width))
        self.seg_layers = nn.ModuleList(
            nn.Conv3d(channels, num_classes, 1) for channels in (width, *features_per_stage[:2])
        )

    def features(self, full_resolution_skip: Tensor, encoder_features: list[Tensor]) -> list[Tensor]:
        """Decoded feature maps at full resolution, the first and the second stage."""
        x, decoded = encoder_features[-1], []
        for stage, skip in zip(self.stages, reversed(encoder_features[:-1]), strict=True):
            x = stage(x, skip)
            decoded.append(x)
        return [self.full_resolution(x, full_resolution_skip), decoded[-1], decoded[-2]]

    def forward(self, full_resolution_skip: Tensor, encoder_features: list[Tensor]) -> Tensor | list[Tensor]:
        """Logits at full resolution, or with deep supervision at four, finest first.

        nnU-Net gives the coarsest output the weight 0; it is the third one pooled and needs no head.
        """
        features = self.features(full_resolution_skip, encoder_features)
        if not self.deep_supervision:
            return self.seg_layers[0](features[0])
        outputs = [head(x) for head, x in zip(self.seg_layers, features, strict=True)]
        return [*outputs, F.avg_pool3d(outputs[-1], self.lowest_stride, self.lowest_stride)]


class UNETRPP(nn.Module):
    """UNETR++ as published for Synapse: 42,952,850 parameters for 64x128x128 crops, 14 classes and a stem of (2, 4, 4).

    The networks published for ACDC (66,796,404 parameters) and lung (121,174,798) have two residual blocks in every EPA
    block, and separate projections of keys and values. Attention dropout is 0.15 in the network published for Synapse
    and 0.1 in the others.

    Args:
        input_channels, num_classes, deep_supervision: given by nnU-Net.
        crop_size: voxels per axis; equals the configuration's ``patch_size`` in the plans.
        strides: five per-axis strides: 1 for full resolution, the stem's, and three downsamplings.
        features_per_stage: channels of the four stages.
        depths: number of EPA blocks of the four stages.
        projection_sizes: projection size of the EPA blocks of the four encoder stages.
        decoder_projection_size: projection size of all EPA blocks of the decoder.
        num_heads: heads of every EPA block.
        full_resolution_features: channels at full resolution.
        attention_dropout, num_residual_blocks, separate_projections: see :class:`EPABlock`.

    Raises:
        ValueError: if the strides do not divide the crop, or are not five per-axis strides that start with 1; see
            :class:`EPABlock`.

    Example:
        >>> import torch
        >>> from nnunet_topomae.networks import UNETRPP
        >>> strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 1]]
        >>> small = {"features_per_stage": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "deep_supervision": False}
        >>> network = UNETRPP(1, 3, (8, 8, 8), strides, **small)
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
        features_per_stage: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (3, 3, 3, 3),
        projection_sizes: Sequence[int] = (64, 64, 64, 32),
        decoder_projection_size: int = 64,
        num_heads: int = 4,
        full_resolution_features: int = 16,
        attention_dropout: float = 0.1,
        num_residual_blocks: int = 1,
        separate_projections: bool = False,
        deep_supervision: bool = True,
    ):
        super().__init__()
        grids = stage_grids(crop_size, strides)
        make_block = partial(
            EPABlock,
            num_heads=num_heads,
            attention_dropout=attention_dropout,
            num_residual_blocks=num_residual_blocks,
            separate_projections=separate_projections,
        )
        self.encoder = UNETRPPEncoder(
            input_channels, grids, strides[1:], features_per_stage, depths, projection_sizes, make_block
        )
        self.full_resolution_skip = residual_block(input_channels, full_resolution_features)
        self.decoder = UNETRPPDecoder(
            num_classes,
            grids,
            strides[1:],
            features_per_stage,
            depths,
            decoder_projection_size,
            make_block,
            full_resolution_features,
            deep_supervision,
        )

    def encoder_parts(self) -> list[str]:
        """Encoder and the skip connection that sees the crop itself; see :func:`encoder_parameters`."""
        return ["encoder", "full_resolution_skip"]

    def forward(self, crop: Tensor) -> Tensor | list[Tensor]:
        """(B, C, D, H, W) to logits (B, K, D, H, W), or a list of four resolutions with deep supervision."""
        return self.decoder(self.full_resolution_skip(crop), self.encoder(crop))


def stage_grids(crop_size: Sequence[int], strides: Sequence[Sequence[int]]) -> list[Size]:
    """Tokens per axis of the four stages.

    Raises:
        ValueError: see :class:`UNETRPP`.
    """
    if len(strides) != 5 or any(stride != 1 for stride in strides[0]):
        raise ValueError(f"UNETR++ takes five strides of which the first is 1 on every axis, got {strides}")
    cumulative = accumulate(strides[1:], lambda a, b: [i * j for i, j in zip(a, b, strict=True)])
    return [grid_of(crop_size, stride, "cumulative UNETR++ stride") for stride in cumulative]
