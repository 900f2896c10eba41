"""``nnUNetv2_train ... -tr SparKPretrainer``."""

from nnunet_topomae.nnunet.pretraining import Pretrainer
from nnunet_topomae.pretext.spark import SparK


class SparKPretrainer(Pretrainer):
    """Pre-trains the encoder of a U-Net with patches hidden by chance (Tian et al.)."""

    task_class = SparK
    betas = (0.9, 0.999)
