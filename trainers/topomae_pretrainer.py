"""``nnUNetv2_train ... -tr TopoMAEPretrainer``."""

from nnunet_topomae.nnunet.pretraining import Pretrainer
from nnunet_topomae.pretext.topomae import TopoMAE


class TopoMAEPretrainer(Pretrainer):
    """Co-pre-trains a ViT masked autoencoder and UNETR++ (Gu et al., section II)."""

    task_class = TopoMAE
