"""The fine-tuned network: a ViT encoder and UNETR++, fused by addition at four scales (Gu et al., section II-D)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nnunet_topomae.networks.pyramid import TokenPyramid
from nnunet_topomae.networks.unetrpp import UNETRPP, stage_grids
from nnunet_topomae.networks.vit import ViTEncoder, check_taps

_DEFAULT_CHANNELS = (64, 64, 128, None)
_DEFAULT_BLOCKS = (3, 1, 1, 0)


class FusedViTUNETRPP(UNETRPP):
    """UNETR++ whose four encoder scales receive the features of a ViT, by addition.

    With the defaults at the published Synapse configuration: 85.88 M parameters (paper: 85.96 M).

    Args:
        input_channels, num_classes, deep_supervision: given by nnU-Net.
        crop_size, strides: see :class:`UNETRPP`.
        vit: keyword arguments of :class:`ViTEncoder`; ``patch_size`` is required.
        taps: blocks (0-based) whose hidden states feed scales 1 to 3; scale 4 gets the normalised output. Planners
            write those of UNETR, 3, 6 and 9 of 12. None: 4, 7 and 10 of 12, as older plans were trained.
        pyramid_channels: channels within the adapters between ViT and UNETR++, for each of the four scales; see
            :class:`ScaleAdapter`.
        pyramid_blocks: number of residual blocks of these adapters.
        fusion_gain: initial value of the learned gains on the ViT's features; at 0 the network starts as its UNETR++.
        drop_path: stochastic depth of the ViT.
        features_per_stage: channels of the four stages of UNETR++.
        unetrpp_kwargs: the other arguments of :class:`UNETRPP`.

    Raises:
        ValueError: if crop, patches and strides do not fit each other, or the taps do not fit the ViT.

    Example:
        A small one; segmentations of three classes at four resolutions, for deep supervision.

        >>> import torch
        >>> from nnunet_topomae.networks import FusedViTUNETRPP
        >>> network = FusedViTUNETRPP(
        ...     1, 3, (16, 16, 16), [[1, 1, 1]] + [[2, 2, 2]] * 4, {"patch_size": (8, 8, 8), "width": 24, "depth": 4},
        ...     features_per_stage=(8, 8, 8, 8), depths=(1, 1, 1, 1), pyramid_channels=(8, 8, 8, None),
        ... )
        >>> [tuple(output.shape) for output in network(torch.rand(2, 1, 16, 16, 16))]
        [(2, 3, 16, 16, 16), (2, 3, 8, 8, 8), (2, 3, 4, 4, 4), (2, 3, 2, 2, 2)]
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        crop_size: Sequence[int],
        strides: Sequence[Sequence[int]],
        vit: Mapping[str, Any],
        taps: Sequence[int] | None = None,
        pyramid_channels: Sequence[int | None] = _DEFAULT_CHANNELS,
        pyramid_blocks: Sequence[int] = _DEFAULT_BLOCKS,
        fusion_gain: float = 0.0,
        drop_path: float = 0.0,
        features_per_stage: Sequence[int] = (32, 64, 128, 256),
        deep_supervision: bool = True,
        **unetrpp_kwargs: Any,
    ):
        super().__init__(
            input_channels,
            num_classes,
            crop_size,
            strides,
            features_per_stage=features_per_stage,
            deep_supervision=deep_supervision,
            **unetrpp_kwargs,
        )
        self.vit = ViTEncoder(input_channels, crop_size, drop_path=drop_path, **vit)
        self.taps = check_taps(taps, len(self.vit.blocks), 3)
        if len(pyramid_channels) != 4 or len(pyramid_blocks) != 4:
            raise ValueError(
                f"pyramid_channels and pyramid_blocks need a value for each of four scales, got "
                f"{list(pyramid_channels)} and {list(pyramid_blocks)}"
            )
        self.pyramid = TokenPyramid(
            self.vit.width,
            self.vit.grid,
            stage_grids(crop_size, strides),
            features_per_stage,
            pyramid_channels,
            pyramid_blocks,
            fusion_gain,
        )

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer; see :meth:`ViTEncoder.layers`."""
        return self.vit.layers("vit")

    def encoder_parts(self) -> list[str]:
        """Those of UNETR++, and the ViT; see :func:`encoder_parameters`."""
        return [*super().encoder_parts(), "vit"]

    def forward(self, crop: Tensor) -> Tensor | list[Tensor]:
        """(B, C, D, H, W) to logits (B, K, D, H, W), or a list of four resolutions with deep supervision."""
        from_vit = self.pyramid(self.vit.taps(crop, self.taps))
        fused = [x + y for x, y in zip(self.encoder(crop), from_vit, strict=True)]
        return self.decoder(self.full_resolution_skip(crop), fused)
