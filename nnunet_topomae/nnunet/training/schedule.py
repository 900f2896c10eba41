"""The learning rate over a training."""

import math


def learning_rate_factor(step: float, warmup: float, total: float, shape: str = "cosine") -> float:
    """Factor on the learning rate: rises linearly to 1 in the first ``warmup`` steps, then falls to 0 at ``total``.

    The first step has a factor above 0, so that it already learns.

    Args:
        step: iterations or epochs that have been trained.
        warmup: steps of the same kind.
        total: steps of the same kind.
        shape: how it falls: ``cosine``, or ``poly``, nnU-Net's polynomial of degree 0.9.
    """
    if step < warmup:
        return min((step + 1) / warmup, 1)
    share = min((step - warmup) / max(total - warmup, 1), 1)
    return (1 - share) ** 0.9 if shape == "poly" else 0.5 * (1 + math.cos(math.pi * share))
