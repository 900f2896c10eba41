"""The examples in docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import nnunet_topomae

ROOMS = ("methods", "networks", "reporting", "settings", "studies", "topology")  # what users import
WITH_EXAMPLES = (
    "methods.crops.random_crop",
    "methods.losses.masked_mse",
    "methods.masking.mask_to_voxels",
    "methods.masking.random_patch_mask",
    "methods.topomae.keypoints.crop_keypoints",
    "networks.fused.FusedViTUNETRPP",
    "networks.unetr.UNETR",
    "networks.unetrpp.UNETRPP",
    "networks.vit.ViTDecoder",
    "networks.vit.ViTEncoder",
    "settings.schema.read_block",
    "studies.measures.betti_numbers",
    "studies.measures.measure",
    "studies.statistics.holm",
    "topology.loss.TopologicalLoss",
    "topology.persistence.persistence_diagrams",
    "topology.wasserstein.wasserstein_distance",
)
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(nnunet_topomae.__path__, "nnunet_topomae.")
    if name.split(".")[1] in ROOMS
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_right(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_there_is_an_example(name):
    module, _, attribute = f"nnunet_topomae.{name}".rpartition(".")
    documented = getattr(importlib.import_module(module), attribute)
    assert doctest.DocTestFinder(recurse=False).find(documented)[0].examples
