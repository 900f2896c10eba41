"""How each kind of network reconstructs the hidden patches of a crop, for methods that take several kinds."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from nnunet_topomae.networks.geometry import Size
from nnunet_topomae.networks.vit import ViTEncoder, light_decoder, visible_indices


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

    @abstractmethod
    def forward(self, encoder: nn.Module, crop: Tensor, mask: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
        """Reconstruct a crop from its visible patches.

        Args:
            encoder: of the network.
            crop: (B, C, D, H, W).
            mask: (B, d, h, w) bool of patches, True = hidden; as many in every sample.
            num_visible: visible patches in every sample.

        Returns:
            The prediction at every patch, (B, C, D, H, W), and the decoder's features that it was made from, on the
            grid of patches, (B, width, d, h, w).
        """


class ViTAutoencoder(MaskedAutoencoder):
    """The light transformer decoder of He et al. for a ViT, which sees visible patches only.

    Args:
        encoder: the ViT.
        channels: of the crop.
    """

    encoder_name = "vit"

    def __init__(self, encoder: ViTEncoder, channels: int):
        super().__init__()
        self.patch_size = encoder.patch_size
        self.decoder = light_decoder(encoder, channels)
        self.width = self.decoder.embed.out_features

    def forward(self, encoder: nn.Module, crop: Tensor, mask: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
        """See :meth:`MaskedAutoencoder.forward`."""
        visible = visible_indices(mask, num_visible)
        features = self.decoder.decode(encoder(crop, visible), visible)
        return self.decoder.predict(features), features.transpose(1, 2).unflatten(2, mask.shape[1:])


def autoencoder_of(network: nn.Module) -> MaskedAutoencoder | None:
    """The autoencoder for a network, built with as many classes as the crop has channels; None for another kind."""
    parts = dict(network.named_children())
    if isinstance(vit := parts.get("vit"), ViTEncoder):
        return ViTAutoencoder(vit, vit.patch_embed.in_channels)
    return None
