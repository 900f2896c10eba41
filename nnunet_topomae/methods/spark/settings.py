"""The ``pretraining`` blocks of SparK and AnatoMask."""

from dataclasses import dataclass

from nnunet_topomae.methods.masked import MaskedConfig
from nnunet_topomae.settings import StageConfig
from nnunet_topomae.settings.schema import Number, setting, with_default


@dataclass(frozen=True)
class SparKConfig(MaskedConfig):
    """The ``pretraining`` block of SparK."""

    mask_ratio: float = with_default(MaskedConfig, "mask_ratio", 0.6, "AnatoMask")
    base_lr: float = with_default(StageConfig, "base_lr", 6.4e-3, "AnatoMask: 1e-4 at a batch of 4")
    weight_decay: float = with_default(StageConfig, "weight_decay", 1e-5, "AnatoMask")
    warmup_epochs: float = with_default(StageConfig, "warmup_epochs", 20, "AnatoMask")
    decoder_width: int = setting(
        512,
        Number(8, integer=True),
        "channels of the light decoder at the fifth and all coarser scales; each finer scale has half as many",
        "AnatoMask",
    )


@dataclass(frozen=True)
class AnatoMaskConfig(SparKConfig):
    """The ``pretraining`` block of AnatoMask: that of SparK, with another default of ``mask_source``."""

    mask_source: str = with_default(MaskedConfig, "mask_source", "anatomask", "AnatoMask")
