"""The ``pretraining`` block of TopoMAE."""

from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_topomae.methods.masked import MaskedConfig
from nnunet_topomae.settings.schema import Flag, Grid, Number, Subset, block, setting

BRANCHES = ("vit", "unetrpp")


@dataclass(frozen=True)
class SpatialConfig:
    """``pretraining.spatial``."""

    enabled: bool = setting(
        default=True,
        accepted=Flag(),
        meaning="predict the nine key points of a crop",
        source="paper, II-B; off: Table VI",
    )


@dataclass(frozen=True)
class TopologyConfig:
    """``pretraining.topology``."""

    enabled: bool = setting(
        default=True,
        accepted=Flag(),
        meaning="compare persistence diagrams of crop and reconstruction",
        source="paper, II-A",
    )
    weight: float = setting(
        0.1, Number(0), "factor on the topological terms, whose size grows with the crop", "ours, see docs/losses.md"
    )
    grid: Sequence[int] | None = setting(
        None, Grid(), "cells a crop is averaged to before the filtration; null: every voxel", "ours; paper: null"
    )
    tolerance: float = setting(
        0.0, Number(0, 1, high_open=True), "relative gap allowed to the optimal matching; 0: exact", "ours; paper: 0"
    )


@dataclass(frozen=True)
class TopoMAEConfig(MaskedConfig):
    """The ``pretraining`` block of TopoMAE."""

    branches: Sequence[str] = setting(BRANCHES, Subset(BRANCHES), "networks to pre-train", "paper, II-C; Table VI")
    lambda1: float = setting(0.5, Number(0, 1), "weight of UNETR++ against the ViT", "paper, II-C")
    lambda2: float = setting(0.1, Number(0, 0.5), "weight of the topological and of the spatial loss", "paper, II-C")
    lambda3: float = setting(0.1, Number(0), "weight of both consistency losses", "paper, II-C")
    spatial: SpatialConfig = block(SpatialConfig)
    topology: TopologyConfig = block(TopologyConfig)
