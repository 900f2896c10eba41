"""What a plans file may say: what a key accepts, and the settings that every method shares."""

from nnunet_topomae.settings.schema import flatten, read_block, to_block
from nnunet_topomae.settings.stages import FinetuningConfig, PretrainingConfig, StageConfig, UNetFinetuningConfig

__all__ = [
    "FinetuningConfig",
    "PretrainingConfig",
    "StageConfig",
    "UNetFinetuningConfig",
    "flatten",
    "read_block",
    "to_block",
]
