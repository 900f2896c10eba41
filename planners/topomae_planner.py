"""``nnUNetv2_topomae plan_and_preprocess -pl TopoMAEPlanner``."""

from nnunet_topomae.nnunet.planning import TopoMAEPlanner

__all__ = ["TopoMAEPlanner"]
