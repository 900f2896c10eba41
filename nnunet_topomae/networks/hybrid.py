"""A hybrid of convolutions and attention (ConvMAE, Gao et al., in 3D as in MiM), and a U-shaped network around it."""

import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from nnunet_topomae.networks.blocks import residual_block
from nnunet_topomae.networks.geometry import Size, check_switch, grid_of, size_of
from nnunet_topomae.networks.unetr import UNETRDecoder
from nnunet_topomae.networks.vit import HasPositions, LayerNorm, initialize_transformer, transformer_block

_KERNEL, _MLP_RATIO = 5, 4  # of the convolutional blocks
_NUM_STAGES = 4


class VisiblePatches:
    """Where the visible patches of a crop lie, for feature maps that are kept of these patches only.

    Such a map is a stack (B * M, d, h, w, C): the M visible patches of the first crop, then those of the second.

    Args:
        indices: (B, M) raster indices of visible patches.
        grid: patches per axis of a crop.
    """

    def __init__(self, indices: Tensor, grid: Size):
        self.indices, self.grid = indices, grid

    def gather(self, maps: Tensor) -> Tensor:
        """Whole maps (B, D, H, W, C) to a stack of visible patches (B * M, d, h, w, C)."""
        (u, v, w), (d, h, k) = self.grid, grid_of(maps.shape[1:4], self.grid, "grid of patches")
        blocks = maps.reshape(len(maps), u, d, v, h, w, k, maps.shape[-1])
        return blocks[self._where(v, w)].flatten(0, 1)

    def scatter(self, patches: Tensor) -> Tensor:
        """A stack of visible patches (B * M, d, h, w, C) to whole maps (B, D, H, W, C) with 0 at hidden ones."""
        (u, v, w), (d, h, k, channels) = self.grid, patches.shape[1:]
        blocks = patches.new_zeros(len(self.indices), u, d, v, h, w, k, channels)
        blocks[self._where(v, w)] = patches.unflatten(0, self.indices.shape)
        return blocks.reshape(len(blocks), u * d, v * h, w * k, channels)

    def _where(self, v: int, w: int) -> tuple[Any, ...]:
        """Index of the visible patches in maps (B, u, d, v, h, w, k, C)."""
        every = slice(None)
        sample = torch.arange(len(self.indices), device=self.indices.device)[:, None]
        return sample, self.indices // (v * w), every, self.indices // w % v, every, self.indices % w


class Embedding(nn.Module):
    """A convolution whose kernel equals its stride, a norm and GELU; patches never mix in it."""

    def __init__(self, input_channels: int, output_channels: int, stride: Sequence[int]):
        super().__init__()
        self.convolution = nn.Conv3d(input_channels, output_channels, size_of(stride), size_of(stride))
        self.norm = LayerNorm(output_channels)

    def initialize(self) -> None:
        """Draw new weights, as of a linear layer.

        Biases are PyTorch's, as in ConvMAE: with biases of 0 the norm would divide the zeros of padding by almost
        nothing, and gradients would explode.
        """
        self.convolution.reset_parameters()
        nn.init.xavier_uniform_(self.convolution.weight.view(len(self.convolution.weight), -1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) to (B, D / stride, ..., output_channels)."""
        return nn.functional.gelu(self.norm(_convolved(self.convolution, x)))


class ConvolutionalBlock(nn.Module):
    """A depthwise convolution between two linear layers, then an MLP, both with a norm first and a skip connection.

    Args:
        width: channels.
        drop_path: how often each half of the block is skipped in training.
    """

    def __init__(self, width: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.project_in = nn.Linear(width, width)
        self.depthwise = nn.Conv3d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
        self.project_out = nn.Linear(width, width)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, _MLP_RATIO * width)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, visible: VisiblePatches | None) -> Tensor:
        """Whole maps (B, D, H, W, width), or a stack of the visible patches of maps; the same shape."""
        y = self.project_in(self.norm1(x))
        if visible is None:
            y = _convolved(self.depthwise, y)
        else:  # the only place where patches mix, so the only one that needs to know where they lie
            y = visible.gather(_convolved(self.depthwise, visible.scatter(y)))
        x = x + self.drop_path(self.project_out(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvolutionalStage(nn.ModuleList):
    """Blocks, one after the other."""

    def forward(self, x: Tensor, visible: VisiblePatches | None) -> Tensor:
        """See :meth:`ConvolutionalBlock.forward`."""
        for block in self:
            x = block(x, visible)
        return x


class HybridEncoder(HasPositions, nn.Module):
    """Three stages of convolutions and one of attention, each after an embedding that makes the grid coarser.

    If patches are hidden, everything is computed for visible patches only, save the depthwise convolutions, which run
    over the whole map with 0 at hidden patches. (ConvMAE computes its convolutions everywhere; what comes out at
    visible patches is the same.) Positions are fixed in pre-training, as those of :class:`ViTEncoder`.

    Args:
        input_channels: channels C of the crop.
        crop_size: voxels per axis.
        strides: of the four embeddings; their product is the size of a patch.
        widths: channels of the four stages.
        depths: blocks of the four stages.
        num_heads: attention heads.
        drop_path: stochastic depth: how often the last block is skipped in training; it grows linearly from block to
            block, starting at 0.
        local_start: see :class:`ViTEncoder`.

    Raises:
        ValueError: if there are not four stages, the patches do not divide the crop, the heads do not divide the width,
            or ``local_start`` is neither true nor false.

    Example:
        A crop of 16^3 voxels has 2 x 2 x 2 patches; two of them are visible.

        >>> import torch
        >>> from nnunet_topomae.networks.hybrid import HybridEncoder
        >>> strides = [[2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 1]]
        >>> encoder = HybridEncoder(1, (16, 16, 16), strides, (8, 8, 16, 24), (1, 1, 1, 2), num_heads=2)
        >>> [tuple(stage.shape) for stage in encoder(torch.rand(1, 1, 16, 16, 16))]
        [(1, 8, 8, 8, 8), (1, 8, 4, 4, 4), (1, 16, 2, 2, 2), (1, 24, 2, 2, 2)]
        >>> [tuple(stage.shape) for stage in encoder(torch.rand(1, 1, 16, 16, 16), torch.tensor([[0, 7]]))]
        [(2, 8, 4, 4, 4), (2, 8, 2, 2, 2), (2, 16, 1, 1, 1), (2, 24, 1, 1, 1)]
    """

    def __init__(
        self,
        input_channels: int,
        crop_size: Sequence[int],
        strides: Sequence[Sequence[int]],
        widths: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 11),
        num_heads: int = 12,
        drop_path: float = 0.0,
        local_start: bool = False,
    ):
        super().__init__()
        if not len(strides) == len(widths) == len(depths) == _NUM_STAGES:
            raise ValueError(
                f"a hybrid encoder has four stages, got {len(strides)} strides, {len(widths)} widths and "
                f"{len(depths)} depths"
            )
        if widths[-1] % num_heads:
            raise ValueError(f"width {widths[-1]} of the last stage is not divisible by {num_heads} heads")
        self.strides, self.widths = [size_of(stride) for stride in strides], tuple(widths)
        self.patch_size = size_of(map(prod, zip(*strides, strict=True)))
        self.grid = grid_of(crop_size, self.patch_size, "the product of the encoder's strides")
        self.width, self.input_channels = widths[-1], input_channels
        self.local_start = check_switch(local_start, "local_start")
        rates = iter([drop_path * n / max(sum(depths) - 1, 1) for n in range(sum(depths))])
        self.embeddings = nn.ModuleList(map(Embedding, (input_channels, *widths), widths, strides))
        self.stages = nn.ModuleList(
            ConvolutionalStage(ConvolutionalBlock(width, next(rates)) for _ in range(depth))
            for width, depth in zip(widths[:-1], depths[:-1], strict=True)
        )
        self.projection = nn.Linear(self.width, self.width)
        self.pos_embed = nn.Parameter(self.initial_positions(self.width))
        self.blocks = nn.ModuleList(transformer_block(self.width, num_heads, next(rates)) for _ in range(depths[-1]))
        self.initialize()

    def initialize(self) -> None:
        """Draw new weights; see :func:`initialize_transformer`. Embeddings are linear layers, too."""
        initialize_transformer(self, self.local_start)
        for module in self.modules():
            if isinstance(module, Embedding):
                module.initialize()

    def forward(self, crop: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """Features of all stages.

        Args:
            crop: (B, C, D, H, W).
            visible: (B, M) raster indices of visible patches; None shows everything.

        Returns:
            Feature maps (B, width, d, h, w) by stage, finest first; with ``visible`` stacks of those of the visible
            patches, (B * M, width, d, h, w), whose d, h and w are 1 at the last stage.
        """
        x = crop.movedim(1, -1)
        patches = None if visible is None else VisiblePatches(visible, self.grid)
        if patches is not None:
            x = patches.gather(x)
        *embeddings, last = self.embeddings
        features = []
        for embedding, stage in zip(embeddings, self.stages, strict=True):
            x = stage(embedding(x), patches)
            features.append(x)
        features.append(self._attend(last(x), visible))
        return [each.movedim(-1, 1) for each in features]

    def _attend(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """The last stage; the shape stays as it is."""
        positions = self.pos_embed if visible is None else self.pos_embed[0, visible]
        tokens = self.projection(x.reshape(-1, positions.shape[1], self.width)) + positions
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.reshape(x.shape)

    def layers(self, name: str) -> dict[str, Any]:
        """Which of its parameters belong to which layer; see :meth:`ViTEncoder.layers`.

        Everything before the attention is the first layer, and each block of attention is one.
        """
        prefix = rf"^{re.escape(name)}\."
        return {"stem": prefix + r"(?:embeddings|stages|projection|pos_embed)", "blocks": prefix + r"blocks\.(\d+)"}


class HybridUNETR(nn.Module):
    """A :class:`HybridEncoder` with the decoder of Swin UNETR (Hatamizadeh et al. 2022), as MiM is fine-tuned.

    78.1 M parameters with patches of 16^3, a 96^3 crop and 14 classes, of which the encoder has 21.6 M.

    Args:
        input_channels, num_classes, deep_supervision: given by nnU-Net.
        crop_size: voxels per axis; equals the configuration's ``patch_size`` in the plans.
        strides: first 1 on every axis, for full resolution; then those of the encoder's four embeddings and of the
            coarsest scale, which is a convolution after the encoder.
        encoder: other keyword arguments of :class:`HybridEncoder`.
        features: channels at full resolution.
        coarsest_features: channels at the coarsest scale.
        drop_path: stochastic depth of the encoder.

    Raises:
        ValueError: if crop and strides do not fit each other.

    Example:
        >>> import torch
        >>> from nnunet_topomae.networks import HybridUNETR
        >>> encoder = {"widths": (8, 8, 16, 24), "depths": (1, 1, 1, 2), "num_heads": 2}
        >>> strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 1], [1, 1, 1]]
        >>> network = HybridUNETR(1, 3, (16, 16, 16), strides, encoder, 8, 24, deep_supervision=False)
        >>> network(torch.rand(2, 1, 16, 16, 16)).shape
        torch.Size([2, 3, 16, 16, 16])
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        crop_size: Sequence[int],
        strides: Sequence[Sequence[int]],
        encoder: Mapping[str, Any],
        features: int = 48,
        coarsest_features: int = 768,
        drop_path: float = 0.0,
        deep_supervision: bool = True,
    ):
        super().__init__()
        if len(strides) != _NUM_STAGES + 2 or max(strides[0]) != 1:
            raise ValueError(f"strides must be six, of which the first is 1, got {strides}")
        grid_of(crop_size, size_of(map(prod, zip(*strides, strict=True))), "the product of the strides")
        self.encoder = HybridEncoder(input_channels, crop_size, strides[1:-1], drop_path=drop_path, **encoder)
        widths = self.encoder.widths
        self.image_skip = residual_block(input_channels, features)
        self.skips = nn.ModuleList(residual_block(width, width) for width in widths[:-1])
        self.coarsest = nn.Sequential(
            nn.Conv3d(widths[-1], coarsest_features, size_of(strides[-1]), size_of(strides[-1])),
            residual_block(coarsest_features, coarsest_features),
        )
        self.decoder = UNETRDecoder(coarsest_features, (features, *widths), strides[1:], num_classes, deep_supervision)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initial weights, applied by nnU-Net; convolutions outside the encoder keep PyTorch's."""
        if isinstance(module, HybridEncoder):
            module.initialize()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer; see :meth:`HybridEncoder.layers`."""
        return self.encoder.layers("encoder")

    def forward(self, crop: Tensor) -> Tensor | list[Tensor]:
        """(B, C, D, H, W) to logits (B, K, D, H, W), or a list of all resolutions with deep supervision."""
        *stages, tokens = self.encoder(crop)
        skips = [skip(stage) for skip, stage in zip(self.skips, stages, strict=True)]
        return self.decoder(self.coarsest(tokens), [self.image_skip(crop), *skips, tokens])


def _convolved(convolution: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A convolution of maps (B, D, H, W, C)."""
    return convolution(x.movedim(-1, 1)).movedim(1, -1)
