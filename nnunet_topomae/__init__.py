"""Self pre-training with topology- and spatiality-aware masked autoencoders, as an extension of nnU-Net v2.

Everything below this package except :mod:`nnunet_topomae.nnunet`, :mod:`nnunet_topomae.demo` and
:mod:`nnunet_topomae.cli` works without nnU-Net: networks, pretext tasks and the topological loss can be used alone.
"""

__version__ = "0.2.0"
