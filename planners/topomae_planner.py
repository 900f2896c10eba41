"""``nnUNetv2_topomae plan_and_preprocess -pl TopoMAEPlanner``, the default."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from nnunet_topomae.methods.topomae import TopoMAE
from nnunet_topomae.networks import FusedViTUNETRPP
from nnunet_topomae.networks.geometry import Size
from nnunet_topomae.networks.vit import choose_taps
from nnunet_topomae.nnunet.planning.geometry import Strides
from nnunet_topomae.nnunet.planning.planner import PretrainingPlanner


class TopoMAEPlanner(PretrainingPlanner):
    """Writes ``nnUNetTopoMAEPlans``: a ViT fused with UNETR++, to be pre-trained by TopoMAEPretrainer.

    Attributes:
        features_per_stage: channels of UNETR++.
        pretraining_dropout: dropout rate of UNETR++ in pre-training; None for that of fine-tuning.
    """

    network_class = FusedViTUNETRPP
    task_class = TopoMAE
    pretrainer = "TopoMAEPretrainer"
    finetuner = "FusedFinetuneTrainer"
    default_plans_name = "nnUNetTopoMAEPlans"
    vit: ClassVar = {"width": 512, "depth": 12, "num_heads": 8}
    features_per_stage: ClassVar = (32, 64, 128, 256)
    pretraining_dropout: ClassVar[float | None] = 0.0

    def pretraining_config(self, crop_size: Size, spacing: Sequence[float], batch_size: int) -> Any:
        """With the dropout of this planner; see :meth:`PretrainingPlanner.pretraining_config`."""
        config: Any = super().pretraining_config(crop_size, spacing, batch_size)
        return replace(config, dropout=self.pretraining_dropout)

    def network_arguments(self, crop_size: Size, strides: Strides, patch_size: Size) -> dict[str, Any]:
        """See :meth:`PretrainingPlanner.network_arguments`."""
        return {
            "crop_size": list(crop_size),
            "strides": [list(stride) for stride in strides],
            "features_per_stage": list(self.features_per_stage),
            "vit": self.vit_arguments(patch_size),
            "taps": list(choose_taps(self.vit["depth"], 3)),
        }
