"""Slices of test cases with the contours of label and prediction."""

from io import BytesIO

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from nnunet_topomae.reporting.charts import Style
from nnunet_topomae.reporting.figures import Geometry

LABEL = Style("label", "#ff8c00")
PREDICTION = Style("prediction", "#00c8ff", "6 2")

_WIDTH, _DPI = 2.2, 120  # inches
_WINDOW = (0.5, 99.5)  # percentiles of the slice that become black and white
_MARGIN_MM = 15  # around what is labelled or predicted

Image = npt.NDArray[np.float32]
Labels = npt.NDArray[np.integer]


def slices(image: Image, label: Labels, prediction: Labels, geometry: Geometry) -> dict[str, bytes]:
    """PNG pictures of the slices with most labelled voxels, one a plane, cut to what is labelled or predicted.

    Args:
        image: (D, H, W).
        label, prediction: (D, H, W), 0 for the background.
        geometry: of these arrays.

    Returns:
        By the name of the plane.
    """
    either = (label > 0) | (prediction > 0)
    boxes = [_range(either, axis, geometry.spacing[axis]) for axis in range(3)]
    found = {}
    for axis, plane in enumerate(geometry.planes):
        others = tuple(other for other in range(3) if other != axis)
        where = int((label > 0).sum(axis=others).argmax())
        cut = tuple(where if other == axis else boxes[other] for other in range(3))
        edges = [geometry.spacing[other] for other in others]
        found[plane] = _draw(image[cut], label[cut], prediction[cut], edges, from_top=plane == "axial")
    return found


def _range(mask: npt.NDArray[np.bool_], axis: int, spacing: float) -> slice:
    others = tuple(other for other in range(3) if other != axis)
    places = np.flatnonzero(mask.any(axis=others))
    if not len(places):
        return slice(None)
    margin = round(_MARGIN_MM / spacing)
    return slice(max(int(places[0]) - margin, 0), int(places[-1]) + margin + 1)


def _draw(image: Image, label: Labels, prediction: Labels, edges: list[float], *, from_top: bool) -> bytes:
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
    for volume, style, dashes in ((label, LABEL, "solid"), (prediction, PREDICTION, (0, (4, 1.5)))):
        for structure in np.unique(volume[volume > 0]):
            padded = np.pad(volume == structure, 1)  # contours close at the border
            rows, columns = (np.arange(-1, size + 1) for size in volume.shape)
            axis.contour(columns, rows, padded, [0.5], colors=style.color, linewidths=1.3, linestyles=[dashes])
    axis.set(**limits)
    axis.set_axis_off()
    content = BytesIO()
    figure.savefig(content, format="png", facecolor="black")
    return content.getvalue()
