"""Pre-training methods, one room each, and the contract that they share."""

from nnunet_topomae.methods.base import Batch, CaseReport, ImageSource, PretextTask, Views, to_float32

__all__ = ["Batch", "CaseReport", "ImageSource", "PretextTask", "Views", "to_float32"]
