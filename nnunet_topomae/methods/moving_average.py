"""Teachers: networks whose weights are a moving average of another network's."""

import torch
from torch import nn


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move a teacher towards its student: teacher = momentum x teacher + (1 - momentum) x student.

    Args:
        teacher: a copy of the student as it was; its buffers, such as running statistics, are copied.
        student: may hold more than the teacher, for example the teacher itself.
        momentum: in [0, 1].
    """
    own = dict(student.named_parameters())  # each once, also where a network holds a part under two names
    values = dict(teacher.named_parameters())
    torch._foreach_lerp_(list(values.values()), [own[name] for name in values], 1 - momentum)
    buffers = dict(student.named_buffers())
    for name, value in teacher.named_buffers():
        value.copy_(buffers[name])
