"""Self-supervised tasks, one module a method."""

from nnunet_topomae.pretext.base import PretextOutput, PretextTask
from nnunet_topomae.pretext.topomae import TopoMAE

__all__ = ["PretextOutput", "PretextTask", "TopoMAE"]
