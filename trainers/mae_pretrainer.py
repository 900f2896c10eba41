"""``nnUNetv2_train ... -tr MAEPretrainer``."""

from nnunet_topomae.methods.mae import MAE
from nnunet_topomae.nnunet.training.pretraining import Pretrainer


class MAEPretrainer(Pretrainer):
    """Pre-trains the ViT of a UNETR (SelfMedMAE, the paper's [28])."""

    task_class = MAE
