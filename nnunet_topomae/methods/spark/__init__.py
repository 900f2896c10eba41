"""SparK and AnatoMask: masked reconstruction by nnU-Net's own convolutional networks (Tian et al.; Li et al.)."""

from nnunet_topomae.methods.spark.settings import AnatoMaskConfig, SparKConfig
from nnunet_topomae.methods.spark.task import AnatoMask, SparK

__all__ = ["AnatoMask", "AnatoMaskConfig", "SparK", "SparKConfig"]
