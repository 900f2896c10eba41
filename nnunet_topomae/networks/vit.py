"""Vision transformer encoder and its masked autoencoder in 3D (He et al., MAE; SelfMedMAE)."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from nnunet_topomae.networks.geometry import Size, check_switch, grid_of, size_of
from nnunet_topomae.networks.grids import GridTensor, PatchVoxels, Positions

_DECODER_WIDTH, _DECODER_DEPTH, _DECODER_HEAD_WIDTH = 384, 8, 32  # SelfMedMAE's
_TAPS = (3, 6, 9)  # UNETR's blocks of 12, 0-based
_LATE_TAPS = (4, 7, 10)  # a mistake of ours that older plans were trained with
LayerNorm: Any = partial(nn.LayerNorm, eps=1e-6)  # as in ViT and SelfMedMAE; PyTorch's default is 1e-5
_LOCAL_POSITIONS = 6.0, 4.0  # temperature and scale, by measurement: docs/results.md


class HasPositions:
    """What encoders say of ``pos_embed``, the positions of their tokens.

    Attributes:
        grid: tokens per axis.
        local_start: see :class:`ViTEncoder`.
    """

    grid: Size
    local_start: bool

    def initial_positions(self, width: int) -> Tensor:
        """Sine-cosine positions on this grid for tokens of some width, (1, N, width); also those of the decoder."""
        return initial_positions(self.grid, width, self.local_start)

    def no_weight_decay(self) -> set[str]:
        """The positions."""
        return {"pos_embed"}

    def constant_parameters(self) -> set[str]:
        """The positions, which keep their sine-cosine values in pre-training."""
        return {"pos_embed"}

    def resizing(self) -> dict[str, GridTensor]:
        """The positions. It matters once fine-tuning has changed them; before, a new network has its own."""
        return {"pos_embed": Positions(self.grid)}


class ViTEncoder(HasPositions, nn.Module):
    """Patch embedding, positions, timm's transformer blocks with the norm first, and a final norm; no class token.

    Positions start as fixed 3D sine-cosine values; pre-training freezes them, fine-tuning trains them.

    Args:
        input_channels: channels C of the crop.
        crop_size: voxels per axis.
        patch_size: voxels of a patch per axis; must divide the crop size.
        width: channels of a token.
        depth: number of blocks.
        num_heads: attention heads per block.
        drop_path: stochastic depth: how often the last block is skipped in training. The first block is never skipped;
            in between the rate grows linearly.
        local_start: whether tokens attend to their neighbours from the start, so that pre-training soon learns to
            continue what is visible: stronger positions that differ more between neighbours (see
            :meth:`initial_positions`), and equal queries and keys (see :func:`initialize_transformer`). Without it
            positions are those of SelfMedMAE.

    Raises:
        ValueError: if the patches do not divide the crop, the heads do not divide the width, or ``local_start`` is
            neither true nor false.

    Example:
        A crop of 8 x 8 x 8 voxels has 2 x 2 x 2 patches of 4 x 4 x 4, so 8 tokens.

        >>> import torch
        >>> from nnunet_topomae.networks import ViTEncoder
        >>> encoder = ViTEncoder(1, (8, 8, 8), (4, 4, 4), width=24, depth=2, num_heads=2)
        >>> encoder(torch.rand(2, 1, 8, 8, 8)).shape
        torch.Size([2, 8, 24])
        >>> encoder(torch.rand(2, 1, 8, 8, 8), visible=torch.tensor([[0, 3], [1, 7]])).shape
        torch.Size([2, 2, 24])
    """

    def __init__(
        self,
        input_channels: int,
        crop_size: Sequence[int],
        patch_size: Sequence[int],
        width: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        drop_path: float = 0.0,
        local_start: bool = False,
    ):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"ViT width {width} is not divisible by {num_heads} heads")
        self.grid = grid_of(crop_size, patch_size, "ViT patch size")
        self.patch_size = size_of(patch_size)
        self.width = width
        self.patch_embed = nn.Conv3d(input_channels, width, self.patch_size, self.patch_size)
        self.local_start = check_switch(local_start, "local_start")
        self.pos_embed = nn.Parameter(self.initial_positions(width))
        self.blocks = nn.ModuleList(
            transformer_block(width, num_heads, drop_path=drop_path * i / max(depth - 1, 1)) for i in range(depth)
        )
        self.norm = LayerNorm(width)
        self.initialize()

    def initialize(self) -> None:
        """Draw new weights; see :func:`initialize_transformer`. The patch embedding is a linear layer, too."""
        initialize_transformer(self, self.local_start)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.width, -1))
        if self.patch_embed.bias is not None:
            nn.init.zeros_(self.patch_embed.bias)

    def forward(self, crop: Tensor, visible: Tensor | None = None) -> Tensor:
        """Normalised tokens of the visible patches.

        Args:
            crop: (B, C, D, H, W).
            visible: (B, N_visible) indices of patches, see :func:`visible_indices`; None shows everything.

        Returns:
            (B, N_visible, width), in the order of the indices.
        """
        tokens = self._embed(crop)
        if visible is not None:
            tokens = tokens.gather(1, visible[..., None].expand(-1, -1, self.width))
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def taps(self, crop: Tensor, block_indices: Sequence[int]) -> list[Tensor]:
        """Hidden states after the named blocks (0-based), then the normalised output, as feature maps.

        Returns:
            Tensors (B, width, d, h, w).
        """
        tokens, maps = self._embed(crop), []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index in block_indices:
                maps.append(self._to_map(tokens))
        return [*maps, self._to_map(self.norm(tokens))]

    def layers(self, name: str) -> dict[str, Any]:
        """Which of its parameters belong to which layer, for timm's layer-wise learning rates.

        The patch embedding is the first layer, each block is one, and the final norm belongs to the last layer, with
        all other parts of the network. With a decay of 0.75, the last of 12 blocks learns at 0.75 of the full rate, the
        first at 0.0317, the patch embedding at 0.0238 (SelfMedMAE).

        Args:
            name: under which the network that asks holds this encoder.
        """
        prefix = rf"^{re.escape(name)}\."
        return {"stem": prefix + r"(?:patch_embed|pos_embed)", "blocks": prefix + r"blocks\.(\d+)"}

    def _embed(self, crop: Tensor) -> Tensor:
        return self.patch_embed(crop).flatten(2).transpose(1, 2) + self.pos_embed

    def _to_map(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, self.grid)


class TokenEncoder(Protocol):
    """What a :class:`ViTDecoder` knows of the encoder of its tokens; see :class:`ViTEncoder`."""

    grid: Size
    patch_size: Size
    width: int
    local_start: bool

    def initial_positions(self, width: int) -> Tensor:
        """Positions for tokens of some width, (1, N, width)."""


class ViTDecoder(nn.Module):
    """Light transformer decoder over visible tokens and learned mask tokens, which predicts voxels (He et al.).

    Args:
        encoder: of the visible tokens.
        output_channels: channels to predict, those of the crop.
        width, depth, num_heads: of the decoder (SelfMedMAE: 384, 8, 12).

    Example:
        >>> import torch
        >>> from nnunet_topomae.networks import ViTDecoder, ViTEncoder
        >>> encoder = ViTEncoder(1, (8, 8, 8), (4, 4, 4), width=24, depth=2, num_heads=2)
        >>> decoder = ViTDecoder(encoder, output_channels=1, width=24, depth=1, num_heads=2)
        >>> visible = torch.tensor([[6, 7]])  # of 2 x 2 x 2 patches
        >>> decoder(encoder(torch.rand(1, 1, 8, 8, 8), visible), visible).shape
        torch.Size([1, 1, 8, 8, 8])
    """

    pos_embed: Tensor

    def __init__(self, encoder: TokenEncoder, output_channels: int, width: int, depth: int, num_heads: int):
        super().__init__()
        self.grid, self.patch_size, self.output_channels = encoder.grid, encoder.patch_size, output_channels
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width).normal_(std=0.02))
        self.register_buffer("pos_embed", encoder.initial_positions(width), persistent=False)
        self.blocks = nn.ModuleList(transformer_block(width, num_heads) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.to_voxels = nn.Linear(
            width, output_channels * self.patch_size[0] * self.patch_size[1] * self.patch_size[2]
        )
        initialize_transformer(self, encoder.local_start)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Predict all voxels.

        Args:
            tokens: (B, N_visible, encoder width), as the encoder returns them.
            visible: (B, N_visible), the indices of their patches.

        Returns:
            (B, C, D, H, W).
        """
        return self.predict(self.decode(tokens, visible))

    def decode(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Normalised features of all patches, (B, N, width), from which voxels are predicted; see :meth:`forward`."""
        tokens = self.embed(tokens)
        background = self.mask_token.to(tokens.dtype).expand(len(tokens), self.pos_embed.shape[1], -1)
        tokens = scatter_tokens(tokens, visible, background) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def predict(self, features: Tensor) -> Tensor:
        """Voxels (B, C, D, H, W) from the features that :meth:`decode` gives."""
        return self.unpatchify(self.to_voxels(features))

    def no_weight_decay(self) -> set[str]:
        """The mask token."""
        return {"mask_token"}

    def resizing(self) -> dict[str, GridTensor]:
        """The layer that predicts voxels."""
        voxels = PatchVoxels(self.patch_size, self.output_channels)
        return {"to_voxels.weight": voxels, "to_voxels.bias": voxels}

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, N, C * p0 * p1 * p2) to (B, C, D, H, W)."""
        (d, h, w), (p, q, r) = self.grid, self.patch_size
        blocks = tokens.reshape(-1, d, h, w, self.output_channels, p, q, r)
        return blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(-1, self.output_channels, d * p, h * q, w * r)


def transformer_block(width: int, num_heads: int, drop_path: float = 0.0) -> Block:
    """Timm's block with the norm first, an MLP of four times the width, and biases in all linear layers."""
    return Block(width, num_heads, qkv_bias=True, drop_path=drop_path, norm_layer=LayerNorm)


def initialize_linear_layers(part: nn.Module) -> None:
    """Xavier-uniform weights and biases of 0, as in MAE: the rule for ViTs and for what is added to them."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def initialize_transformer(transformer: nn.Module, local_start: bool) -> None:
    """Initialise linear layers, where queries, keys and values are matrices of their own.

    Args:
        transformer: holds timm's blocks.
        local_start: let queries and keys start equal. A token then attends most to tokens like itself. Sine-cosine
            positions make that its neighbours, from which a hidden patch is continued (compare Trockman and Kolter,
            "Mimetic initialization of self-attention layers", ICML 2023).
    """
    initialize_linear_layers(transformer)
    for module in transformer.modules():
        if isinstance(module, Attention):
            query, key, value = module.qkv.weight.chunk(3)
            for matrix in (query, key, value):
                nn.init.xavier_uniform_(matrix)
            if local_start:
                key.copy_(query)


def choose_taps(depth: int, count: int) -> tuple[int, ...]:
    """The last ``count`` of blocks 3, 6 and 9 of 12 (0-based), whose outputs UNETR uses; scaled to another depth.

    Raises:
        ValueError: for a depth below 4, or for more than three blocks.
    """
    return _scaled_taps(_TAPS, depth, count)


def check_taps(taps: Sequence[int] | None, depth: int, count: int) -> tuple[int, ...]:
    """Make sure that taps are blocks of a ViT, in ascending order.

    Args:
        taps: blocks (0-based); None in plans that do not name any, which were trained with blocks 4, 7 and 10 of 12.
        depth: blocks of the ViT.
        count: how many taps are needed.

    Raises:
        ValueError: if they are not.
    """
    if taps is None:
        return _scaled_taps(_LATE_TAPS, depth, count)
    if len(taps) != count or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < depth:
        raise ValueError(f"taps must be {count} increasing blocks of a ViT of depth {depth}: {taps}")
    return tuple(taps)


def _scaled_taps(of_twelve: Sequence[int], depth: int, count: int) -> tuple[int, ...]:
    if depth < 4:
        raise ValueError(f"a ViT needs at least 4 blocks to feed four scales, got {depth}")
    if count > len(of_twelve):
        raise ValueError(f"a ViT feeds at most {len(of_twelve)} scales and the coarsest; use smaller patches")
    return tuple(round(depth * (tap + 1) / 12) - 1 for tap in of_twelve[len(of_twelve) - count :])


def light_decoder(encoder: ViTEncoder, output_channels: int) -> ViTDecoder:
    """SelfMedMAE's decoder (384 wide, 8 blocks, 12 heads), never wider or deeper than two thirds of the encoder.

    So an encoder that is 512 wide has one of 320 with 10 heads.
    """
    width = min(_DECODER_WIDTH, max(encoder.width * 2 // 3, 1) // _DECODER_HEAD_WIDTH * _DECODER_HEAD_WIDTH)
    width = max(width, _DECODER_HEAD_WIDTH)
    depth = min(_DECODER_DEPTH, max(len(encoder.blocks) * 2 // 3, 1))
    return ViTDecoder(encoder, output_channels, width, depth, width // _DECODER_HEAD_WIDTH)


def visible_indices(mask: Tensor, num_visible: int) -> Tensor:
    """Raster indices of the visible patches, in ascending order.

    Args:
        mask: (B, d, h, w) bool, True = hidden, with the same number of hidden patches in every sample.
        num_visible: visible patches in every sample; given rather than counted, as counting makes the GPU wait.

    Returns:
        (B, num_visible) int64.
    """
    return mask.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)[:, :num_visible]


def scatter_tokens(tokens: Tensor, indices: Tensor, background: Tensor) -> Tensor:
    """Put tokens (B, M, width) at indices (B, M) of a background (B, N, width)."""
    return background.scatter(1, indices[..., None].expand(-1, -1, tokens.shape[-1]), tokens)


def initial_positions(grid: Sequence[int], width: int, local_start: bool) -> Tensor:
    """Positions that tokens of some width start with, (1, N, width); see ``local_start`` of :class:`ViTEncoder`."""
    return sincos_positions(grid, width, *(_LOCAL_POSITIONS if local_start else ()))


def sincos_positions(grid: Sequence[int], width: int, temperature: float = 10000.0, scale: float = 1.0) -> Tensor:
    """Fixed 3D sine-cosine position embedding (1, N, width).

    A third of the channels each, rounded down to an even number, encodes z, y and x as sines and cosines of
    geometrically spaced frequencies, from 1 down to almost 1 / temperature; what is left of the width stays zero.

    Args:
        grid: tokens per axis.
        width: channels of a token.
        temperature: sets the lowest frequency. If it is high, most channels are nearly the same at all positions of a
            small grid.
        scale: factor on all values; the larger it is, the more a token says about where it lies.
    """
    per_axis = width // 6 * 2
    frequencies = temperature ** (-torch.arange(per_axis // 2, dtype=torch.float64) / (per_axis / 2))
    coordinates = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [c.reshape(-1, 1) * frequencies for c in coordinates]
    encoded = scale * torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return nn.functional.pad(encoded, (0, width - encoded.shape[1])).float()[None]
