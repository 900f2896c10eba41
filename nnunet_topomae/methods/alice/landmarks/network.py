"""The network: a residual encoder and a feature pyramid, which give every voxel two vectors of length 1."""

import torch.nn.functional as F
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import Tensor, nn

DIMENSIONS = 128  # of a vector; SAM
STRIDE = 2  # voxels per axis between the vectors of the fine map
COARSE_STRIDE = 8
_FEATURES = (32, 64, 128)  # ResNet-18's two blocks a stage, with half its features and one stage less
_PYRAMID = 64


class LandmarkNetwork(nn.Module):
    """Fine vectors tell neighbours apart, coarse ones where in the body they lie (Yan et al., section III-B).

    Args:
        input_channels: of the images.
    """

    def __init__(self, input_channels: int):
        super().__init__()
        self.encoder = ResidualEncoder(
            input_channels,
            n_stages=len(_FEATURES),
            features_per_stage=_FEATURES,
            conv_op=nn.Conv3d,
            kernel_sizes=3,
            strides=STRIDE,
            n_blocks_per_stage=2,
            norm_op=nn.BatchNorm3d,  # whole images are embedded by the statistics of the views
            nonlin=nn.ReLU,
            nonlin_kwargs={"inplace": True},
            return_skips=True,
        )
        self.laterals = nn.ModuleList(nn.Conv3d(features, _PYRAMID, 1) for features in _FEATURES)
        self.fine = nn.Conv3d(_PYRAMID, DIMENSIONS, 1)
        self.coarse = nn.Conv3d(_FEATURES[-1], DIMENSIONS, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images.

        Args:
            image: (B, C, D, H, W), with D, H and W divisible by 8.

        Returns:
            Vectors of length 1 at every second voxel, (B, 128, D/2, H/2, W/2), and at every eighth, (B, 128, D/8, ...).
        """
        maps = self.encoder(image)
        merged = self.laterals[-1](maps[-1])
        for lateral, finer in zip(reversed(self.laterals[:-1]), reversed(maps[:-1]), strict=True):
            merged = lateral(finer) + F.interpolate(merged, size=finer.shape[2:], mode="trilinear")
        return F.normalize(self.fine(merged), dim=1), F.normalize(self.coarse(maps[-1]), dim=1)
