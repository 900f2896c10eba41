"""How each kind of network reconstructs the hidden patches of a crop, for methods that take several kinds."""

from abc import ABC, abstractmethod
from math import prod

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from nnunet_topomae.methods.light_decoder import SparKDecoder
from nnunet_topomae.methods.masked_convolution import choose_patch_size, hide_in
from nnunet_topomae.methods.masking import mask_to_voxels
from nnunet_topomae.networks.geometry import Size, size_of
from nnunet_topomae.networks.hybrid import HybridEncoder
from nnunet_topomae.networks.traits import constant_parameters
from nnunet_topomae.networks.vit import (
    LayerNorm,
    TokenEncoder,
    ViTDecoder,
    ViTEncoder,
    light_decoder,
    visible_indices,
)

_HEAD_WIDTH = 36  # of the decoder for a hybrid encoder


class MaskedAutoencoder(nn.Module, ABC):
    """A decoder that pre-training adds to the encoder of a network.

    It does not hold the encoder, which belongs to the network, but is handed it.

    Attributes:
        encoder_name: under which the network holds its encoder.
        patch_size: voxels per axis of a patch.
        width: channels of the features.
    """

    encoder_name: str
    patch_size: Size
    width: int

    def encoder_of(self, owner: nn.Module) -> nn.Module:
        """The encoder, in the network or in a task that holds the network's parts."""
        return owner.get_submodule(self.encoder_name)

    @abstractmethod
    def decode(self, encoder: nn.Module, crop: Tensor, mask: Tensor, num_visible: int) -> Tensor:
        """Features of all patches of a crop, made from its visible ones.

        Args:
            encoder: of the network.
            crop: (B, C, D, H, W).
            mask: (B, d, h, w) bool of patches, True = hidden; as many in every sample.
            num_visible: visible patches in every sample.

        Returns:
            (B, width, d, h, w), one vector for each patch, or (B, width, D, H, W), one for each voxel.
        """

    @abstractmethod
    def predict(self, features: Tensor) -> Tensor:
        """The prediction (B, C, D, H, W) from the features that :meth:`decode` gives."""


class ViTTokens(nn.Module):
    """The tokens of a ViT, to which nothing is added."""

    def forward(self, encoder: ViTEncoder, crop: Tensor, visible: Tensor | None) -> Tensor:
        """Tokens of visible patches.

        Args:
            encoder: of the network.
            crop: (B, C, D, H, W).
            visible: (B, M) raster indices of visible patches; None shows everything.

        Returns:
            (B, M, width), in the order of the indices.
        """
        return encoder(crop, visible)


class StageTokens(nn.Module):
    """Tokens that hold all stages of a hybrid encoder (ConvMAE, Gao et al., section 3.3).

    Feature maps of the three convolutional stages are projected to one token per patch and added to the tokens of the
    last stage; then a norm.

    Args:
        encoder: the hybrid encoder.
    """

    def __init__(self, encoder: HybridEncoder):
        super().__init__()
        self.projections = nn.ModuleList()
        for stage, width in enumerate(encoder.widths[:-1], start=1):
            stride = size_of(map(prod, zip(*encoder.strides[stage:], strict=True)))
            self.projections.append(nn.Conv3d(width, encoder.width, stride, stride))
        self.norm = LayerNorm(encoder.width)

    def forward(self, encoder: HybridEncoder, crop: Tensor, visible: Tensor | None) -> Tensor:
        """See :meth:`ViTTokens.forward`."""
        *stages, tokens = encoder(crop, visible)
        for projection, stage in zip(self.projections, stages, strict=True):
            tokens = tokens + projection(stage)
        by_crop = tokens.flatten(2).transpose(1, 2).reshape(len(crop), -1, tokens.shape[1])  # of maps and of stacks
        return self.norm(by_crop)


class TokenAutoencoder(MaskedAutoencoder):
    """A transformer decoder for an encoder that makes one token of each visible patch, and computes nothing else.

    Args:
        encoder_name: under which the network holds its encoder.
        encoder: a ViT or a hybrid encoder.
        tokens: makes the tokens: :class:`ViTTokens` or :class:`StageTokens`.
        decoder: of these tokens.

    Attributes:
        token_width: channels of a token.
    """

    def __init__(self, encoder_name: str, encoder: TokenEncoder, tokens: nn.Module, decoder: ViTDecoder):
        super().__init__()
        self.encoder_name, self.patch_size, self.token_width = encoder_name, encoder.patch_size, encoder.width
        self.tokens, self.decoder = tokens, decoder
        self.width = decoder.embed.out_features

    def decode(self, encoder: nn.Module, crop: Tensor, mask: Tensor, num_visible: int) -> Tensor:
        """One vector for each patch, (B, width, d, h, w); see :meth:`MaskedAutoencoder.decode`."""
        visible = visible_indices(mask, num_visible)
        features = self.decoder.decode(self.tokens(encoder, crop, visible), visible)
        return features.transpose(1, 2).unflatten(2, mask.shape[1:])

    def predict(self, features: Tensor) -> Tensor:
        """See :meth:`MaskedAutoencoder.predict`."""
        return self.decoder.predict(features.flatten(2).transpose(1, 2))


class ConvolutionalAutoencoder(MaskedAutoencoder):
    """SparK's light decoder for the encoder of nnU-Net's U-Nets, which hides patches after every convolution.

    Args:
        network: PlainConvUNet or ResidualEncoderUNet, 3D; its encoder gets hooks.
        decoder_width: see :class:`SparKDecoder`.
    """

    encoder_name = "encoder"

    def __init__(self, network: PlainConvUNet | ResidualEncoderUNet, decoder_width: int):
        super().__init__()
        encoder = network.encoder
        channels = network.decoder.seg_layers[-1].out_channels
        self.patch_size = choose_patch_size(encoder.strides)
        self.hidden = hide_in(encoder)
        self.decoder = SparKDecoder(encoder.output_channels, encoder.strides, decoder_width, channels)
        self.width = self.decoder.output.in_channels

    def decode(self, encoder: nn.Module, crop: Tensor, mask: Tensor, num_visible: int) -> Tensor:
        """One vector for each voxel, (B, width, D, H, W); see :meth:`MaskedAutoencoder.decode`."""
        self.hidden.mask = mask
        stages = encoder(crop.masked_fill(mask_to_voxels(mask, self.patch_size), 0))
        features = self.decoder.decode(stages, self.hidden)
        self.hidden.mask = None
        return features

    def predict(self, features: Tensor) -> Tensor:
        """See :meth:`MaskedAutoencoder.predict`."""
        return self.decoder.predict(features)


def token_autoencoder_of(network: nn.Module) -> TokenAutoencoder | None:
    """The autoencoder for a network with a ViT or a hybrid encoder; None for another one.

    The decoder is that of He et al. for a ViT (:func:`~nnunet_topomae.networks.vit.light_decoder`). For a hybrid
    encoder it is that of ConvMAE, 1.5 x as wide and 8/11 as deep as the last stage: 576 wide, 8 blocks, 16 heads for
    the default encoder.

    Args:
        network: built with as many classes as the crop has channels.
    """
    parts = dict(network.named_children())
    if isinstance(vit := parts.get("vit"), ViTEncoder):
        return TokenAutoencoder("vit", vit, ViTTokens(), light_decoder(vit, vit.patch_embed.in_channels))
    if isinstance(hybrid := parts.get("encoder"), HybridEncoder):
        width, depth = hybrid.width * 3 // 2, max(round(len(hybrid.blocks) * 8 / 11), 1)
        decoder = ViTDecoder(hybrid, hybrid.input_channels, width, depth, max(width // _HEAD_WIDTH, 1))
        return TokenAutoencoder("encoder", hybrid, StageTokens(hybrid), decoder)
    return None


def autoencoder_of(network: nn.Module, decoder_width: int) -> MaskedAutoencoder | None:
    """The autoencoder for a network of any kind that can hide patches; None for another one.

    Args:
        network: built with as many classes as the crop has channels.
        decoder_width: of the decoder for convolutional encoders; see :class:`SparKDecoder`.
    """
    if isinstance(network, PlainConvUNet | ResidualEncoderUNet):
        return ConvolutionalAutoencoder(network, decoder_width)
    return token_autoencoder_of(network)


def train_only(encoder: nn.Module, task: nn.Module) -> None:
    """Let an encoder learn, save its constant positions, and nothing else that a task holds so far."""
    task.requires_grad_(False)  # the encoder, too: nnU-Net's decoders hold it
    constant = constant_parameters(encoder)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name not in constant)
