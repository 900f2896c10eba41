"""The learning rate over a training."""

import math


def warmup_cosine(iteration: int, warmup: float, total: float) -> float:
    """Factor on the learning rate: rises linearly for ``warmup`` iterations, then falls on a cosine to 0 at ``total``.

    The first iteration has a factor above 0, so that it already learns.
    """
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    share = (iteration - warmup) / max(total - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(share, 1)))
