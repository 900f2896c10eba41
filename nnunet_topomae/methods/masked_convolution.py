"""Convolutional encoders that see visible patches only: SparK's sparse convolution, done densely (Tian et al., 3.1).

Hidden voxels are set to 0, and set to 0 again after every convolution and pooling, at every resolution; norms take
their statistics over visible voxels only. Forward hooks do this; the encoder itself is not changed, and while no mask
is set the hooks do nothing. This saves neither time nor memory.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from nnunet_topomae.methods.masking import mask_to_voxels
from nnunet_topomae.networks.geometry import Size, size_of

_LARGEST_PATCH = 16
_ZEROED = (nn.Conv3d, nn.AvgPool3d, nn.MaxPool3d)
_KEEP_ZERO = (nn.LeakyReLU, nn.ReLU, nn.ReLU6, nn.ELU, nn.GELU, nn.SiLU, nn.Identity, nn.Dropout, nn.Dropout3d)


class HiddenPatches:
    """The mask that the hooks of an encoder apply.

    Attributes:
        mask: (B, d, h, w) bool of patches, True = hidden; None to leave the encoder alone.
    """

    def __init__(self):
        self.mask: Tensor | None = None

    def visible_at(self, features: Tensor) -> Tensor | None:
        """Visible voxels of a feature map, (B, 1, D, H, W) bool.

        None if all are, as at resolutions coarser than the patches.
        """
        if self.mask is None:
            return None
        grid, shape = self.mask.shape[1:], features.shape[2:]
        if any(size < patches for size, patches in zip(shape, grid, strict=True)):
            return None
        return ~mask_to_voxels(self.mask, [size // patches for size, patches in zip(shape, grid, strict=True)])

    def zero_hidden(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Set hidden voxels to 0: the forward hook of convolutions and pooling."""
        visible = self.visible_at(output)
        return output if visible is None else output * visible

    def normalise_visible(self, module: nn.InstanceNorm3d, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Take statistics over visible voxels only: the forward hook of instance norms."""
        visible = self.visible_at(output)
        return output if visible is None else masked_instance_norm(inputs[0], visible, module)


def hide_in(encoder: nn.Module) -> HiddenPatches:
    """Make an encoder hide patches.

    Args:
        encoder: of 3D convolutions, pooling, instance norms and activations that map 0 to 0.

    Returns:
        The object whose ``mask`` says what is hidden.

    Raises:
        ValueError: for a layer of another kind, from which patches cannot be hidden.
    """
    hidden = HiddenPatches()
    for name, module in encoder.named_modules():
        if isinstance(module, _ZEROED):
            module.register_forward_hook(hidden.zero_hidden)
        elif isinstance(module, nn.InstanceNorm3d):
            module.register_forward_hook(hidden.normalise_visible)
        elif not any(module.children()) and not isinstance(module, _KEEP_ZERO):
            raise ValueError(
                f"encoder.{name} is a {type(module).__name__}, from which patches cannot be hidden; use a network with "
                f"instance norms and activations that keep 0, such as LeakyReLU, as nnU-Net plans it"
            )
    return hidden


def masked_instance_norm(features: Tensor, visible: Tensor, norm: nn.InstanceNorm3d) -> Tensor:
    """Instance norm by the statistics of visible voxels, per sample and channel; 0 where hidden.

    Args:
        features: (B, C, D, H, W).
        visible: (B, 1, D, H, W) bool.
        norm: the layer whose weight, bias and epsilon are used.
    """
    values = features.float()
    count = visible.sum(dim=(2, 3, 4), keepdim=True)
    mean = (values * visible).sum(dim=(2, 3, 4), keepdim=True) / count
    centred = (values - mean) * visible
    variance = centred.square().sum(dim=(2, 3, 4), keepdim=True) / count
    normalised = centred * torch.rsqrt(variance + norm.eps)
    if norm.affine:
        normalised = normalised * norm.weight[:, None, None, None] + norm.bias[:, None, None, None] * visible
    return normalised.to(features.dtype)


def choose_patch_size(strides: Sequence[Sequence[int]]) -> Size:
    """The cumulative stride of the coarsest stage at which no axis exceeds 16.

    A voxel of a coarser stage covers several whole patches, so nothing is hidden from these stages.
    """
    cumulative = accumulate(strides, lambda a, b: [i * j for i, j in zip(a, b, strict=True)])
    return size_of(next(stride for stride in reversed(list(cumulative)) if max(stride) <= _LARGEST_PATCH))
