import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nnunet_topomae.networks import UNETRPP, FusedViTUNETRPP
from nnunet_topomae.networks.unetrpp import EfficientPairedAttention, EPABlock

TINY = {"features_per_stage": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}


def _published(network_class, crop_size, stem, num_classes=14, **kwargs):
    with torch.device("meta"):
        strides = [[1, 1, 1], stem, [2, 2, 2], [2, 2, 2], [2, 2, 2]]
        return network_class(1, num_classes, crop_size, strides, deep_supervision=False, **kwargs).eval()


def _num_parameters(network):
    return sum(p.numel() for p in network.parameters())


def _giga_multiply_adds(network, crop_size):
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 1, *crop_size, device="meta"))
    return counter.get_total_flops() / 2e9  # two operations each


@pytest.mark.parametrize(
    ("crop_size", "stem", "num_classes", "millions", "giga"),
    [
        ((64, 128, 128), (2, 4, 4), 14, 42.953, 47.886),
        ((96, 96, 96), (4, 4, 4), 14, 29.867, 30.054),
        ((96, 96, 96), (2, 4, 4), 14, 39.411, 40.404),
        ((16, 160, 160), (1, 4, 4), 4, 37.985, 28.212),
        ((32, 192, 192), (1, 4, 4), 2, 71.274, 81.208),
    ],
)
def test_published_configurations(crop_size, stem, num_classes, millions, giga):
    network = _published(UNETRPP, crop_size, stem, num_classes)
    assert _num_parameters(network) / 1e6 == pytest.approx(millions, abs=5e-4)
    assert _giga_multiply_adds(network, crop_size) == pytest.approx(giga, rel=0.015)  # norms are not counted here


def test_synapse_configuration_to_the_parameter():
    network = _published(UNETRPP, (64, 128, 128), (2, 4, 4))
    assert _num_parameters(network) == 42_952_850
    assert _giga_multiply_adds(network, (64, 128, 128)) == pytest.approx(47.9, rel=0.01)


def test_fused_network_at_the_synapse_configuration():
    network = _published(FusedViTUNETRPP, (64, 128, 128), (2, 4, 4), vit={"patch_size": (16, 16, 16)})
    assert round(_num_parameters(network) / 1e6, 2) == 85.88  # paper: 85.96
    assert _giga_multiply_adds(network, (64, 128, 128)) == pytest.approx(82.6, rel=0.01)  # paper: 82.49


def test_paired_attention_by_the_definition():
    """Against the definition, head by head and in its own order of operations (Shaker et al., section 3.2)."""
    n, c, heads, p = 10, 12, 3, 4
    attention = EfficientPairedAttention(n, c, p, heads).eval().double()
    with torch.no_grad():
        attention.channel_temperature.uniform_(0.5, 2)
        attention.spatial_temperature.uniform_(0.5, 2)
    x = torch.rand(2, n, c, dtype=torch.float64)
    q, k, v_channel, v_spatial = (x @ attention.qkvv.weight.T).chunk(4, dim=-1)
    e, bias = attention.project.weight, attention.project.bias
    spatial, channel = [], []
    for h in range(heads):
        part = slice(h * c // heads, (h + 1) * c // heads)
        qh, kh = q[..., part], k[..., part]
        projected_k, projected_v = (e @ t + bias[:, None] for t in (kh, v_spatial[..., part]))
        qn, kn = qh / qh.norm(dim=1, keepdim=True), kh / kh.norm(dim=1, keepdim=True)  # along the tokens
        channel_map = (qn.transpose(1, 2) @ kn * attention.channel_temperature[h]).softmax(-1)
        channel.append(v_channel[..., part] @ channel_map.transpose(1, 2))
        spatial_map = (qn @ projected_k.transpose(1, 2) * attention.spatial_temperature[h]).softmax(-1)
        spatial.append(spatial_map @ projected_v)
    expected = torch.cat(
        [attention.spatial_out(torch.cat(spatial, -1)), attention.channel_out(torch.cat(channel, -1))], dim=-1
    )
    torch.testing.assert_close(attention(x), expected)


def test_block_starts_near_the_identity_of_its_attention():
    block = EPABlock((2, 3, 4), 8, 4, 2)
    assert torch.equal(block.gamma, torch.full((8,), 1e-6))
    assert block.pos_embed.abs().max() == 0


@pytest.mark.parametrize(
    ("crop_size", "strides"),
    [
        ((16, 16, 32), [[1] * 3, [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 2]]),
        ((4, 32, 32), [[1] * 3, [1, 4, 4], [1, 2, 2], [2, 2, 2], [1, 1, 1]]),  # thin
        ((12, 24, 18), [[1] * 3, [1, 3, 1], [2, 2, 3], [2, 2, 1], [1, 1, 2]]),  # any stride
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_outputs_fit_nnunets_deep_supervision(crop_size, strides, channels):
    network = UNETRPP(channels, 5, crop_size, strides, **TINY)
    outputs = network(torch.rand(2, channels, *crop_size))
    scales = (1 / np.cumprod(np.vstack(strides), axis=0))[:-1]  # nnU-Net's
    expected = [(2, 5, *(round(size * s) for size, s in zip(crop_size, scale, strict=True))) for scale in scales]
    assert [tuple(o.shape) for o in outputs] == expected
    network.decoder.deep_supervision = False
    assert network(torch.rand(2, channels, *crop_size)).shape == (2, 5, *crop_size)


def test_initial_logits_are_of_order_one():
    network = UNETRPP(1, 2, (32, 32, 32), [[1] * 3, [2] * 3, [2] * 3, [2] * 3, [2] * 3])
    network.apply(network.initialize)
    network.decoder.deep_supervision = False
    assert network(torch.rand(2, 1, 32, 32, 32)).std() < 5


@pytest.mark.parametrize(
    ("crop_size", "strides", "message"),
    [
        ((16, 16, 20), [[1] * 3, [2] * 3, [2] * 3, [2] * 3, [1] * 3], "(16, 16, 20) is not divisible by cumulative"),
        ((16, 16, 16), [[2] * 3, [2] * 3, [2] * 3, [2] * 3, [1] * 3], "five strides of which the first is 1"),
        ((16, 16, 16), [[1] * 3, [2] * 3, [2] * 3, [2] * 3], "five strides of which the first is 1"),
        ((16, 16), [[1] * 2, [2] * 2, [2] * 2, [2] * 2, [1] * 2], "must have three axes"),
    ],
)
def test_ill_sizes(crop_size, strides, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        UNETRPP(1, 2, crop_size, strides, **TINY)
