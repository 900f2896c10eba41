"""``nnUNetv2_train ... -tr MAEPretrainer``."""

from nnunet_topomae.methods.mae import MAE
from nnunet_topomae.nnunet.training.pretraining import Pretrainer


class MAEPretrainer(Pretrainer):
    """Pre-trains the ViT of a UNETR (MAE, He et al.; in 3D as SelfMedMAE)."""

    task_class = MAE
