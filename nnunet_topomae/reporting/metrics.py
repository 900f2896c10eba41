"""How well a crop was reconstructed."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
from skimage.metrics import structural_similarity

Volume = npt.NDArray[np.float32]

ERROR, SKILL = "MSE", "skill"
_SSIM_WINDOW = 7


def reconstruction_metrics(crop: Volume, prediction: Volume, hidden: npt.NDArray[np.bool_]) -> dict[str, float | None]:
    """Errors of one reconstruction.

    Args:
        crop: (C, D, H, W).
        prediction: the same shape.
        hidden: (1, D, H, W), True = hidden.

    Returns:
        ``MSE`` over hidden voxels; ``PSNR`` in dB from that MSE and the range of the crop's values, None where the MSE
        is 0; ``SSIM`` of the crop and the crop with its hidden voxels replaced by the prediction, for the same range,
        mean over channels.
    """
    value_range = float(np.ptp(crop)) or 1.0
    mse = float(np.square(prediction - crop)[:, hidden[0]].mean())
    composed = np.where(hidden, prediction, crop)
    window = min(_SSIM_WINDOW, (min(crop.shape[1:]) - 1) // 2 * 2 + 1)
    similarities = [
        structural_similarity(a, b, win_size=window, data_range=value_range) if window >= 3 else math.nan
        for a, b in zip(crop, composed, strict=True)
    ]
    ssim = float(np.mean(similarities))
    return {
        ERROR: mse,
        "PSNR": 10 * math.log10(value_range**2 / mse) if mse > 0 else None,
        "SSIM": None if math.isnan(ssim) else ssim,
    }


def mean_of(records: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Mean per key over the records that have a value."""
    means: dict[str, float | None] = {}
    for key in dict.fromkeys(chain.from_iterable(records)):
        values = [value for record in records if (value := record.get(key)) is not None]
        means[key] = float(np.mean(values)) if values else None
    return means


def with_skills(
    metrics: Mapping[str, Mapping[str, float | None]], yardstick: str
) -> dict[str, dict[str, float | None]]:
    """The metrics with the skill of every row that has an MSE first: 1 - (its MSE) / (the MSE of the yardstick).

    The skill of mean errors is that of the errors' ratio, not the mean of the cases' skills.

    Args:
        metrics: figures by branch or baseline and name.
        yardstick: the row to compare with; without such a row there are no skills.
    """
    reference = metrics.get(yardstick, {}).get(ERROR)
    if not reference:
        return {row: dict(figures) for row, figures in metrics.items()}
    skills = {
        row: {SKILL: _skill(figures[ERROR], reference)} if ERROR in figures else {} for row, figures in metrics.items()
    }
    return {row: {**skills[row], **figures} for row, figures in metrics.items()}


def _skill(error: float | None, reference: float) -> float | None:
    return None if error is None else 1 - error / reference
