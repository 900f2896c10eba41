"""Alice: masked reconstruction, and alignment of the same body part in two patients (Jiang et al.)."""

from nnunet_topomae.methods.alice.settings import AliceConfig
from nnunet_topomae.methods.alice.task import Alice

__all__ = ["Alice", "AliceConfig"]
