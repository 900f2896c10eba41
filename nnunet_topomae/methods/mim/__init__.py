"""MiM: hidden regions of a coarse volume become the volumes of the next, finer level (Zhuang et al.)."""

from nnunet_topomae.methods.mim.settings import MiMConfig
from nnunet_topomae.methods.mim.task import MiM
from nnunet_topomae.methods.mim.views import NestedViews

__all__ = ["MiM", "MiMConfig", "NestedViews"]
