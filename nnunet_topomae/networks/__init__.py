"""Networks that plans can name, and the parts that pre-training adds to them."""

from nnunet_topomae.networks.fused import FusedViTUNETRPP
from nnunet_topomae.networks.hybrid import HybridUNETR
from nnunet_topomae.networks.unetr import UNETR
from nnunet_topomae.networks.unetrpp import UNETRPP
from nnunet_topomae.networks.vit import ViTDecoder, ViTEncoder

__all__ = ["UNETR", "UNETRPP", "FusedViTUNETRPP", "HybridUNETR", "ViTDecoder", "ViTEncoder"]
