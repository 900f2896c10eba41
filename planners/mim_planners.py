"""``nnUNetv2_topomae plan_and_preprocess -pl TopoMAEHybridPlanner``, or ``-pl MiMUNETRPlanner``: plans for MiM."""

from typing import Any, ClassVar

from nnunet_topomae.methods.base import PretextTask
from nnunet_topomae.methods.mim import MiM
from nnunet_topomae.networks import HybridUNETR
from nnunet_topomae.networks.geometry import Size
from nnunet_topomae.networks.pyramid import upsampling_steps
from nnunet_topomae.nnunet.planning.geometry import Strides
from nnunet_topomae.nnunet.planning.planner import PretrainingPlanner
from nnunet_topomae.planners.unetr_planner import TopoMAEUNETRPlanner

_WARMUP_SHARE = 100 / 45_000  # steps, paper, Table 3
_NUM_STRIDES = 5  # of the hybrid network, after full resolution


class MiMUNETRPlanner(TopoMAEUNETRPlanner):
    """Writes ``nnUNetMiMUNETRPlans``: a UNETR with ViT-B, to be pre-trained by MiMPretrainer."""

    task_class = MiM
    pretrainer = "MiMPretrainer"
    default_plans_name = "nnUNetMiMUNETRPlans"
    warmup_share = _WARMUP_SHARE


class TopoMAEHybridPlanner(PretrainingPlanner):
    """Writes ``nnUNetTopoMAEHybridPlans``: a hybrid encoder in a U-shaped network, to be pre-trained by MiMPretrainer.

    Attributes:
        encoder: widths, depths and heads of the encoder.
    """

    network_class = HybridUNETR
    task_class: ClassVar[type[PretextTask]] = MiM
    pretrainer = "MiMPretrainer"
    finetuner = "PretrainedFinetuneTrainer"
    default_plans_name = "nnUNetTopoMAEHybridPlans"
    warmup_share = _WARMUP_SHARE
    encoder: ClassVar[dict[str, Any]] = {"widths": [48, 96, 192, 384], "depths": [2, 2, 2, 11], "num_heads": 12}

    def network_arguments(self, crop_size: Size, strides: Strides, patch_size: Size) -> dict[str, Any]:
        """See :meth:`PretrainingPlanner.network_arguments`; the strides decide on the size of patches here.

        No stride is above 2. Where the images allow fewer than five halvings, the last strides are 1.
        """
        first, stem, *others = strides
        steps = [step for step in (*reversed(list(upsampling_steps(stem))), *others) if max(step) > 1]
        steps += [(1, 1, 1)] * (_NUM_STRIDES - len(steps))
        return {
            "crop_size": list(crop_size),
            "strides": [list(stride) for stride in (first, *steps)],
            "encoder": {**self.encoder, "local_start": self.local_start},
        }

    def finetuning_block(self, batch_size: int) -> dict[str, Any]:
        """With MiM's stochastic depth, and one learning rate for all layers.

        See :meth:`PretrainingPlanner.finetuning_block`.
        """
        return {**super().finetuning_block(batch_size), "drop_path": 0.2, "layer_decay": 1.0}
