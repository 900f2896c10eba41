import pytest
import torch

from nnunet_topomae.methods.masking import mask_to_voxels
from nnunet_topomae.networks import UNETR, FusedViTUNETRPP, ViTDecoder, ViTEncoder
from nnunet_topomae.networks.vit import sincos_positions, visible_indices


def _encoder(**kwargs):
    defaults = {"crop_size": (8, 8, 16), "patch_size": (4, 4, 4), "width": 24, "depth": 4, "num_heads": 2}
    return ViTEncoder(1, **{**defaults, **kwargs})


def test_visible_patches_in_raster_order():
    mask = torch.tensor([[[[True, False], [False, True]]], [[[False, False], [True, True]]]])
    assert visible_indices(mask, 2).tolist() == [[1, 2], [0, 1]]


def test_encoder_sees_visible_patches_only():
    encoder = _encoder()
    mask = torch.zeros(1, *encoder.grid, dtype=torch.bool)
    mask[0, 0] = True
    crop = torch.rand(1, 1, 8, 8, 16, requires_grad=True)
    tokens = encoder(crop, visible_indices(mask, 8))
    assert tokens.shape == (1, 8, 24)
    tokens.square().sum().backward()
    hidden = mask_to_voxels(mask, encoder.patch_size)
    assert crop.grad[hidden].abs().max() == 0
    assert crop.grad[~hidden].abs().min() > 0


def test_nothing_hidden_is_the_plain_encoder():
    encoder = _encoder().eval()
    crop = torch.rand(2, 1, 8, 8, 16)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(encoder(crop), encoder(crop, everything))


def test_taps_end_with_the_normalised_output():
    encoder = _encoder().eval()
    crop = torch.rand(2, 1, 8, 8, 16)
    taps = encoder.taps(crop, (0, 2))
    assert [tuple(t.shape) for t in taps] == [(2, 24, 2, 2, 4)] * 3
    torch.testing.assert_close(taps[-1].flatten(2).transpose(1, 2), encoder(crop))


def test_unpatchify_inverts_cutting_into_patches():
    decoder = ViTDecoder(_encoder(), output_channels=2, width=12, depth=1, num_heads=2)
    crop = torch.rand(1, 2, 8, 8, 16)
    patches = crop.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4)  # (B, C, d, h, w, p, q, r)
    tokens = patches.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(1, 16, 2 * 64)
    assert torch.equal(decoder.unpatchify(tokens), crop)


def test_decoder_reconstructs_every_voxel():
    encoder = _encoder()
    decoder = ViTDecoder(encoder, output_channels=1, width=12, depth=1, num_heads=2)
    visible = torch.arange(0, 16, 2).expand(2, -1)
    assert decoder(encoder(torch.rand(2, 1, 8, 8, 16), visible), visible).shape == (2, 1, 8, 8, 16)


def test_positions_by_hand():
    positions = sincos_positions((1, 2, 3), 14)[0]  # 4 channels an axis, frequencies 1 and 1/100; 2 channels are left
    assert positions.shape == (6, 14)
    angle = torch.tensor([0.0, 1.0, 2.0])
    for column, expected in ((8, angle.sin()), (9, (angle / 100).sin()), (10, angle.cos()), (11, (angle / 100).cos())):
        torch.testing.assert_close(positions[:3, column], expected)
    assert positions[:, 12:].abs().max() == 0
    torch.testing.assert_close(positions[3:, 4], torch.full((3,), 1.0).sin())


def test_positions_of_another_temperature_and_scale_by_hand():
    positions = sincos_positions((1, 2, 3), 14, temperature=4.0, scale=3.0)[0]  # frequencies 1 and 1/2
    angle = torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(positions[:3, 9], 3 * (angle / 2).sin())
    torch.testing.assert_close(positions[:3, 10], 3 * angle.cos())


@pytest.mark.parametrize(("local_start", "kind"), [(False, (10000.0, 1.0)), (True, (6.0, 4.0))])
def test_encoder_and_decoder_have_the_same_kind_of_positions(local_start, kind):
    encoder = _encoder(local_start=local_start)
    decoder = ViTDecoder(encoder, 1, width=12, depth=1, num_heads=2)
    for part, width in ((encoder, encoder.width), (decoder, 12)):
        torch.testing.assert_close(part.pos_embed.data, sincos_positions(encoder.grid, width, *kind))


@pytest.mark.parametrize("local_start", [False, True])
@pytest.mark.parametrize("network_class", [FusedViTUNETRPP, UNETR])
def test_initial_weights_of_networks_and_decoders_are_xavier_uniform(network_class, local_start):
    """The bound of Xavier's uniform distribution is sqrt(6 / (inputs + outputs)) (Glorot and Bengio, equation 16)."""
    vit = {"patch_size": (8, 8, 8), "width": 64, "depth": 4, "num_heads": 2, "local_start": local_start}
    network = network_class(
        1, 2, (16, 16, 16), [[1] * 3, *[[2] * 3] * (4 if network_class is FusedViTUNETRPP else 3)], vit
    )
    network.apply(network.initialize)  # as nnU-Net does
    decoder = ViTDecoder(network.vit, 1, width=64, depth=1, num_heads=2)
    matrices = {"patches": network.vit.patch_embed.weight, "voxels": decoder.to_voxels.weight}
    for part in (network.vit, decoder):
        query, key, value = part.blocks[0].attn.qkv.weight.chunk(3)
        assert torch.equal(query, key) == local_start
        assert not torch.equal(query, value)
        matrices |= {f"{type(part).__name__} {n}": m for n, m in (("query", query), ("key", key), ("value", value))}
        matrices[f"{type(part).__name__} mlp"] = part.blocks[0].mlp.fc1.weight
        assert all(not bias.any() for name, bias in part.named_parameters() if name.endswith("bias"))
    for name, matrix in matrices.items():
        bound = (6 / (matrix[0].numel() + len(matrix))) ** 0.5
        assert 0.98 * bound < matrix.abs().max() <= bound, name


def test_every_norm_has_the_epsilon_of_vit():
    encoder = _encoder()
    norms = [m for part in (encoder, ViTDecoder(encoder, 1, 12, 1, 2)) for m in part.modules() if hasattr(m, "eps")]
    assert len(norms) == 2 * 5 + 2
    assert {norm.eps for norm in norms} == {1e-6}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"crop_size": (8, 8, 15)}, "crop size (8, 8, 15) is not divisible by ViT patch size (4, 4, 4)"),
        ({"width": 25}, "ViT width 25 is not divisible by 2 heads"),
        ({"local_start": "no"}, "local_start must be true or false, got 'no'"),
        ({"local_start": 1}, "local_start must be true or false, got 1"),
    ],
)
def test_ill_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        _encoder(**kwargs)
