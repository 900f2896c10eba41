"""The learning rate over a training."""

import math


def warmup_cosine(iteration: int, warmup: float, total: float) -> float:
    """Factor on the learning rate: linear from 0 over ``warmup`` iterations, then half a cosine to 0 at ``total``.

    The warm-up counts iterations from 1, so that the first one already learns.
    """
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    share = (iteration - warmup) / max(total - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(share, 1)))
