"""``nnUNetv2_train ... -tr PretrainedFinetuneTrainer``."""

from nnunet_topomae.nnunet.training.finetuning import FinetuneTrainer
from nnunet_topomae.settings import UNetFinetuningConfig


class PretrainedFinetuneTrainer(FinetuneTrainer):
    """Fine-tunes the network of any plans from whichever pre-training there is: AdamW, warm-up, cosine."""

    config_class = UNetFinetuningConfig
