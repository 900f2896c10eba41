import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nnunet_topomae.networks import UNETRPP, FusedViTUNETRPP
from nnunet_topomae.networks.unetrpp import EfficientPairedAttention, EPABlock

TINY = {"features_per_stage": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}


TWO_RESIDUALS = {"num_residual_blocks": 2, "separate_projections": True}


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


@pytest.mark.parametrize(
    ("crop_size", "num_classes", "parameters"),
    [((16, 160, 160), 4, 66_796_404), ((32, 192, 192), 2, 121_174_798)],
)
def test_acdc_and_lung_to_the_parameter(crop_size, num_classes, parameters):
    network = _published(UNETRPP, crop_size, (1, 4, 4), num_classes, **TWO_RESIDUALS)
    assert _num_parameters(network) == parameters


def test_fused_network_at_the_synapse_configuration():
    network = _published(FusedViTUNETRPP, (64, 128, 128), (2, 4, 4), vit={"patch_size": (16, 16, 16)})
    assert round(_num_parameters(network) / 1e6, 2) == 85.88  # paper: 85.96
    assert _giga_multiply_adds(network, (64, 128, 128)) == pytest.approx(82.6, rel=0.01)  # paper: 82.49


@pytest.mark.parametrize(("stem", "millions"), [((4, 4, 4), 72.95), ((2, 4, 4), 82.32)])
def test_the_papers_crop_does_not_give_the_papers_size(stem, millions):
    """Section III-B has 96^3, Table I 85.96 M parameters; see docs/datasets.md."""
    network = _published(FusedViTUNETRPP, (96, 96, 96), stem, vit={"patch_size": (16, 16, 16)})
    assert round(_num_parameters(network) / 1e6, 2) == millions


@pytest.mark.parametrize("separate", [False, True])
def test_paired_attention_by_the_definition(separate):
    """Against the definition, head by head and in its own order of operations (Shaker et al., section 3.2)."""
    n, c, heads, p = 10, 12, 3, 4
    attention = EfficientPairedAttention(n, c, p, heads, separate_projections=separate).eval().double()
    with torch.no_grad():
        attention.channel_temperature.uniform_(0.5, 2)
        attention.spatial_temperature.uniform_(0.5, 2)
    x = torch.rand(2, n, c, dtype=torch.float64)
    q, k, v_channel, v_spatial = (x @ attention.qkvv.weight.T).chunk(4, dim=-1)
    e = attention.project
    f = attention.project_values if separate else e
    spatial, channel = [], []
    for h in range(heads):
        part = slice(h * c // heads, (h + 1) * c // heads)
        qh, kh = q[..., part], k[..., part]
        projected_k, projected_v = (
            projection.weight @ t + projection.bias[:, None] for projection, t in ((e, kh), (f, v_spatial[..., part]))
        )
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


def test_a_second_residual_block_comes_after_the_first():
    block = EPABlock((2, 3, 4), 8, 4, 2, num_residual_blocks=2).eval()
    x = torch.rand(1, 8, 2, 3, 4)
    tokens = x.flatten(2).transpose(1, 2)
    attended = (tokens + block.gamma * block.attention(block.norm(tokens))).transpose(1, 2).reshape(x.shape)
    expected = attended + block.output(block.more_residuals[0](block.residual(attended)))
    torch.testing.assert_close(block(x), expected)


def test_a_text_is_no_switch():
    with pytest.raises(ValueError, match="separate_projections must be true or false, got 'no'"):
        EPABlock((2, 3, 4), 8, 4, 2, separate_projections="no")


def test_without_a_residual_block_an_epa_block_is_refused():
    with pytest.raises(ValueError, match="num_residual_blocks must be at least 1, got 0"):
        EPABlock((2, 3, 4), 8, 4, 2, num_residual_blocks=0)


def test_weights_of_older_networks_fit():
    names = set(EPABlock((2, 3, 4), 8, 4, 2).state_dict())
    assert {name.split(".")[0] for name in names} == {"pos_embed", "gamma", "norm", "attention", "residual", "output"}
    assert not any("project_values" in name for name in names)


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
