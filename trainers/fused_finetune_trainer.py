"""``nnUNetv2_train ... -tr FusedFinetuneTrainer``."""

from nnunet_topomae.nnunet.finetuning import FinetuneTrainer


class FusedFinetuneTrainer(FinetuneTrainer):
    """Fine-tunes the fused ViT and UNETR++ that TopoMAEPretrainer pre-trained (Gu et al., section II-D)."""

    pretrainer = "TopoMAEPretrainer"
