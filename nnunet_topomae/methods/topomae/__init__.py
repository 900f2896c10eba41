"""TopoMAE: co-pre-training of a ViT masked autoencoder and UNETR++ (Gu et al., section II)."""

from nnunet_topomae.methods.topomae.settings import SpatialConfig, TopologyConfig, TopoMAEConfig
from nnunet_topomae.methods.topomae.task import TopoMAE

__all__ = ["SpatialConfig", "TopoMAE", "TopoMAEConfig", "TopologyConfig"]
