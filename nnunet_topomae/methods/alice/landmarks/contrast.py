"""The loss of the landmark network: InfoNCE with hard negatives (Yan et al., section III-C)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.5  # this and the numbers below: SAM
_FINE, _COARSE = (2000, 500), (250, 200)  # most similar places, and how many of them are drawn as negatives
_OF_BATCH = 300  # negatives of the coarse map from all images
_NEAR = 1.5  # steps of a map within which other places are no negatives: ours


class Points(NamedTuple):
    """Where the same places lie in two views of an image, in voxels of the views.

    Attributes:
        first: (P, 3).
        second: (P, 3).
    """

    first: Tensor
    second: Tensor


def sample(features: Tensor, points: Tensor, size: tuple[int, ...]) -> Tensor:
    """Vectors at some voxels of an image, by linear interpolation of its map, scaled to length 1.

    Args:
        features: the map of the image, (E, d, h, w).
        points: voxels of the image, (P, 3) as z, y, x; may lie between voxels.
        size: of the image per axis, which is a multiple of the size of the map.

    Returns:
        (P, E).
    """
    extent = points.new_tensor(size)
    grid = ((2 * points + 1) / extent - 1).flip(-1)[None, :, None, None]
    vectors = F.grid_sample(features[None], grid, padding_mode="border", align_corners=False)[0, :, :, 0, 0].T
    return F.normalize(vectors, dim=1)


def contrast(maps: Tensor, points: list[Points], size: tuple[int, ...], *, coarse: bool) -> Tensor:
    """InfoNCE of a map, mean over all points.

    Args:
        maps: of the views of B images, (2B, E, d, h, w): first the first view of each, then the second.
        points: of each of the B images.
        size: of a view per axis.
        coarse: whether it is the coarse map, which has negatives from all images, too.
    """
    firsts, seconds = maps.chunk(2)
    everywhere = maps.movedim(1, -1).flatten(0, -2)
    losses = []
    for first, second, each in zip(firsts, seconds, points, strict=True):
        queries, keys = sample(first, each.first, size), sample(second, each.second, size)
        similarity = torch.cat(
            [_far(first, queries, each.first, size), _far(second, queries, each.second, size)], dim=1
        )
        most, drawn = _COARSE if coarse else _FINE
        hardest = similarity.topk(min(most, similarity.shape[1]), dim=1).values
        negatives = [hardest[:, torch.randperm(hardest.shape[1], device=hardest.device)[:drawn]]]
        if coarse:
            others = everywhere[torch.randint(len(everywhere), (_OF_BATCH,), device=maps.device)]
            negatives.append(queries @ others.T)
        positive = (queries * keys).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, *negatives], dim=1) / TEMPERATURE
        losses.append(F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64)))
    return torch.stack(losses).mean()


def _far(features: Tensor, queries: Tensor, points: Tensor, size: tuple[int, ...]) -> Tensor:
    """Cosines of queries (P, E) and a whole map, (P, d * h * w), with -inf near the points themselves."""
    steps = [voxels / cells for voxels, cells in zip(size, features.shape[1:], strict=True)]
    axes = [
        (torch.arange(cells, device=points.device) + 0.5) * step - 0.5
        for cells, step in zip(features.shape[1:], steps, strict=True)
    ]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    near = torch.cdist(points, places) < _NEAR * max(steps)
    return (queries @ features.flatten(1)).masked_fill(near, -torch.inf)
