"""``nnUNetv2_train ... -tr PretrainedFinetuneTrainer``."""

from nnunet_topomae.nnunet.training.finetuning import FinetuneTrainer
from nnunet_topomae.settings import UNetFinetuningConfig


class PretrainedFinetuneTrainer(FinetuneTrainer):
    """Fine-tunes the network of any plans from any pre-training, with AdamW, a warm-up and a cosine schedule."""

    config_class = UNetFinetuningConfig
