"""The ``pretraining`` block of Alice."""

from dataclasses import dataclass

from nnunet_topomae.methods.alice.landmarks.settings import LandmarkConfig
from nnunet_topomae.methods.masked import MaskedConfig
from nnunet_topomae.settings import StageConfig
from nnunet_topomae.settings.schema import Choice, Flag, Number, block, setting, with_default

MATCHERS = ("embedding", "position", "same_volume")
SIMILARITIES = ("cosine", "dino")


@dataclass(frozen=True)
class AliceConfig(MaskedConfig):
    """The ``pretraining`` block of Alice."""

    mask_ratio: float = with_default(MaskedConfig, "mask_ratio", 0.75, "MAE")
    base_lr: float = with_default(StageConfig, "base_lr", 5e-5, "paper, 4.2")
    scale_lr: bool = with_default(StageConfig, "scale_lr", False, "paper, 4.2: a rate, no rule for other batches")
    weight_decay: float = with_default(StageConfig, "weight_decay", 0.04, "authors' code, where it rises to 0.4")
    warmup_epochs: float = with_default(StageConfig, "warmup_epochs", 30, "paper, 4.2: 3 % of all epochs")
    matcher: str = setting(
        "embedding",
        Choice(MATCHERS),
        "how the same body part is found in another volume: by the `embedding` of a landmark network that is trained "
        "on the same images, or by the relative `position` in the body's bounding box; `same_volume` takes both crops "
        "from one place in one volume",
        "paper, 3; position: ours; same_volume: Table 4",
    )
    similarity: str = setting(
        "cosine",
        Choice(SIMILARITIES),
        "how features are compared: `cosine` after a predictor, or `dino`: cross-entropy of sharpened features",
        "paper, 3.2; dino: authors' code",
    )
    l_dv: bool = setting(
        default=True,
        accepted=Flag(),
        meaning="compare crops of the same body part in two volumes",
        source="paper, 3.2; without: Table 4",
    )
    casa: bool = setting(
        default=True,
        accepted=Flag(),
        meaning="compare what the masked view finds in both views of a crop (CASA); false: compare their averages",
        source="paper, 3.3; without: Table 5",
    )
    momentum: float = setting(
        0.996,
        Number(0, 1),
        "momentum of the target encoder at the start; it rises to 1 along a cosine",
        "authors' code, as BYOL",
    )
    landmarks: LandmarkConfig = block(LandmarkConfig)
    head_width: int = setting(2048, Number(1, integer=True), "hidden units of the projection heads", "DINO")
