"""The ``pretraining`` block of MiM."""

from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_topomae.settings import PretrainingConfig, StageConfig
from nnunet_topomae.settings.schema import Choice, Flag, Grid, Number, Numbers, setting, with_default

MAX_LEVELS = 3
ALIGNMENTS = ("infonce", "byol", "off")
CHILDREN = ("masked", "visible")
SCHEDULES = {  # factor of each level's reconstruction at the start and at the end of training (Table 14)
    "simultaneous": ((1, 1), (1, 1), (1, 1)),
    "coarse_to_fine": ((2, 1), (0, 1), (0, 1)),
    "fine_to_coarse": ((1, 1), (0, 1), (2, 1)),
}


@dataclass(frozen=True)
class MiMConfig(PretrainingConfig):
    """The ``pretraining`` block of MiM."""

    base_lr: float = with_default(StageConfig, "base_lr", 1e-4, "paper, Table 3")
    scale_lr: bool = with_default(StageConfig, "scale_lr", False, "paper, Table 3: 1e-4 at a batch of 256 crops")
    weight_decay: float = with_default(StageConfig, "weight_decay", 0.01, "paper, Table 3")
    warmup_epochs: float = with_default(StageConfig, "warmup_epochs", 0.4, "paper, Table 3: 100 steps")
    levels: int = setting(MAX_LEVELS, Number(1, MAX_LEVELS, integer=True), "number of levels", "paper, 3.4")
    units: Sequence[int] | None = setting(
        None,
        Grid(),
        "parts per axis that level 1 is hidden in, and that level 2 is cut from; null: 2, or where the number of "
        "patches along an axis is odd, its smallest divisor",
        "code; paper, 3.2: 6",
    )
    gamma: int = setting(4, Number(1, integer=True), "volumes of level 2 in each one of level 1", "paper, Table 3")
    beta: int = setting(4, Number(1, integer=True), "volumes of level 3 in each one of level 2", "code")
    mask_ratios: Sequence[float] = setting(
        (0.5, 0.6, 0.6),
        Numbers(MAX_LEVELS, Number(0, 1, low_open=True, high_open=True)),
        "share that is hidden: of the units at level 1, and of the patches at levels 2 and 3",
        "code; paper, Table 3",
    )
    children: str = setting(
        "masked",
        Choice(CHILDREN),
        "whether the volumes of the next level are hidden parts of a level, or visible ones",
        "paper, 3.2; visible: Table 11",
    )
    reconstruction_weights: Sequence[float] = setting(
        (1.0, 1.0, 1.0), Numbers(MAX_LEVELS, Number(0)), "weights of the reconstruction of levels 1 to 3", "paper, 3.4"
    )
    weight_schedule: str = setting(
        "simultaneous",
        Choice(tuple(SCHEDULES)),
        "how these weights change during training: not; coarse levels first; fine levels first",
        "paper, Table 14",
    )
    alignment: str = setting(
        "infonce",
        Choice(ALIGNMENTS),
        "what ties a volume to the region that it was cut from: a contrast with the other regions of the same volume "
        "(`infonce`), likeness alone (`byol`), or nothing (`off`)",
        "paper, 3.3; byol: Table 12",
    )
    alignment_weights: Sequence[float] = setting(
        (0.1, 0.1),
        Numbers(MAX_LEVELS - 1, Number(0)),
        "weights of the alignment of levels 1 and 2, and of levels 2 and 3",
        "paper, Table 3",
    )
    temperature: float = setting(
        0.1,
        Number(0, low_open=True),
        "infonce: divides the cosines",
        "ours; code: 1",
    )
    projection_width: int = setting(
        2048, Number(1, integer=True), "channels of the vectors that are aligned", "paper, 3.3; code: 576"
    )
    decoder_width: int = setting(
        512,
        Number(8, integer=True),
        "U-Nets: channels of the light decoder at the fifth and all coarser scales; each finer scale has half as many",
        "SparK",
    )
    mirror: bool = setting(
        default=False, accepted=Flag(), meaning="mirror crops at random", source="paper, Table 1: random crops only"
    )
    recompute: bool = setting(
        default=True,
        accepted=Flag(),
        meaning="compute level 3 again in the backward pass, one part at a time: a step takes longer, but memory "
        "hardly grows with `beta`",
        source="ours",
    )
