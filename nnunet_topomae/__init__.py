"""Self-supervised pre-training of 3D segmentation networks, as an extension of nnU-Net v2.

Networks, pre-training methods, the topological loss, settings and reports work without nnU-Net. Only
:mod:`nnunet_topomae.nnunet`, the trainers, the planners and :mod:`nnunet_topomae.commands` need it.
"""

__version__ = "0.2.0"
