"""``nnUNetv2_topomae plan_and_preprocess -pl TopoMAEUNETRPlanner``: the baseline MAE + UNETR."""

from typing import Any, ClassVar

from nnunet_topomae.methods.base import PretextTask
from nnunet_topomae.methods.mae import MAE
from nnunet_topomae.networks import UNETR
from nnunet_topomae.networks.geometry import Size
from nnunet_topomae.networks.pyramid import upsampling_steps
from nnunet_topomae.networks.vit import choose_taps
from nnunet_topomae.nnunet.planning.geometry import Strides
from nnunet_topomae.nnunet.planning.planner import PretrainingPlanner
from nnunet_topomae.settings import FinetuningConfig


class TopoMAEUNETRPlanner(PretrainingPlanner):
    """Writes ``nnUNetTopoMAEUNETRPlans``: a UNETR with ViT-B, to be pre-trained by MAEPretrainer."""

    network_class = UNETR
    task_class: ClassVar[type[PretextTask]] = MAE
    pretrainer = "MAEPretrainer"
    finetuner = "PretrainedFinetuneTrainer"
    default_plans_name = "nnUNetTopoMAEUNETRPlans"
    vit: ClassVar = {"width": 768, "depth": 12, "num_heads": 12}

    def network_arguments(self, crop_size: Size, strides: Strides, patch_size: Size) -> dict[str, Any]:
        """See :meth:`PretrainingPlanner.network_arguments`; the strides of a UNETR are those of its ViT's patches."""
        steps = [list(step) for step in upsampling_steps(patch_size)]
        return {
            "crop_size": list(crop_size),
            "strides": [[1, 1, 1], *steps],
            "vit": self.vit_arguments(patch_size),
            "taps": list(choose_taps(self.vit["depth"], len(steps) - 1)),
        }

    def finetuning_block(self, batch_size: int) -> dict[str, Any]:
        """With rate and weight decay for a ViT, where the trainer's own defaults are for U-Nets.

        See :meth:`PretrainingPlanner.finetuning_block`.
        """
        config = FinetuningConfig()
        own = {"base_lr": config.base_lr, "weight_decay": config.weight_decay}
        return {**super().finetuning_block(batch_size), **own}
