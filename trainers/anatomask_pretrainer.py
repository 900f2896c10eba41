"""``nnUNetv2_train ... -tr AnatoMaskPretrainer``."""

from nnunet_topomae.nnunet.pretraining import Pretrainer
from nnunet_topomae.pretext.spark import AnatoMask


class AnatoMaskPretrainer(Pretrainer):
    """Pre-trains the encoder of a U-Net; a teacher finds the patches that are hidden (Li et al.)."""

    task_class = AnatoMask
    betas = (0.9, 0.999)
