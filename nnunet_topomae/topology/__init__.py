"""Persistence diagrams of volumes, the Wasserstein distance between them, and a loss made of both; differentiable."""

from nnunet_topomae.topology.loss import TopologicalLoss
from nnunet_topomae.topology.persistence import persistence_diagrams
from nnunet_topomae.topology.wasserstein import wasserstein_distance

__all__ = ["TopologicalLoss", "persistence_diagrams", "wasserstein_distance"]
