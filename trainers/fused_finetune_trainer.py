"""``nnUNetv2_train ... -tr FusedFinetuneTrainer``."""

from nnunet_topomae.methods.topomae import TopoMAEConfig
from nnunet_topomae.nnunet.planning.plans import PRETRAINING
from nnunet_topomae.nnunet.training.finetuning import FinetuneTrainer


class FusedFinetuneTrainer(FinetuneTrainer):
    """Fine-tunes the fused ViT and UNETR++ that TopoMAEPretrainer pre-trained (Gu et al., section II-D)."""

    pretrainers = ("TopoMAEPretrainer",)

    @classmethod
    def blocks(cls) -> dict[str, type]:
        """The ``pretraining`` block is checked too, as both are planned together."""
        return {**super().blocks(), PRETRAINING: TopoMAEConfig}
