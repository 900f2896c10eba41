"""What networks say of themselves, so that nobody has to look at the names of their parameters.

Each part of a network may have methods that speak of its own tensors: ``no_weight_decay`` and, of a whole network,
``group_matcher``, as in timm; ``constant_parameters`` and ``resizing`` in the same spirit. The functions here collect
the answers of all parts under full names.
"""

from typing import Any

from torch import nn

from nnunet_topomae.networks.grids import GridTensor


def no_weight_decay(network: nn.Module) -> set[str]:
    """Names of parameters without weight decay, beside biases and other 1D ones: positions, mask tokens, scales."""
    return set(_collect(network, "no_weight_decay"))


def fixed_parameters(network: nn.Module) -> set[str]:
    """Names of parameters whose first values are meant and that pre-training leaves alone: sine-cosine positions."""
    return set(_collect(network, "constant_parameters"))


def grid_tensors(network: nn.Module) -> dict[str, GridTensor]:
    """Tensors that lie on a grid of tokens or voxels, by name, and how they are resized."""
    return _collect(network, "resizing")


def _collect(network: nn.Module, method: str) -> dict[str, Any]:
    """Answers of all parts that have a method; names alone are mapped to None."""
    answers: dict[str, Any] = {}
    for prefix, part in network.named_modules():
        own: Any = getattr(part, method, dict)()
        values = own if isinstance(own, dict) else dict.fromkeys(own)
        answers |= {f"{prefix}.{name}" if prefix else name: value for name, value in values.items()}
    return answers
