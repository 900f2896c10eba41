"""``nnUNetv2_train ... -tr AnatoMaskPretrainer``."""

from nnunet_topomae.methods.spark import AnatoMask
from nnunet_topomae.nnunet.training.pretraining import Pretrainer


class AnatoMaskPretrainer(Pretrainer):
    """Pre-trains the encoder of a U-Net; a teacher chooses the patches that are hidden (AnatoMask, Li et al.)."""

    task_class = AnatoMask
    betas = (0.9, 0.999)
