"""``nnUNetv2_topomae plan_and_preprocess -pl MiMUNETRPlanner``: plans whose memory is that of MiM."""

from nnunet_topomae.methods.mim import MiM
from nnunet_topomae.planners.unetr_planner import TopoMAEUNETRPlanner


class MiMUNETRPlanner(TopoMAEUNETRPlanner):
    """Writes ``nnUNetMiMUNETRPlans``: a UNETR with ViT-B, to be pre-trained by MiMPretrainer."""

    task_class = MiM
    pretrainer = "MiMPretrainer"
    default_plans_name = "nnUNetMiMUNETRPlans"
    warmup_share = 100 / 45_000  # steps, paper, Table 3
