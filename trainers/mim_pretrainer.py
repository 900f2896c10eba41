"""``nnUNetv2_train ... -tr MiMPretrainer``."""

from nnunet_topomae.methods.mim import MiM
from nnunet_topomae.nnunet.training.pretraining import Pretrainer


class MiMPretrainer(Pretrainer):
    """Pre-trains the encoder of a network on nested volumes of three levels (MiM, Zhuang et al.)."""

    task_class = MiM
