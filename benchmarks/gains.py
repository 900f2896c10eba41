"""Draws what pre-training was worth in every comparison that a protocol named as the one that counts.

The picture is docs/pictures/gains.svg.

    python benchmarks/gains.py [FILE]

They are computed from ``benchmarks/results``. The cases of TopoMAE's hippocampus studies have not been kept, so their
figures are those of docs/results/hippocampus.md.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from nnunet_topomae.studies.definition import read_study
from nnunet_topomae.studies.results import read_results
from nnunet_topomae.studies.statistics import comparisons

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "benchmarks" / "results"
# Study, labelled cases, row from scratch, and the rows compared with it (by their names in the picture), which are
# corrected for each other.
PLANNED = (
    ("leftatrium_unet", 8, "unet", {"left atria: plain U-Net after SparK\n4,500 and 2,400 steps": "spark"}),
    ("hippocampus_unet", 3, "unet", {"hippocampi: plain U-Net after SparK\n3,000 and 1,200 steps": "spark"}),
    ("leftatrium_long", 8, "scratch", {"left atria: TopoMAE\n4,500 and 2,400 steps": "topomae"}),
    ("leftatrium", 8, "scratch", {"left atria: TopoMAE\n1,500 and 600 steps": "topomae"}),
    (
        "leftatrium_unetr",
        8,
        "unetr",
        {
            "left atria: UNETR after MAE\n9,000 and 600 steps": "mae",
            "left atria: UNETR after MiM\n1,500 and 600 steps": "mim",
            "left atria: UNETR after Alice\n1,500 and 600 steps": "alice",
        },
    ),
)
BETTER, OPEN, WORSE = "#2a9a6b", "#7d8590", "#c8507d"


class Gain(NamedTuple):
    """A difference in Dice, its 95 % interval over test cases, its p-value (corrected), and the difference by seed."""

    difference: float
    low: float
    high: float
    p: float
    by_seed: tuple[float, ...]

    @property
    def color(self) -> str:
        """By the criterion of the protocols: p < 0.05, and all seeds agree in what is called a gain."""
        if self.p >= 0.05:
            return OPEN
        if self.difference < 0:
            return WORSE
        return BETTER if min(self.by_seed) > 0 else OPEN


HIPPOCAMPUS = {
    "hippocampi: TopoMAE, encoder kept\n1,500 and 600 steps": Gain(
        -0.029, -0.034, -0.023, 0.0, (-0.045, -0.066, 0.008, -0.011)
    ),
    "the same, first protocol\none labelled case for all seeds": Gain(
        -0.032, -0.038, -0.025, 0.0, (-0.045, -0.023, -0.027)
    ),
}


def planned_gains() -> dict[str, Gain]:
    """All planned comparisons, from ``benchmarks/results`` where they are kept."""
    gains = {}
    for name, labelled, scratch, rows in PLANNED:
        study = read_study(STUDIES / name)
        records = [record for record in read_results(study) if record.labelled == labelled]
        compared = comparisons(records, dict.fromkeys(rows.values(), scratch), "dice", study.patients)
        found = {each.row: each for each in compared}
        for said, row in rows.items():
            each = found[row]
            gains[said] = Gain(each.difference, each.low, each.high, each.holm_p, tuple(each.by_seed.values()))
    return gains | HIPPOCAMPUS


def draw(axis: Axes, gains: dict[str, Gain]) -> None:
    """A line for each comparison, the first one at the top: interval, mean, and a small dot for each seed."""
    for place, gain in enumerate(gains.values()):
        axis.plot([gain.low, gain.high], [place, place], color=gain.color, linewidth=3, solid_capstyle="round")
        axis.plot(gain.difference, place, "o", color=gain.color, markersize=9)
        axis.scatter(gain.by_seed, [place + 0.28] * len(gain.by_seed), 14, color=gain.color, alpha=0.7)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(gains)), list(gains))
    axis.invert_yaxis()
    axis.set_xlabel("difference in Dice to the same network from scratch")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=ROOT / "docs" / "pictures" / "gains.svg")
    options = parser.parse_args()
    gains = planned_gains()
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "gains", "font.size": 9})
    figure, axis = plt.subplots(figsize=(7, 0.6 * len(gains) + 0.8), layout="constrained")
    draw(axis, gains)
    figure.savefig(options.file, metadata={"Date": None})


if __name__ == "__main__":
    main()
