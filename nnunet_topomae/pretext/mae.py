"""MAE: a ViT reconstructs hidden patches from visible ones (He et al.; SelfMedMAE, the paper's [28])."""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from nnunet_topomae.config import MAEConfig
from nnunet_topomae.masking import num_hidden_patches
from nnunet_topomae.networks.vit import ViTEncoder, light_decoder, visible_indices
from nnunet_topomae.pretext.base import PretextOutput
from nnunet_topomae.pretext.normalised import NormalisedReconstruction


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
        num_patches = prod(self.mask_grid)
        self.num_visible = num_patches - num_hidden_patches(num_patches, config.mask_ratio)

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """The ViT's."""
        return self.vit.patch_size

    def forward(self, crop: Tensor, mask: Tensor) -> PretextOutput:
        """See :meth:`PretextTask.forward`."""
        visible = visible_indices(mask, self.num_visible)
        return PretextOutput({"vit": self.vit_decoder(self.vit(crop, visible), visible)}, {})
