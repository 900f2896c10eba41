"""MAE: a ViT reconstructs hidden patches from visible ones (He et al.; in 3D as SelfMedMAE)."""

from dataclasses import dataclass

from torch import Tensor

from nnunet_topomae.methods.base import Batch
from nnunet_topomae.methods.masked import MaskedConfig, ViTReconstruction
from nnunet_topomae.networks.vit import visible_indices
from nnunet_topomae.settings.schema import with_default


@dataclass(frozen=True)
class MAEConfig(MaskedConfig):
    """The ``pretraining`` block of MAE."""

    mask_ratio: float = with_default(MaskedConfig, "mask_ratio", 0.75, "SelfMedMAE's configuration file")


class MAE(ViTReconstruction):
    """The ViT sees visible patches only, and a light decoder reconstructs the hidden ones."""

    config_class = MAEConfig
    planner = "TopoMAEUNETRPlanner"

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`PretextTask.forward`; the ViT sees visible patches only."""
        visible = visible_indices(batch["mask"], self.num_visible)
        return {"vit": self.vit_decoder(self.vit(batch["crop"], visible), visible)}
