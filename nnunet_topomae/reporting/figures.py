"""Pictures of a pre-training run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunet_topomae.files import write_file
from nnunet_topomae.reporting.charts import LOWEST_SKILL, fit_scale

Volume = npt.NDArray[np.float32]
Diagram = npt.NDArray[np.floating]  # (N, 2): birth and death, birth > death

_PLANES = ("axial", "coronal", "sagittal")
_TILE = 2.2  # inches
_GREY = matplotlib.colormaps["gray"].with_extremes(bad="#24527a")  # hidden voxels in blue
_WINDOW = (0.5, 99.5)  # percentiles of the input that become black and white
_FEW_EPOCHS = 20  # up to which every epoch gets a dot
_HEADING_WIDTH = 22  # letters above a column
_CHANNEL = 0  # the channel that pictures show
_FEATURES = ("components", "loops", "voids")  # by dimension
_MARKERS = "ox+^sD"


class Geometry(NamedTuple):
    """How the axes of volumes lie in the body.

    Attributes:
        spacing: mm per voxel and axis.
        planes: name of the plane perpendicular to each axis; see :func:`plane_names`.
    """

    spacing: Sequence[float]
    planes: Sequence[str]


def plane_names(transpose: Sequence[int] = (0, 1, 2)) -> list[str]:
    """Names of the planes perpendicular to the axes of an array that were (z, y, x) before ``transpose``."""
    return [_PLANES[axis] for axis in transpose]


def save_columns(cases: Mapping[str, Mapping[str, Volume]], geometry: Geometry, file: Path) -> None:
    """Draw the three planes through the middle of every volume, one row a plane, one column a volume.

    All pictures of a case share the grey scale of its first volume; of several channels the first is shown.

    Args:
        cases: volumes (C, D, H, W) by case and heading, the same headings for all; NaN where voxels are hidden.
        geometry: how the axes of the volumes lie in the body.
        file: the PNG file to write.

    Raises:
        ValueError: if there is nothing to draw, or cases have different columns.
    """
    if not cases:
        raise ValueError("there is no case to draw")
    headings = list(next(iter(cases.values())))
    for case, columns in cases.items():
        if list(columns) != headings:
            raise ValueError(f"{case} has columns {', '.join(columns)}, but other cases have {', '.join(headings)}")
    rows = len(cases) * len(_PLANES)
    figure = Figure(figsize=(_TILE * len(headings), _TILE * rows), layout="constrained")
    axes = figure.subplots(rows, len(headings), squeeze=False)
    for index, (case, columns) in enumerate(cases.items()):
        _draw_case(axes[index * len(_PLANES) : (index + 1) * len(_PLANES)], case, columns, geometry)
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(fill(heading, _HEADING_WIDTH), fontsize=11)
    _save(figure, file, dpi=110)


def _draw_case(axes: npt.NDArray[np.object_], case: str, columns: Mapping[str, Volume], geometry: Geometry) -> None:
    reference = next(iter(columns.values()))[_CHANNEL]
    low, high = (float(value) for value in np.percentile(reference, _WINDOW))
    for axis_of_plane, (plane, row) in enumerate(zip(geometry.planes, axes, strict=True)):
        across = [s for axis, s in enumerate(geometry.spacing) if axis != axis_of_plane]
        for axis, volume in zip(row, columns.values(), strict=True):
            middle = volume.shape[1 + axis_of_plane] // 2
            image = np.take(volume[_CHANNEL], middle, axis=axis_of_plane)
            axis.imshow(
                image,
                cmap=_GREY,
                vmin=low,
                vmax=high if high > low else low + 1,
                aspect=across[0] / across[1],
                origin="upper" if plane == _PLANES[0] else "lower",  # head up in coronal and sagittal planes
            )
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{case}\n{plane}", fontsize=8)


class MatchedPoints(NamedTuple):
    """The same place in two volumes.

    Attributes:
        title: what is written beside it.
        volumes: two of them, (C, D, H, W).
        points: one in each, in voxels (z, y, x).
    """

    title: str
    volumes: tuple[Volume, Volume]
    points: tuple[Sequence[float], Sequence[float]]


def save_matches(matches: Sequence[MatchedPoints], spacing: Sequence[float], file: Path) -> None:
    """Draw the three planes through each of two points, one row a pair; crosses mark the points.

    The planes of the first volume stand on the left, those of the second on the right.

    Args:
        matches: the pairs; each volume has a grey scale of its own.
        spacing: mm per voxel and axis, of all volumes.
        file: the PNG file to write.
    """
    columns = 2 * len(_PLANES)
    figure = Figure(figsize=(_TILE * columns, _TILE * len(matches)), layout="constrained")
    axes = figure.subplots(len(matches), columns, squeeze=False)
    for row, match in zip(axes, matches, strict=True):
        for side, volume, point in zip(np.split(row, 2), match.volumes, match.points, strict=True):
            for across, axis in enumerate(side):
                _draw_marked(axis, volume[_CHANNEL], point, across, spacing)
        row[0].set_ylabel(fill(match.title, _HEADING_WIDTH), fontsize=8)
    for column, heading in ((1, "place in one image"), (1 + len(_PLANES), "found in another one")):
        axes[0, column].set_title(heading, fontsize=10)
    _save(figure, file, dpi=100)


def _draw_marked(
    axis: Axes, image: npt.NDArray[np.float32], point: Sequence[float], across: int, spacing: Sequence[float]
) -> None:
    """The plane of an image through a point, perpendicular to an axis, and a cross at the point."""
    low, high = (float(value) for value in np.percentile(image, _WINDOW))
    plane = int(np.clip(round(point[across]), 0, image.shape[across] - 1))
    vertical, horizontal = (n for n in range(3) if n != across)
    axis.imshow(
        np.take(image, plane, axis=across),
        cmap=_GREY,
        vmin=low,
        vmax=high if high > low else low + 1,
        aspect=spacing[vertical] / spacing[horizontal],
        origin="upper" if across == 0 else "lower",
    )
    axis.plot(point[horizontal], point[vertical], "+", color="red", markersize=14, markeredgewidth=1.5)
    axis.set(xticks=[], yticks=[])


def save_diagrams(cases: Mapping[str, Mapping[str, Sequence[Diagram]]], file: Path) -> None:
    """Draw persistence diagrams, one row a case, one column a dimension; a colour and a marker for each volume.

    Args:
        cases: diagrams of the dimensions 0, 1 and 2, by case and heading of the volume that they are of.
        file: the PNG file to write.
    """
    figure = Figure(figsize=(3.4 * len(_FEATURES), 3.2 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), len(_FEATURES), squeeze=False)
    for row, (case, volumes) in zip(axes, cases.items(), strict=True):
        for dimension, (axis, feature) in enumerate(zip(row, _FEATURES, strict=True)):
            _draw_diagrams(axis, {heading: each[dimension] for heading, each in volumes.items()})
            axis.set_title(f"{case}: {feature}", fontsize=10)
    axes[0][0].legend(fontsize=8)
    _save(figure, file, dpi=100)


def _draw_diagrams(axis: Axes, diagrams: Mapping[str, Diagram]) -> None:
    for index, (heading, points) in enumerate(diagrams.items()):
        marker = _MARKERS[index % len(_MARKERS)]
        size = {"o": 22, "x": 16}.get(marker, 26)
        axis.scatter(
            points[:, 0], points[:, 1], size, f"C{index}", marker=marker, linewidths=1, alpha=0.7, label=heading
        )
    values = np.concatenate([points.ravel() for points in diagrams.values()])
    ends = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    axis.plot(ends, ends, color="black", linewidth=0.8)
    axis.set(xlabel="birth", ylabel="death", aspect="equal")
    axis.grid(alpha=0.3)


class Curve(NamedTuple):
    """A value per epoch in training and in validation; either may be missing."""

    training: Sequence[float]
    validation: Sequence[float]


def save_progress(
    terms: Mapping[str, Curve],
    learning_rates: Sequence[float],
    epoch_seconds: Sequence[float],
    skills: Mapping[str, Sequence[float]],
    file: Path,
) -> None:
    """Draw a panel per loss term, and panels of the skill, the learning rate and the duration of epochs.

    Args:
        terms: of the loss, by name.
        learning_rates, epoch_seconds: a value per epoch.
        skills: a value per epoch by branch; 0 is the yardstick, 1 is perfect. No panel if there is none.
        file: to write.
    """
    panels = len(terms) + 2 + bool(skills)
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    remaining = iter(axes)
    if skills:
        _draw_skills(next(remaining), skills)
    first_term = None
    for axis, (name, curve) in zip(remaining, terms.items(), strict=False):
        first_term = first_term or axis
        for values, label, color in ((curve.training, "training", "C0"), (curve.validation, "validation", "C3")):
            if len(values):
                _draw_curve(axis, values, label=label, color=color)
        axis.set_title(name.replace("_", " "))
        fit_scale(axis, [*curve.training, *curve.validation])
    if first_term:
        first_term.legend()
    rates, seconds = axes[panels - 2], axes[panels - 1]
    _draw_curve(rates, learning_rates, color="C2")
    rates.set_title("learning rate at the start of the epoch")
    _draw_curve(seconds, epoch_seconds, color="C4")
    seconds.set_title("epoch duration [s]")
    seconds.set_ylim(bottom=0)
    for axis in axes[:panels]:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    for axis in axes[panels:]:
        axis.remove()
    _save(figure, file, dpi=100)


def _draw_skills(axis: Axes, skills: Mapping[str, Sequence[float]]) -> None:
    for index, (branch, values) in enumerate(skills.items()):
        _draw_curve(axis, values, label=branch, color=f"C{index}")
    fit_scale(axis, [skill for values in skills.values() for skill in values], LOWEST_SKILL)
    axis.axhline(0, color="black", linewidth=1, linestyle="--", label="learns nothing")
    axis.set_title("skill in validation (1: perfect)")
    axis.legend()


def _draw_curve(axis: Axes, values: Sequence[float] | npt.NDArray[np.float64], **style: Any) -> None:
    axis.plot(values, marker="." if len(values) < _FEW_EPOCHS else None, **style)


def _save(figure: Figure, file: Path, dpi: int) -> None:
    write_file(file, lambda stream: figure.savefig(stream, dpi=dpi, format="png"))
