"""What training runs have left: their losses, settings and figures as tables and charts."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from nnunet_topomae.reporting.charts import LOWEST_SKILL, Line, Style, boxes, over_time
from nnunet_topomae.reporting.page import Charts, Picture, Pictures, Table, plain

_NONE = "–"
_TRAIN, _VAL, _SKILL = "train_", "val_", "skill_"
_FIRST, _LAST = "epoch_start_timestamps", "epoch_end_timestamps"
_SPLITS = {_TRAIN: Style("training", "#3a86c8", "6 2"), _VAL: Style("validation", "#d9702b")}
_NAMES = {"losses": "total loss", "mean_fg_dice": "pseudo Dice in validation", "lrs": "learning rate"}
_ABOUT_SKILL = (
    "Skill: 0 is as good as inpainting that learns nothing, 1 is perfect. "
    f"Values below {LOWEST_SKILL} lie below the chart if others do not."
)
_OF_SEGMENTATIONS = ("Dice", "IoU")  # nnU-Net counts voxels, too
_PICTURES = {
    "reconstructions.png": (
        "Reconstructions of validation cases",
        "Validation cases in three planes: the crop, what the networks saw of it with hidden patches in blue, "
        "inpainting without learning, and the reconstruction of each network",
    ),
    "persistence.png": (
        "Persistence diagrams of validation cases",
        "Persistence diagrams of components, loops and voids of validation cases, before and after reconstruction",
    ),
}


@dataclass(frozen=True)
class Run:
    """A run of pre-training or fine-tuning.

    Attributes:
        folder: of the fold.
        title: what it is called on the page.
        trainer: class that trained it.
        dataset: its name.
        plans: their name.
        configuration: its name.
        fold: a number, or ``all``.
        log: a value per epoch by key.
        settings: that its plans had, by dotted key.
        summary: the content of validation/summary.json; empty if there is none.
        headings: names of the branches as people read them.
        made_with: versions and hardware, as far as they are known.
        file_ending: of the segmentations of the dataset, with the dot.
        seed: of its random numbers; None if the trainer takes none, as nnU-Net's own.
    """

    folder: Path
    title: str
    trainer: str
    dataset: str
    plans: str
    configuration: str
    fold: str
    log: Mapping[str, Sequence[float]]
    settings: Mapping[str, Any]
    summary: Mapping[str, Any] = field(default_factory=dict)
    headings: Mapping[str, str] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=dict)
    file_ending: str = ".nii.gz"
    seed: int | None = None

    @property
    def pretraining(self) -> bool:
        """Whether it is a pre-training; nnU-Net's log has a Dice."""
        return "mean_fg_dice" not in self.log

    @property
    def hours(self) -> float:
        """Time that its epochs took."""
        return sum(self.seconds) / 3600

    @property
    def seconds(self) -> list[float]:
        """Duration of every epoch."""
        pairs = zip(self.log.get(_LAST, ()), self.log.get(_FIRST, ()), strict=False)
        return [last - first for last, first in pairs]

    @property
    def skills(self) -> dict[str, float]:
        """The skill of every branch in the validation of a pre-training, by its heading; empty if there is none."""
        means = self.summary.get("mean", {})
        return {
            heading: means[branch]["skill"]
            for branch, heading in self.headings.items()
            if means.get(branch, {}).get("skill") is not None
        }

    @property
    def dice(self) -> dict[str, float]:
        """Mean Dice over structures of every validation case of a fine-tuning; cases without any are left out."""
        found = {}
        for case in self.summary.get("metric_per_case", ()):
            values = [figures["Dice"] for figures in case["metrics"].values()]
            defined = [value for value in values if value is not None and not math.isnan(value)]
            if defined:
                name = Path(case["prediction_file"]).name
                found[name.removesuffix(self.file_ending)] = float(np.mean(defined))
        return found

    def outcome(self) -> str:
        """What the run has come to, as a sentence."""
        if not self.summary:
            return f"{self.title}: not validated yet, {len(self.seconds)} epochs so far."
        if not self.pretraining:
            mean = _number(float(np.mean(list(self.dice.values()))) if self.dice else None)
            return f"{self.title}: Dice {mean} over {len(self.dice)} validation cases."
        said = " and ".join(f"{name} {skill:.2f}" for name, skill in self.skills.items())
        return f"{self.title}: {f'skill of {said} (0: has learned nothing, 1: perfect)' if said else 'finished'}."

    def figures(self) -> Table | None:
        """Means over the validation cases, a line a branch or structure; None before the validation."""
        if not self.summary:
            return None
        means = dict(self.summary["mean"])
        if not self.pretraining:
            means["all"] = self.summary["foreground_mean"]
        names = dict.fromkeys(name for figures in means.values() for name in figures)
        shown = [name for name in names if self.pretraining or name in _OF_SEGMENTATIONS]
        rows = [
            [self.headings.get(key, key), *(_number(figures.get(name)) for name in shown)]
            for key, figures in means.items()
        ]
        first = "network" if self.pretraining else "structure"
        header = [first, *(name.replace("_", " ") for name in shown)]
        cases = len(self.summary["metric_per_case"])
        return Table(f"Validation of {self.title}", header, rows, f"Validation cases: {cases}. The figures are means.")


def _number(value: float | None) -> str:
    return _NONE if value is None or math.isnan(value) else f"{value:.4g}"


class Drawn(NamedTuple):
    """A run and how it is drawn, which runs of a row have in common.

    Attributes:
        labelled: number of labelled cases, if it matters.
    """

    run: Run
    style: Style
    labelled: int | None = None


def loss_charts(title: str, runs: Sequence[Drawn]) -> Charts:
    """Every term over time: training dashed, validation solid; a colour a style if there are several."""
    several = len({each.style for each in runs}) > 1
    lines: dict[str, list[Line]] = defaultdict(list)
    for each in runs:
        for key, values in each.run.log.items():
            for prefix, plain_style in _SPLITS.items():
                if key.startswith(prefix):
                    mixed = Style(f"{each.style.label}, {plain_style.label}", each.style.color, plain_style.dashes)
                    lines[_term(key.removeprefix(prefix), each.run)].append(
                        Line(values, mixed if several else plain_style)
                    )
    charts = [over_time(name, drawn) for name, drawn in lines.items()]
    legend = _solid(runs) if several else list(_SPLITS.values())
    return Charts(title, charts, legend, "Solid: validation. Dashed: training." if several else "")


def _term(name: str, run: Run) -> str:
    """A term of the loss as people read it."""
    for branch, heading in run.headings.items():
        if name.startswith(f"{branch}_"):
            return f"{heading}: {name.removeprefix(f'{branch}_').replace('_', ' ')}"
    return _NAMES.get(name, name.replace("_", " "))


def _solid(runs: Sequence[Drawn]) -> list[Style]:
    return list(dict.fromkeys(each.style._replace(dashes="") for each in runs))


def course_charts(title: str, runs: Sequence[Drawn]) -> Charts:
    """Skill or pseudo Dice, learning rate and duration of epochs."""
    lines: dict[str, list[Line]] = defaultdict(list)
    for run, style, _ in runs:
        for key, values in run.log.items():
            if key.startswith(_SKILL):
                branch = key.removeprefix(_SKILL)
                lines[f"skill of {run.headings.get(branch, branch)}"].append(Line(values, style))
            elif key in _NAMES and key != "losses":
                lines[_NAMES[key]].append(Line(values, style))
        lines["seconds per epoch"].append(Line(run.seconds, style))
    charts = [
        over_time(
            name,
            drawn,
            from_zero=name.startswith(("seconds", "pseudo")),
            lowest=LOWEST_SKILL if name.startswith("skill") else None,
        )
        for name, drawn in sorted(lines.items(), key=lambda item: not item[0].startswith(("skill", "pseudo")))
    ]
    note = _ABOUT_SKILL if any(name.startswith("skill") for name in lines) else ""
    legend = list(dict.fromkeys(each.style for each in runs))
    return Charts(title, charts, legend if len(legend) > 1 else (), note)


def validation_boxes(runs: Sequence[Drawn]) -> Charts:
    """Dice of the validation cases of fine-tunings; without a chart if there are none."""
    values = {style: list(run.dice.values()) for run, style, _ in runs}
    drawn = {style: row for style, row in values.items() if row}
    charts = [boxes("validation cases", "Dice", drawn)] if drawn else []
    return Charts("Over the validation cases", charts, note="A dot is a validation case.")


def pictures(run: Run) -> list[Pictures]:
    """The pictures that the validation of a pre-training has left."""
    found = []
    for name, (title, alt) in _PICTURES.items():
        file = run.folder / "validation" / name
        if file.is_file():
            found.append(Pictures(f"{title}: {run.title}", [Picture(_small(file), alt)]))
    return found


def _small(file: Path) -> bytes:
    """A PNG file with 256 colours, which are enough for greys and take a third of the space."""
    content = BytesIO()
    Image.open(file).convert("RGB").quantize(256).save(content, format="png", optimize=True)
    return content.getvalue()


def runs_table(runs: Sequence[Run]) -> Table:
    """What the runs are and what they took; what they have in common is said once, below the title."""
    lines = [
        {
            **{name: getattr(run, name) for name in ("dataset", "trainer", "plans", "configuration", "fold")},
            "seed": _NONE if run.seed is None else str(run.seed),
            "epochs": str(len(run.seconds)),
            "hours": f"{run.hours:.2f}",
            **run.made_with,
        }
        for run in runs
    ]
    columns = dict.fromkeys(name for line in lines for name in line)
    values = {name: [line.get(name, _NONE) for line in lines] for name in columns}
    common = {name: each[0] for name, each in values.items() if len(set(each)) == 1 and name != "hours"}
    own = [name for name in columns if name not in common]
    rows = [[run.title, *(values[name][index] for name in own)] for index, run in enumerate(runs)]
    said = ", ".join(f"{name} {value}" for name, value in common.items())
    note = f"{sum(run.hours for run in runs):.2f} hours in all." + (f" All runs: {said}." if said else "")
    return Table("Runs", ["run", *own], rows, note)


def settings_table(runs: Sequence[Run]) -> Table | None:
    """Settings of which the runs have different values; None if there are none."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    lines = {key: [plain(run.settings[key]) if key in run.settings else _NONE for run in runs] for key in keys}
    rows = [[key, *values] for key, values in lines.items() if len(set(values)) > 1]
    return Table("Settings that differ", ["setting", *(run.title for run in runs)], rows) if rows else None
