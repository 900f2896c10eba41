"""``nnUNetv2_topomae plan_and_preprocess -pl TopoMAEUNETRPlanner``: the baseline MAE + UNETR."""

from typing import Any

from nnunet_topomae.networks import UNETR
from nnunet_topomae.networks.pyramid import upsampling_steps
from nnunet_topomae.nnunet.planning import Size, Strides, TopoMAEPlanner
from nnunet_topomae.pretext import MAE


class TopoMAEUNETRPlanner(TopoMAEPlanner):
    """Writes ``nnUNetTopoMAEUNETRPlans``: a UNETR with ViT-B, to be pre-trained by MAEPretrainer."""

    default_plans_name = "nnUNetTopoMAEUNETRPlans"
    network_class = UNETR
    task_class = MAE
    pretrainer = "MAEPretrainer"
    finetuner = "PretrainedFinetuneTrainer"
    vit = {"width": 768, "depth": 12, "num_heads": 12}  # noqa: RUF012 - a template, copied on use

    def network_arguments(self, crop_size: Size, strides: Strides, patch_size: Size) -> dict[str, Any]:
        """The strides of a UNETR are those of its ViT's patches."""
        steps = [list(step) for step in upsampling_steps(patch_size)]
        return {
            "crop_size": list(crop_size),
            "strides": [[1, 1, 1], *steps],
            "vit": {"patch_size": list(patch_size), **self.vit},
        }
