"""Alignment of levels (section 3.3): a finer volume against the regions of the one that it was cut from."""

import torch.nn.functional as F
from torch import Tensor


def infonce(queries: Tensor, candidates: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding, among the regions of a volume, the one that a finer volume was cut from.

    Equations 4 to 6, with the positive in the sum of the denominator, as in SimCLR, which they cite.

    Args:
        queries: (P, n, width), of the n finer volumes of each of P volumes.
        candidates: (P, R, width), of the regions of each volume.
        positives: (P, n) indices of the regions that the finer volumes were cut from.
        temperature: divides the cosines.

    Returns:
        A scalar.

    Example:
        The query is orthogonal to one of two regions and equal to the other one.

        >>> import torch
        >>> from nnunet_topomae.methods.mim.alignment import infonce
        >>> regions = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> right, wrong = (infonce(regions[:, :1], regions, torch.tensor([[n]]), 1.0) for n in (0, 1))
        >>> round(right.item(), 4), round(wrong.item(), 4)  # log(1 + 1/e), log(1 + e)
        (0.3133, 1.3133)
    """
    cosines = F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).transpose(1, 2)
    return F.cross_entropy(cosines.flatten(0, 1) / temperature, positives.flatten())


def byol(queries: Tensor, candidates: Tensor, positives: Tensor) -> Tensor:
    """Mean of 2 - 2 cosine of finer volumes and the regions that they were cut from (Grill et al.); no negatives.

    Arguments are those of :func:`infonce`.
    """
    chosen = candidates.gather(1, positives[..., None].expand(-1, -1, candidates.shape[-1]))
    return (2 - 2 * F.cosine_similarity(queries, chosen, dim=-1)).mean()
