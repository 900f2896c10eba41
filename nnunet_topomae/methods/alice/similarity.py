"""How alike features are that should agree: l_s of the paper, and what keeps it from a trivial answer."""

from math import cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor

STUDENT_TEMPERATURE = 0.1  # this and what follows: the authors' code
FIRST_TEMPERATURE, LAST_TEMPERATURE = 0.008, 0.01
CENTRE_MOMENTUM = 0.9
_TEMPERATURE_RISES = 0.03  # share of the training; 30 of the paper's 3,200 epochs would be 0.01, of 1,000 this


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine; no gradient reaches the teacher (BYOL; SimSiam).

    Args:
        student: (..., C).
        teacher: the same shape.

    Returns:
        (...), in [0, 2]: 0 for equal directions.

    Example:
        >>> import torch
        >>> from nnunet_topomae.methods.alice.similarity import cosine_loss
        >>> cosine_loss(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]]))
        tensor([0., 1.])
    """
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=-1)


def dino_loss(student: Tensor, teacher: Tensor, centre: Tensor, temperature: Tensor | float) -> Tensor:
    """Cross-entropy of a student's distribution over the channels and the teacher's (DINO, equation 2).

    Vectors are scaled to length 1 first. No gradient reaches the teacher.

    Args:
        student: (..., C).
        teacher: the same shape.
        centre: (C,), the mean of teachers in past steps, which is taken away.
        temperature: of the teacher; the student's is 0.1.

    Returns:
        (...).
    """
    target = ((F.normalize(teacher.detach(), dim=-1) - centre) / temperature).softmax(dim=-1)
    return -(target * (F.normalize(student, dim=-1) / STUDENT_TEMPERATURE).log_softmax(dim=-1)).sum(dim=-1)


def moved_centre(centre: Tensor, teacher: Tensor) -> Tensor:
    """The centre after a step: 0.9 x centre + 0.1 x mean of the teachers, (C,) (DINO, equation 4)."""
    mean = F.normalize(teacher, dim=-1).flatten(0, -2).mean(dim=0)
    return CENTRE_MOMENTUM * centre + (1 - CENTRE_MOMENTUM) * mean


def teacher_temperature(progress: float) -> float:
    """0.008 at the start, 0.01 from 3 % of the training on; ``progress`` is the share that is done."""
    return FIRST_TEMPERATURE + (LAST_TEMPERATURE - FIRST_TEMPERATURE) * min(progress / _TEMPERATURE_RISES, 1)


def target_momentum(first: float, progress: float) -> float:
    """Momentum of the target, which rises from ``first`` to 1 along a cosine (BYOL, section 3.3).

    Example:
        >>> from nnunet_topomae.methods.alice.similarity import target_momentum
        >>> [round(target_momentum(0.996, progress), 6) for progress in (0, 0.5, 1)]
        [0.996, 0.998, 1.0]
    """
    return 1 - (1 - first) * (cos(pi * progress) + 1) / 2


def spread(vectors: Tensor) -> Tensor:
    """How much vectors differ: their standard deviation per channel, once they are of length 1.

    Args:
        vectors: (B, C).

    Returns:
        A scalar: the mean over channels times sqrt(C). 0 if all are the same, about 1 if they point into all directions
        (Chen and He, SimSiam, section 4.1).
    """
    unit = F.normalize(vectors, dim=-1)
    return unit.std(dim=0, correction=0).mean() * torch.tensor(float(unit.shape[-1])).sqrt()
