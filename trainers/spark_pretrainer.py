"""``nnUNetv2_train ... -tr SparKPretrainer``."""

from nnunet_topomae.methods.spark import SparK
from nnunet_topomae.nnunet.training.pretraining import Pretrainer


class SparKPretrainer(Pretrainer):
    """Pre-trains the encoder of a U-Net; random patches are hidden (SparK, Tian et al.)."""

    task_class = SparK
    betas = (0.9, 0.999)
