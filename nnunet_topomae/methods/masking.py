"""Which patches of a crop are hidden.

A mask is boolean and True means *hidden from the network and to be reconstructed* (He et al., MAE), everywhere in
this package.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def num_hidden_patches(num_patches: int, ratio: float) -> int:
    """Number of hidden patches: ``ratio * num_patches``, rounded, at least 1 and at least 1 left visible.

    Raises:
        ValueError: if ``ratio`` is not inside (0, 1) or there are fewer than two patches.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio must lie inside (0, 1), got {ratio}")
    if num_patches < 2:
        raise ValueError(f"a mask needs at least 2 patches, got {num_patches}")
    return min(max(round(ratio * num_patches), 1), num_patches - 1)


def random_patch_mask(grid: Sequence[int], ratio: float, generator: torch.Generator) -> Tensor:
    """Hide a uniformly random set of patches of exactly the asked size (Gu et al., section I: "e.g., 50%").

    Args:
        grid: number of patches per axis, (d, h, w).
        ratio: share of hidden patches, inside (0, 1).
        generator: source of randomness, on the CPU; the same state gives the same mask on every machine.

    Returns:
        (d, h, w) bool, True = hidden.

    Raises:
        ValueError: see :func:`num_hidden_patches`.

    Example:
        >>> import torch
        >>> from nnunet_topomae.methods.masking import random_patch_mask
        >>> mask = random_patch_mask((2, 2, 4), 0.75, torch.Generator().manual_seed(0))
        >>> mask.shape, int(mask.sum())
        (torch.Size([2, 2, 4]), 12)
    """
    num_patches = int(torch.tensor(tuple(grid)).prod())
    hidden = torch.randperm(num_patches, generator=generator)[: num_hidden_patches(num_patches, ratio)]
    mask = torch.zeros(num_patches, dtype=torch.bool)
    mask[hidden] = True
    return mask.reshape(tuple(grid))


def mask_to_voxels(mask: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Repeat a mask of patches, or other values of patches, at all voxels of each patch.

    Args:
        mask: (B, d, h, w).
        patch_size: voxels of a patch per axis.

    Returns:
        (B, 1, D, H, W) of the same type with D = d * patch_size[0] and so on.

    Example:
        >>> import torch
        >>> from nnunet_topomae.methods.masking import mask_to_voxels
        >>> mask_to_voxels(torch.tensor([[[[True, False]]]]), (1, 1, 3)).tolist()
        [[[[[True, True, True, False, False, False]]]]]
    """
    for axis, size in enumerate(patch_size, start=1):
        mask = mask.repeat_interleave(size, dim=axis)
    return mask[:, None]


def hardest_patches_mask(errors: Tensor, num_hidden: int, num_hardest: int, order: Tensor) -> Tensor:
    """Hide the patches with the largest errors, and random others (AnatoMask, section 3.3).

    Args:
        errors: (B, d, h, w), how hard each patch is; at least 0.
        num_hidden: patches to hide in each sample.
        num_hardest: how many of them are chosen by their error.
        order: (B, d, h, w) random numbers in [0, 1); the others are those with the largest.

    Returns:
        (B, d, h, w) bool, True = hidden.
    """
    flat = errors.flatten(1)
    hardest = flat.topk(num_hardest, dim=1).indices
    keys = order.flatten(1).scatter(1, hardest, 2.0)
    chosen = keys.topk(num_hidden, dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, True).reshape(errors.shape)
