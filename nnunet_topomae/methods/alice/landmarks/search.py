"""Finds places of one image in another by their embeddings."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_topomae.methods.alice.landmarks.contrast import sample
from nnunet_topomae.methods.alice.landmarks.network import STRIDE
from nnunet_topomae.methods.alice.landmarks.store import Embedding


class Matches(NamedTuple):
    """Where places of one image were found in another, in voxels of the images as the network sees them.

    Attributes:
        points: (P, 3).
        similarity: (P,), mean of the fine and the coarse cosine.
        cycle: (P,), distance between where the way there began and where the way back ends.
    """

    points: npt.NDArray[np.float64]
    similarity: npt.NDArray[np.float64]
    cycle: npt.NDArray[np.float64]


def find(query: Embedding, key: Embedding, points: npt.NDArray[np.floating]) -> Matches:
    """Find places of the query in the key, and back again.

    A place is found where the mean of the fine and the coarse cosine is largest (Yan et al., section III-D). The way
    back is ours, and so is the place between the cells of the map.

    Args:
        query, key: the embeddings of two images.
        points: voxels of the query, (P, 3).
    """
    start = torch.from_numpy(np.asarray(points)).float()
    there, similarity = _most_similar(query, key, start)
    back, _ = _most_similar(key, query, there)
    cycle = (back - start).norm(dim=1)
    return Matches(*(each.double().numpy() for each in (there, similarity, cycle)))


def _most_similar(query: Embedding, key: Embedding, points: Tensor) -> tuple[Tensor, Tensor]:
    """The voxels of the key that are most similar to points of the query, (P, 3), and how similar, (P,)."""
    cells = key.fine.shape[1:]
    fine = sample_map(query, points, coarse=False) @ key.fine.flatten(1)
    coarse = sample_map(query, points, coarse=True) @ key.coarse.flatten(1)
    upsampled = F.interpolate(
        coarse.unflatten(1, key.coarse.shape[1:])[:, None],
        size=[voxels // STRIDE for voxels in key.padded_size],
        mode="trilinear",
    )[:, 0, : cells[0], : cells[1], : cells[2]]
    cosines = ((fine + upsampled.flatten(1)) / 2).unflatten(1, cells)
    similarity, place = cosines.flatten(1).max(dim=1)
    steps = torch.stack(torch.unravel_index(place, cells), dim=1)
    return STRIDE * (steps + _between_cells(cosines, steps)) + (STRIDE - 1) / 2, similarity


def _between_cells(cosines: Tensor, peaks: Tensor) -> Tensor:
    """How far from the largest cosine the parabola through it and its two neighbours is largest.

    Args:
        cosines: (P, d, h, w).
        peaks: cell of the largest one of each map, (P, 3).

    Returns:
        (P, 3) in cells, at most 0.5; 0 along an axis at whose end the peak lies.
    """
    maps = torch.arange(len(peaks))
    offsets = torch.zeros(peaks.shape)
    for axis, count in enumerate(cosines.shape[1:]):
        step = torch.eye(3, dtype=peaks.dtype)[axis]
        inside = (peaks[:, axis] > 0) & (peaks[:, axis] < count - 1)
        shifted = [(peaks + n * step * inside[:, None]).unbind(dim=1) for n in (-1, 0, 1)]
        below, peak, above = (cosines[maps, z, y, x] for z, y, x in shifted)
        bend = (2 * peak - below - above).clamp(min=torch.finfo().tiny)
        offsets[:, axis] = torch.where(inside, (above - below) / 2 / bend, 0)
    return offsets.clamp(-0.5, 0.5)


def sample_map(embedding: Embedding, points: Tensor, *, coarse: bool) -> Tensor:
    """Vectors (P, 128) at voxels (P, 3) of an image."""
    if coarse:
        return sample(embedding.coarse, points, embedding.padded_size)
    return sample(embedding.fine, points, tuple(STRIDE * cells for cells in embedding.fine.shape[1:]))
