"""``nnUNetv2_train ... -tr MAEPretrainer``."""

from nnunet_topomae.nnunet.pretraining import Pretrainer
from nnunet_topomae.pretext.mae import MAE


class MAEPretrainer(Pretrainer):
    """Pre-trains the ViT of a UNETR (SelfMedMAE, the paper's [28])."""

    task_class = MAE
