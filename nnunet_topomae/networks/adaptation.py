"""Carries weights to a network of another crop size, patch size, stride or number of input channels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ON_TOKENS = ("pos_embed", "attention.project.weight")  # endings of names


@dataclass(frozen=True)
class Adaptation:
    """Weights for another network.

    Attributes:
        weights: every tensor of its state dict.
        adapted: names of those that had to be resized, repeated or divided.
        fresh: names of those that could not be carried and have their initial values.
    """

    weights: dict[str, Tensor]
    adapted: list[str]
    fresh: list[str]


def adapt_weights(
    weights: Mapping[str, Tensor],
    source: nn.Module,
    target: nn.Module,
    channels: tuple[int, int],
    fixed: Sequence[str] = (),
) -> Adaptation:
    """Carry weights from ``source`` to ``target``, networks of one class with other arguments.

    - Learned positions and the projections over tokens of paired attention are resized on the grid of tokens;
      projections are divided by the growth in tokens, so that their sums over all tokens stay what they were.
    - Kernels are resized; those of convolutions are divided by their growth, those of transposed ones are not.
    - What takes the crop's channels is repeated and divided, what gives them is repeated; a single channel gets the
      sum or the mean of all.

    Args:
        weights: state dict of ``source``.
        source: may be on the meta device.
        target: with its initial weights.
        channels: of the crop, before and after.
        fixed: names of tensors that are not learned, such as sine-cosine positions; ``target`` keeps its own.
    """
    result = target.state_dict()
    adapted, fresh = [], []
    for name, initial in target.state_dict().items():
        if name in fixed:
            continue
        given = weights.get(name)
        fitting = None if given is None else _fit(name, given, initial, source, target, channels)
        if fitting is None:
            fresh.append(name)
            continue
        if fitting is not given:
            adapted.append(name)
        result[name] = fitting
    return Adaptation(result, adapted, fresh)


def resize(values: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Resize values on a grid: averages along axes that shrink, linear interpolation along those that grow.

    Args:
        values: (..., N) with N the product of ``before``.
        before, after: cells per axis.

    Returns:
        (..., M) with M the product of ``after``.
    """
    grid = values.reshape(1, -1, *before).float()
    coarse = F.adaptive_avg_pool3d(grid, tuple(map(min, before, after)))
    resized = F.interpolate(coarse, tuple(after), mode="trilinear", align_corners=False)
    return resized.reshape(*values.shape[:-1], prod(after)).to(values.dtype)


def _fit(
    name: str, given: Tensor, wanted: Tensor, source: nn.Module, target: nn.Module, channels: tuple[int, int]
) -> Tensor | None:
    """A tensor as it is if it fits, else made to fit, or None if it cannot be."""
    if name.endswith(_ON_TOKENS):
        before, after = _owner(source, name).grid, _owner(target, name).grid
        if before == after:
            fitting = given
        elif name.endswith("pos_embed"):
            fitting = resize(given.transpose(1, 2), before, after).transpose(1, 2)
        else:
            fitting = resize(given, before, after) * (prod(before) / prod(after))
    elif given.shape == wanted.shape:
        fitting = given
    elif ".to_voxels." in name:
        fitting = _fit_voxels(given, _owner(source, name).patch_size, _owner(target, name).patch_size, channels)
    elif given.ndim == wanted.ndim == 5:
        module = target.get_submodule(name.rpartition(".")[0])
        fitting = _fit_kernel(given, wanted, isinstance(module, nn.ConvTranspose3d), channels)
    else:
        fitting = _fit_outputs(given, wanted.shape[0], channels)
    return fitting if fitting.shape == wanted.shape else None


def _owner(network: nn.Module, name: str) -> nn.Module:
    """The innermost part with a grid of tokens that a tensor belongs to."""
    parts = name.split(".")[:-1]
    owners = (network.get_submodule(".".join(parts[:length])) for length in range(len(parts), -1, -1))
    return next(owner for owner in owners if hasattr(owner, "grid"))


def _fit_voxels(given: Tensor, before: Sequence[int], after: Sequence[int], channels: tuple[int, int]) -> Tensor:
    """Weight (C * voxels, width) or bias (C * voxels) of the layer that predicts the voxels of a patch."""
    by_channel = given.reshape(channels[0], prod(before), -1).transpose(1, 2)
    resized = resize(by_channel, before, after).transpose(1, 2)
    return _fit_outputs(resized, channels[1], channels).reshape(channels[1] * prod(after), *given.shape[1:])


def _fit_kernel(given: Tensor, wanted: Tensor, transposed: bool, channels: tuple[int, int]) -> Tensor:
    """Kernel (out, in, d, h, w) of a convolution, or (in, out, d, h, w) of a transposed one."""
    before, after = given.shape[2:], wanted.shape[2:]
    if before != after:
        growth = 1 if transposed else prod(after) / prod(before)
        given = resize(given.flatten(2), before, after).unflatten(2, after) / growth
    given = _fit_outputs(given, wanted.shape[0], channels)
    if (given.shape[1], wanted.shape[1]) == channels and channels[0] != channels[1]:
        given = _repeat(given.transpose(0, 1), channels[1]).transpose(0, 1) * (channels[0] / channels[1])
    return given


def _fit_outputs(given: Tensor, wanted: int, channels: tuple[int, int]) -> Tensor:
    """A tensor (channels[0], ...) for ``wanted`` = channels[1] channels; others are returned as they are."""
    if (given.shape[0], wanted) != channels or channels[0] == channels[1]:
        return given
    return _repeat(given, wanted)


def _repeat(values: Tensor, count: int) -> Tensor:
    """Values (n, ...) over and over up to ``count``; their mean where a single one is asked for."""
    if count == 1:
        return values.mean(dim=0, keepdim=True)
    return values[torch.arange(count) % len(values)]
