"""The block ``pretraining.landmarks``."""

from dataclasses import dataclass

from nnunet_topomae.settings.schema import Number, setting


@dataclass(frozen=True)
class LandmarkConfig:
    """``pretraining.landmarks``: how the landmark network is trained, and which of its matches are accepted."""

    iterations: int = setting(
        5000, Number(1, integer=True), "training steps of the landmark network", "ours; SAM: 20,000"
    )
    batch_size: int = setting(4, Number(1, integer=True), "images of a step, of each of which it sees two views", "SAM")
    spacing: float | None = setting(
        None,
        Number(0, low_open=True, optional=True),
        "mm per voxel of the images that it sees; null: 4, or finer where images are small",
        "ours; SAM: 2",
    )
    min_similarity: float = setting(
        0.7, Number(-1, 1), "matches whose cosine is below are not accepted", "authors' code"
    )
    max_cycle: float | None = setting(
        None,
        Number(0, low_open=True, optional=True),
        "a match is accepted if the way back ends at most this many mm from where the way there began; null: 4 voxels "
        "of the landmark network",
        "ours",
    )
