"""``nnUNetv2_train ... -tr AlicePretrainer``."""

from nnunet_topomae.methods.alice import Alice
from nnunet_topomae.nnunet.training.pretraining import Pretrainer


class AlicePretrainer(Pretrainer):
    """Pre-trains a ViT on masked crops, and aligns the same body part in two patients (Alice, Jiang et al.)."""

    task_class = Alice
