"""Slices of test cases: what is labelled is tinted, what is predicted has an outline."""

from collections.abc import Mapping
from io import BytesIO

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from nnunet_topomae.reporting.figures import Geometry

_WIDTH, _DPI = 2.2, 120  # inches
_WINDOW = (0.5, 99.5)  # percentiles of the slice that become black and white
_MARGIN_MM = 15  # around what is labelled or predicted
_TINT = 0.4  # opacity

Image = npt.NDArray[np.float32]
Labels = npt.NDArray[np.integer]


def slices(
    image: Image, label: Labels, prediction: Labels, geometry: Geometry, colors: Mapping[int, str]
) -> dict[str, bytes]:
    """PNG pictures of the slices with most labelled voxels, one a plane, cut to what is labelled or predicted.

    If nothing is labelled, of those with most predicted voxels.

    Args:
        image: (D, H, W).
        label, prediction: (D, H, W), 0 for the background.
        geometry: of these arrays.
        colors: of structures, by their values in both.

    Returns:
        By the name of the plane.
    """
    either = (label > 0) | (prediction > 0)
    ranked = label > 0 if label.any() else prediction > 0
    boxes = [_range(either, axis, geometry.spacing[axis]) for axis in range(3)]
    found = {}
    for axis, plane in enumerate(geometry.planes):
        others = tuple(other for other in range(3) if other != axis)
        where = int(ranked.sum(axis=others).argmax())
        cut = tuple(where if other == axis else boxes[other] for other in range(3))
        edges = [geometry.spacing[other] for other in others]
        found[plane] = _draw(image[cut], label[cut], prediction[cut], edges, colors, from_top=plane == "axial")
    return found


def _range(mask: npt.NDArray[np.bool_], axis: int, spacing: float) -> slice:
    others = tuple(other for other in range(3) if other != axis)
    places = np.flatnonzero(mask.any(axis=others))
    if not len(places):
        return slice(None)
    margin = round(_MARGIN_MM / spacing)
    return slice(max(int(places[0]) - margin, 0), int(places[-1]) + margin + 1)


def _draw(
    image: Image,
    label: Labels,
    prediction: Labels,
    edges: list[float],
    colors: Mapping[int, str],
    *,
    from_top: bool,
) -> bytes:
    height, width = (size * edge for size, edge in zip(image.shape, edges, strict=True))
    figure = Figure(figsize=(_WIDTH, _WIDTH * min(max(height / width, 0.3), 3)), dpi=_DPI, facecolor="black")
    axis = figure.add_axes((0, 0, 1, 1))
    low, high = np.percentile(image, _WINDOW)
    axis.imshow(
        image,
        cmap="gray",
        vmin=low,
        vmax=high if high > low else low + 1,
        aspect=edges[0] / edges[1],
        origin="upper" if from_top else "lower",
        interpolation="bilinear",
    )
    limits = {"xlim": axis.get_xlim(), "ylim": axis.get_ylim()}
    rows, columns = (np.arange(-1, size + 1) for size in label.shape)
    for structure, color in colors.items():
        labelled, predicted = (np.pad(volume == structure, 1) for volume in (label, prediction))  # closed at the border
        if labelled.any():
            axis.contourf(columns, rows, labelled, [0.5, 1], colors=color, alpha=_TINT)
        if predicted.any():
            axis.contour(columns, rows, predicted, [0.5], colors=color, linewidths=1.3)
    axis.set(**limits)
    axis.set_axis_off()
    content = BytesIO()
    figure.savefig(content, format="png", facecolor="black")
    return content.getvalue()
