import pytest
import torch

from nnunet_topomae.networks import UNETR
from tiny import TINY_CROP, TINY_UNETR, make_network


def test_has_the_published_number_of_parameters():
    vit = {"patch_size": [16, 16, 16], "width": 768, "depth": 12, "num_heads": 12}
    with torch.device("meta"):
        network = UNETR(1, 14, [96, 96, 96], [[1, 1, 1], *[[2, 2, 2]] * 4], vit)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(92.49e6, rel=0.005)


def test_outputs_of_all_scales():
    network = make_network("unetr", channels=2, classes=5, deep_supervision=True)
    outputs = network(torch.rand(1, 2, *TINY_CROP))
    assert [tuple(o.shape) for o in outputs] == [(1, 5, 16, 16, 32), (1, 5, 16, 16, 16), (1, 5, 8, 8, 8)]
    network.decoder.deep_supervision = False
    assert network(torch.rand(1, 2, *TINY_CROP)).shape == (1, 5, *TINY_CROP)


def test_every_parameter_takes_part():
    network = make_network("unetr", classes=2, deep_supervision=True)
    sum(o.square().mean() for o in network(torch.rand(1, 1, *TINY_CROP))).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}, "multiply to the ViT patch size"),
        ({"strides": [[2, 1, 1], [2, 2, 2], [2, 2, 4]]}, "must start with 1"),
        ({"taps": [0]}, "taps must be 2 increasing blocks of a ViT of depth 4"),
        ({"taps": [2, 1]}, "taps must be 2 increasing"),
        ({"taps": [1, 4]}, "taps must be 2 increasing"),
        (
            {"strides": [[1, 1, 1], [2, 2, 2]], "vit": {**TINY_UNETR["vit"], "patch_size": [2, 2, 2]}},
            "patches of at least 4 voxels",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNETR(1, 2, **{**TINY_UNETR, **changes})
