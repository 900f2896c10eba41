"""``nnUNetv2_train ... -tr TopoMAEPretrainer``."""

from nnunet_topomae.methods.topomae import TopoMAE
from nnunet_topomae.nnunet.training.pretraining import Pretrainer


class TopoMAEPretrainer(Pretrainer):
    """Pre-trains a ViT masked autoencoder and UNETR++ together (TopoMAE, Gu et al., section II)."""

    task_class = TopoMAE
