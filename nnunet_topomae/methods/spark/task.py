"""SparK and AnatoMask: masked reconstruction by nnU-Net's own convolutional networks (Tian et al.; Li et al.)."""

from collections.abc import Sequence

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import Tensor

from nnunet_topomae.methods.autoencoders import ConvolutionalAutoencoder
from nnunet_topomae.methods.base import Batch
from nnunet_topomae.methods.masked import NormalisedReconstruction
from nnunet_topomae.methods.spark.settings import AnatoMaskConfig, SparKConfig


class SparK(NormalisedReconstruction):
    """Pre-trains the encoder of a U-Net; a light decoder reconstructs, the U-Net's own decoder is not trained.

    Args:
        network: PlainConvUNet or ResidualEncoderUNet, 3D.
        config: the plans' ``pretraining`` block.
        crop_size: voxels per axis.

    Raises:
        ValueError: for another network.
    """

    config_class = SparKConfig
    config: SparKConfig
    headings = {"unet": "U-Net"}  # noqa: RUF012 - a constant
    encoder: PlainConvEncoder | ResidualEncoder

    def __init__(self, network: PlainConvUNet | ResidualEncoderUNet, config: SparKConfig, crop_size: Sequence[int]):
        if not isinstance(network, PlainConvUNet | ResidualEncoderUNet):
            raise ValueError(
                f"{type(self).__name__} pre-trains a PlainConvUNet or ResidualEncoderUNet, but the plans name "
                f"{type(network).__name__}"
            )
        super().__init__(network, config, crop_size, ConvolutionalAutoencoder(network, config.decoder_width))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`PretextTask.forward`; reconstructions are of normalised patches."""
        features = self.autoencoder.decode(self.encoder, batch["crop"], batch["mask"], self.num_visible)
        return {"unet": self.autoencoder.predict(features)}


class AnatoMask(SparK):
    """SparK whose teacher chooses the patches that are hidden (Li et al., section 3)."""

    config_class = AnatoMaskConfig
