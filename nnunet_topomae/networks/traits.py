"""What networks say about themselves, so that nobody has to guess it from the names of their parameters.

Each part of a network may have methods that tell something about its own tensors: ``no_weight_decay``, as in timm, and
in the same spirit ``constant_parameters`` and ``resizing``. The functions here ask all parts and collect the answers
under full names. The whole network may say by ``encoder_parts`` what its encoder is. docs/adding_a_network.md has an
example.
"""

from typing import Any

from torch import nn

from nnunet_topomae.networks.grids import GridTensor


def no_weight_decay(network: nn.Module) -> set[str]:
    """Names of parameters that get no weight decay, such as positions; biases and other 1D ones never get any."""
    return set(_collect(network, "no_weight_decay"))


def constant_parameters(network: nn.Module) -> set[str]:
    """Names of parameters that pre-training leaves at their initial values on purpose: sine-cosine positions."""
    return set(_collect(network, "constant_parameters"))


def grid_tensors(network: nn.Module) -> dict[str, GridTensor]:
    """How each tensor that lies on a grid of tokens or voxels is resized, by the tensor's name."""
    return _collect(network, "resizing")


def encoder_parameters(network: nn.Module) -> set[str]:
    """Names of the parameters that make features of images.

    A network says by a method ``encoder_parts`` which of its parts have them. Where it has no such method, as those of
    nnU-Net, it is the part ``encoder``.

    Raises:
        ValueError: if it has neither.
    """
    parts = getattr(network, "encoder_parts", lambda: ["encoder"])()
    names = {name for name, _ in network.named_parameters() if name.startswith(tuple(f"{part}." for part in parts))}
    if not names:
        raise ValueError(
            f"{type(network).__name__} has no part that is named {' or '.join(parts)}; give it a method encoder_parts"
        )
    return names


def _collect(network: nn.Module, method: str) -> dict[str, Any]:
    """Answers of all parts that have a method, by full name; a part that answers with names alone gives None each."""
    answers: dict[str, Any] = {}
    for prefix, part in network.named_modules():
        own: Any = getattr(part, method, dict)()
        values = own if isinstance(own, dict) else dict.fromkeys(own)
        answers |= {f"{prefix}.{name}" if prefix else name: value for name, value in values.items()}
    return answers
