"""``nnUNetv2_train ... -tr FusedFinetuneTrainer``."""

from nnunet_topomae.config import TopoMAEConfig
from nnunet_topomae.nnunet.finetuning import FinetuneTrainer
from nnunet_topomae.nnunet.plans import PRETRAINING


class FusedFinetuneTrainer(FinetuneTrainer):
    """Fine-tunes the fused ViT and UNETR++ that TopoMAEPretrainer pre-trained (Gu et al., section II-D)."""

    pretrainers = ("TopoMAEPretrainer",)

    @classmethod
    def blocks(cls) -> dict[str, type]:
        """Both, as they are planned together."""
        return {**super().blocks(), PRETRAINING: TopoMAEConfig}
