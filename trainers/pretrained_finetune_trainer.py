"""``nnUNetv2_train ... -tr PretrainedFinetuneTrainer``."""

from nnunet_topomae.config import UNetFinetuningConfig
from nnunet_topomae.nnunet.finetuning import FinetuneTrainer


class PretrainedFinetuneTrainer(FinetuneTrainer):
    """Fine-tunes the network of any plans from whichever pre-training there is: AdamW, warm-up, cosine."""

    config_class = UNetFinetuningConfig
    pretrainers = ("AnatoMaskPretrainer", "SparKPretrainer", "MAEPretrainer", "TopoMAEPretrainer")
