"""``nnUNetv2_topomae plan_and_preprocess -pl AliceUNETRPlanner``, or ``-pl AliceHybridPlanner``: plans for Alice."""

from nnunet_topomae.methods.alice import Alice
from nnunet_topomae.planners.mim_planners import TopoMAEHybridPlanner
from nnunet_topomae.planners.unetr_planner import TopoMAEUNETRPlanner

_WARMUP_SHARE = 0.03  # 100 of the epochs of 100,000 steps with a batch of 64 and 2,000 images, paper, 4.2


class AliceUNETRPlanner(TopoMAEUNETRPlanner):
    """Writes ``nnUNetAliceUNETRPlans``: a UNETR with ViT-B, to be pre-trained by AlicePretrainer."""

    task_class = Alice
    pretrainer = "AlicePretrainer"
    default_plans_name = "nnUNetAliceUNETRPlans"
    warmup_share = _WARMUP_SHARE


class AliceHybridPlanner(TopoMAEHybridPlanner):
    """Writes ``nnUNetAliceHybridPlans``: the hybrid network of MiM, to be pre-trained by AlicePretrainer."""

    task_class = Alice
    pretrainer = "AlicePretrainer"
    default_plans_name = "nnUNetAliceHybridPlans"
    warmup_share = _WARMUP_SHARE
