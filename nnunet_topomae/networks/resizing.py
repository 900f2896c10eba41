"""Carries weights to a network of another crop size, patch size, stride or number of input channels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from nnunet_topomae.networks.grids import repeat_channels, resize
from nnunet_topomae.networks.traits import grid_tensors


@dataclass(frozen=True)
class Adaptation:
    """Weights for another network.

    Attributes:
        weights: every tensor of its state dict.
        adapted: names of tensors that had to be resized, repeated or divided.
        fresh: names of tensors that could not be carried over and have their initial values.
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
    """Carry weights from ``source`` to ``target``, two networks of one class with different arguments.

    - Tensors on grids are resized as the networks say (``resizing()``).
    - Kernels are resized. Those of convolutions are then divided by their growth, those of transposed ones are not.
    - Weights that take the crop's channels as input are divided among more channels, or added up for fewer, so that
      the sum over channels stays what it was. Weights whose output is the crop's channels are repeated, or averaged for
      one channel.

    Args:
        weights: state dict of ``source``.
        source: the network that the weights are of; may be on the meta device.
        target: the other network, with its initial weights.
        channels: number of the crop's channels before and after.
        fixed: names of tensors that are not learned, such as sine-cosine positions; ``target`` keeps its own.
    """
    result = target.state_dict()
    before, after = grid_tensors(source), grid_tensors(target)
    adapted, fresh = [], []
    for name, initial in target.state_dict().items():
        if name in fixed:
            continue
        given = weights.get(name)
        fitting = given
        if given is not None and name not in before:
            fitting = _fit(name, given, initial, target, channels)
        elif given is not None and before[name] != after[name]:
            fitting = before[name].resize(given, after[name])
        if fitting is None or fitting.shape != initial.shape:
            fresh.append(name)
            continue
        if fitting is not given:
            adapted.append(name)
        result[name] = fitting
    return Adaptation(result, adapted, fresh)


def _fit(name: str, given: Tensor, wanted: Tensor, target: nn.Module, channels: tuple[int, int]) -> Tensor:
    """The tensor itself if it fits; else made to fit, where it is known how."""
    if given.shape == wanted.shape:
        return given
    if given.ndim == wanted.ndim == 5:
        module = target.get_submodule(name.rpartition(".")[0])
        return _fit_kernel(given, wanted, channels, transposed=isinstance(module, nn.ConvTranspose3d))
    return _fit_outputs(given, wanted.shape[0], channels)


def _fit_kernel(given: Tensor, wanted: Tensor, channels: tuple[int, int], *, transposed: bool) -> Tensor:
    """Kernel (out, in, d, h, w) of a convolution, or (in, out, d, h, w) of a transposed one."""
    before, after = given.shape[2:], wanted.shape[2:]
    if before != after:
        growth = 1 if transposed else prod(after) / prod(before)
        given = resize(given.flatten(2), before, after).unflatten(2, after) / growth
    given = _fit_outputs(given, wanted.shape[0], channels)
    if (given.shape[1], wanted.shape[1]) == channels and channels[0] != channels[1]:
        given = torch.einsum("ji,oi...->oj...", _shares(*channels).to(given), given)
    return given


def _shares(before: int, after: int) -> Tensor:
    """What share of each channel's kernel goes to which new channel, (after, before); channels take turns."""
    turns = torch.arange(max(before, after))
    shares = torch.zeros(after, before)
    shares[turns % after, turns % before] = 1
    return shares / shares.sum(dim=0)


def _fit_outputs(given: Tensor, wanted: int, channels: tuple[int, int]) -> Tensor:
    """Turn a tensor of channels[0] outputs into one of ``wanted`` = channels[1]; others are returned as they are."""
    if (given.shape[0], wanted) != channels or channels[0] == channels[1]:
        return given
    return repeat_channels(given, wanted)
