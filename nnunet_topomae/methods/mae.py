"""MAE: a ViT reconstructs hidden patches from visible ones (He et al.; in 3D as SelfMedMAE)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nnunet_topomae.methods.autoencoders import token_autoencoder_of
from nnunet_topomae.methods.base import Batch
from nnunet_topomae.methods.masked import MaskedConfig, NormalisedReconstruction
from nnunet_topomae.networks.vit import ViTEncoder
from nnunet_topomae.settings.schema import with_default

_ENCODER = "vit"


@dataclass(frozen=True)
class MAEConfig(MaskedConfig):
    """The ``pretraining`` block of MAE."""

    mask_ratio: float = with_default(MaskedConfig, "mask_ratio", 0.75, "SelfMedMAE's configuration file")


class MAE(NormalisedReconstruction):
    """Pre-trains the ViT of a network with a light decoder; all other parts stay as they are.

    The ViT sees visible patches only, and the decoder reconstructs the hidden ones.

    Args:
        network: with a :class:`ViTEncoder` as ``vit``.
        config: the plans' ``pretraining`` block.
        crop_size: voxels per axis.

    Raises:
        ValueError: for another network.
    """

    config_class = MAEConfig
    headings = {_ENCODER: "ViT"}  # noqa: RUF012 - a constant
    vit: ViTEncoder

    def __init__(self, network: nn.Module, config: MAEConfig, crop_size: Sequence[int]):
        autoencoder = token_autoencoder_of(network)
        if autoencoder is None or autoencoder.encoder_name != _ENCODER:
            raise ValueError(
                f"MAE pre-trains the ViT of a network, but the plans name {type(network).__name__}, which has none; "
                f"plan the dataset with nnUNetv2_topomae plan_and_preprocess -pl TopoMAEUNETRPlanner"
            )
        super().__init__(network, config, crop_size, autoencoder)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`PretextTask.forward`; the ViT sees visible patches only."""
        features = self.autoencoder.decode(self.vit, batch["crop"], batch["mask"], self.num_visible)
        return {_ENCODER: self.autoencoder.predict(features)}
