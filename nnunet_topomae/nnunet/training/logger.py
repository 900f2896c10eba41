"""The log of a pre-training: a value per epoch for each term of the method's loss."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunet_topomae.reporting.figures import Curve, save_progress

SKILL = "skill_"  # beginning of the keys of skills, which the name of the branch follows


class PretrainingLogger(LocalLogger):
    """nnU-Net's log, to which any key may be added.

    It takes the place of the log that nnU-Net keeps itself. What is logged through nnU-Net's ``MetaLogger`` reaches it,
    and Weights & Biases as well where ``nnUNet_wandb_enabled`` is 1.

    Args:
        headings: names of the branches as people read them in ``progress.png``.
    """

    def __init__(self, headings: Mapping[str, str]):
        super().__init__()
        self.headings = headings
        self.my_fantastic_logging: dict[str, Any] = {}

    def log(self, key: str, value: Any, epoch: int) -> None:
        """Add a value; a key may be new, and then has no values (NaN) in the epochs before."""
        values = self.my_fantastic_logging.setdefault(key, [])
        values.extend([math.nan] * (epoch - len(values)))
        super().log(key, value, epoch)

    def latest(self) -> dict[str, float]:
        """The last value of every key."""
        return {key: values[-1] for key, values in self.my_fantastic_logging.items()}

    def skills(self) -> dict[str, list[float]]:
        """The skill of every branch in all epochs; see :meth:`PretextTask.baseline_error`."""
        log = self.my_fantastic_logging
        return {key.removeprefix(SKILL): list(values) for key, values in log.items() if key.startswith(SKILL)}

    def plot_progress_png(self, output_folder: str) -> None:
        """Draw ``progress.png``: a panel per loss term, learning rate and epoch duration."""
        log: Mapping[str, Any] = self.my_fantastic_logging
        terms = [key.removeprefix("train_") for key in log if key.startswith("train_")]
        times = zip(log["epoch_end_timestamps"], log["epoch_start_timestamps"], strict=True)
        save_progress(
            {("total" if t == "losses" else t): Curve(log[f"train_{t}"], log.get(f"val_{t}", [])) for t in terms},
            log["lrs"],
            [end - start for end, start in times],
            {self.headings.get(branch, branch): skills for branch, skills in self.skills().items()},
            Path(output_folder) / "progress.png",
        )
