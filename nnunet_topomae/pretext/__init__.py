"""Self-supervised tasks, one module a method."""

from nnunet_topomae.pretext.base import PretextOutput, PretextTask
from nnunet_topomae.pretext.mae import MAE
from nnunet_topomae.pretext.spark import AnatoMask, SparK
from nnunet_topomae.pretext.topomae import TopoMAE

__all__ = ["MAE", "AnatoMask", "PretextOutput", "PretextTask", "SparK", "TopoMAE"]
