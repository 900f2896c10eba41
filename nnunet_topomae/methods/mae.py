"""MAE: a ViT reconstructs hidden patches from visible ones (He et al.; in 3D as SelfMedMAE)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nnunet_topomae.methods.base import Batch
from nnunet_topomae.methods.masked import MaskedConfig, NormalisedReconstruction
from nnunet_topomae.networks.vit import ViTEncoder, light_decoder, visible_indices
from nnunet_topomae.settings.schema import with_default


@dataclass(frozen=True)
class MAEConfig(MaskedConfig):
    """The ``pretraining`` block of MAE."""

    mask_ratio: float = with_default(MaskedConfig, "mask_ratio", 0.75, "SelfMedMAE's configuration file")


class MAE(NormalisedReconstruction):
    """Pre-trains the ViT of a network; all other parts stay as they are.

    Args:
        network: with a :class:`ViTEncoder` as ``vit``.
        config: the plans' ``pretraining`` block.
        crop_size: voxels per axis.

    Raises:
        ValueError: for another network.
    """

    config_class = MAEConfig
    headings = {"vit": "ViT"}  # noqa: RUF012 - a constant
    vit: ViTEncoder

    def __init__(self, network: nn.Module, config: MAEConfig, crop_size: Sequence[int]):
        if not isinstance(dict(network.named_children()).get("vit"), ViTEncoder):
            raise ValueError(
                f"MAE pre-trains the ViT of a network, but the plans name {type(network).__name__}, which has none; "
                "plan the dataset with nnUNetv2_topomae plan_and_preprocess -pl TopoMAEUNETRPlanner"
            )
        super().__init__(network, config, crop_size)
        self.requires_grad_(False)
        self.vit.requires_grad_(True)
        self.vit.pos_embed.requires_grad_(False)
        self.vit_decoder = light_decoder(self.vit, self.vit.patch_embed.in_channels)

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """The patches of the ViT, voxels per axis."""
        return self.vit.patch_size

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`PretextTask.forward`; the ViT sees visible patches only."""
        visible = visible_indices(batch["mask"], self.num_visible)
        return {"vit": self.vit_decoder(self.vit(batch["crop"], visible), visible)}
