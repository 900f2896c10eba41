"""The ``pretraining`` block of TopoMAE."""

from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_topomae.methods.masked import MaskedConfig
from nnunet_topomae.settings.schema import Flag, Grid, Number, Subset, block, setting

BRANCHES = ("vit", "unetrpp")


@dataclass(frozen=True)
class SpatialConfig:
    """``pretraining.spatial``: whether the branches say where a crop lies."""

    enabled: bool = setting(
        default=True,
        accepted=Flag(),
        meaning="predict where the crop lies in its volume (nine key points)",
        source="paper, II-B; without: Table VI",
    )


@dataclass(frozen=True)
class TopologyConfig:
    """``pretraining.topology``: whether and how topology is compared."""

    enabled: bool = setting(
        default=True,
        accepted=Flag(),
        meaning="ask the reconstruction to keep the topology of the crop (persistence diagrams)",
        source="paper, II-A",
    )
    weight: float = setting(
        0.1,
        Number(0),
        "factor on the topological terms, which grow with the crop",
        "ours; paper, II: 1, as its sum has no such factor",
    )
    grid: Sequence[int] | None = setting(
        None,
        Grid(),
        "cells per axis that a crop is averaged to before its diagrams are computed; null: every voxel",
        "ours; paper: null",
    )
    tolerance: float = setting(
        0.0,
        Number(0, 1, high_open=True),
        "largest relative error allowed in the distance of two diagrams; 0: exact",
        "ours; paper: 0",
    )


@dataclass(frozen=True)
class TopoMAEConfig(MaskedConfig):
    """The ``pretraining`` block of TopoMAE."""

    branches: Sequence[str] = setting(BRANCHES, Subset(BRANCHES), "networks to pre-train", "paper, II-C; Table VI")
    lambda1: float = setting(0.5, Number(0, 1), "share of UNETR++ in the loss; the ViT has the rest", "paper, III-B")
    lambda2: float = setting(0.1, Number(0, 0.5), "weight of the topological and of the spatial term", "paper, III-B")
    lambda3: float = setting(0.1, Number(0), "weight of both consistency terms", "paper, III-B")
    dropout: float | None = setting(
        None,
        Number(0, 1, high_open=True, optional=True),
        "dropout rate of UNETR++ in pre-training; null: as in fine-tuning; TopoMAEPlanner writes 0, with which it "
        "learns faster",
        "UNETR++",
    )
    spatial: SpatialConfig = block(SpatialConfig)
    topology: TopologyConfig = block(TopologyConfig)
