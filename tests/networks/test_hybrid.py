import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_topomae.methods.autoencoders import autoencoder_of
from nnunet_topomae.networks import HybridUNETR
from nnunet_topomae.networks.hybrid import ConvolutionalBlock, HybridEncoder, VisiblePatches
from nnunet_topomae.networks.vit import visible_indices
from tiny import TINY_CROP, TINY_HYBRID, make_method, make_network

GRID = (4, 4, 4)
FULL_STRIDES = [[1, 1, 1], *[[2, 2, 2]] * 5]


def make_encoder() -> HybridEncoder:
    return make_network("hybrid").encoder.eval()


def make_visible(batch_size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (B, d, h, w) and the indices of the 26 patches of 64 that are visible."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(batch_size, 64, generator=generator).argsort(dim=1) >= 26
    return mask.reshape(batch_size, *GRID), visible_indices(mask.reshape(batch_size, *GRID), 26)


def test_published_size():
    """Widths and depths of MiM at its crop; parameters were counted by hand from the layers (docs/methods/mim.md)."""
    with torch.device("meta"):
        network = HybridUNETR(1, 14, (96, 96, 96), FULL_STRIDES, {}, deep_supervision=False)
    encoder = network.encoder

    def block(width):
        return 2 * 2 * width + 2 * (width**2 + width) + (125 * width + width) + (8 * width**2 + 5 * width)

    def embedding(before, width):
        return 8 * before * width + width + 2 * width

    attention = 11 * (12 * 384**2 + 9 * 384 + 4 * 384)
    expected = 2 * (block(48) + block(96) + block(192)) + attention
    expected += embedding(1, 48) + embedding(48, 96) + embedding(96, 192) + embedding(192, 384)
    expected += 384**2 + 384 + 216 * 384  # projection and positions
    assert sum(p.numel() for p in encoder.parameters()) == expected == 21_586_320
    assert encoder.grid == (6, 6, 6)


def test_hidden_patches_cost_little():
    """With 60 % of the patches hidden, 86 of 216 are computed, and the depthwise convolutions of all."""
    with torch.device("meta"), torch.no_grad():
        encoder = HybridEncoder(1, (96, 96, 96), FULL_STRIDES[1:5])
        crop, visible = torch.empty(1, 1, 96, 96, 96), torch.empty(1, 86, dtype=torch.int64)
        operations = []
        for shown in (None, visible):
            with FlopCounterMode(display=False) as counter:
                encoder(crop, shown)
            operations.append(counter.get_total_flops())
    whole, visible_only = operations
    assert 86 / 216 < visible_only / whole < 0.5


def _reference(encoder: HybridEncoder, crop: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """ConvMAE to the letter: everything at all patches, set to 0 at hidden ones before each depthwise convolution."""

    def at(shape):
        visible = ~mask
        for axis, size in enumerate(shape, start=1):
            visible = visible.repeat_interleave(size // visible.shape[axis], axis)
        return visible[..., None]

    x, features = crop.movedim(1, -1), []
    for embedding, stage in zip(encoder.embeddings, encoder.stages, strict=False):
        x = embedding(x)
        for block in stage:
            y = block.project_in(block.norm1(x)) * at(x.shape[1:4])
            y = block.depthwise(y.movedim(-1, 1)).movedim(1, -1)
            x = x + block.project_out(y)
            x = x + block.mlp(block.norm2(x))
        features.append(x)
    tokens = encoder.projection(encoder.embeddings[-1](x).flatten(1, 3)) + encoder.pos_embed
    for sample in range(len(crop)):
        shown = (~mask[sample]).flatten()
        own = tokens[sample, shown][None]
        for block in encoder.blocks:
            own = block(own)
        features.append(own[0])
    return features


def test_what_comes_out_at_visible_patches_is_that_of_convmae():
    encoder = make_encoder()
    crop, (mask, visible) = torch.rand(2, 1, *TINY_CROP), make_visible()
    with torch.no_grad():
        *stages, tokens = encoder(crop, visible)
        *expected, first, second = _reference(encoder, crop, mask)
    patches = VisiblePatches(visible, GRID)
    for stage, whole in zip(stages, expected, strict=True):
        torch.testing.assert_close(stage.movedim(1, -1), patches.gather(whole))
    torch.testing.assert_close(tokens.flatten(1), torch.cat([first, second]))


def test_hidden_patches_change_nothing():
    encoder = make_encoder()
    crop, (mask, visible) = torch.rand(2, 1, *TINY_CROP), make_visible()
    hidden = mask
    for axis, size in enumerate(encoder.patch_size, start=1):
        hidden = hidden.repeat_interleave(size, axis)
    changed = torch.where(hidden[:, None], torch.rand_like(crop), crop)
    with torch.no_grad():
        for before, after in zip(encoder(crop, visible), encoder(changed, visible), strict=True):
            assert torch.equal(before, after)


def test_showing_every_patch_is_showing_the_crop():
    encoder = make_encoder()
    crop, every = torch.rand(2, 1, *TINY_CROP), torch.arange(64).expand(2, -1)
    patches = VisiblePatches(every, GRID)
    with torch.no_grad():
        for stack, whole in zip(encoder(crop, every), encoder(crop), strict=True):
            torch.testing.assert_close(patches.scatter(stack.movedim(1, -1)).movedim(-1, 1), whole)


def test_visible_patches_lie_where_they_were():
    _, visible = make_visible()
    patches, maps = VisiblePatches(visible, GRID), torch.rand(2, 8, 4, 12, 3)
    back = patches.scatter(patches.gather(maps))
    shown = back != 0
    assert torch.equal(back[shown], maps[shown])
    assert shown[..., 0].sum() == 2 * 26 * (2 * 1 * 3)


def test_a_depthwise_convolution_reaches_the_patch_beside_it_and_no_further():
    block = ConvolutionalBlock(2)
    x = torch.zeros(1, 12, 12, 12, 2)
    changed = x.clone()
    changed[0, 6, 6, 6] = torch.tensor([1.0, -1.0])
    reached = (block(changed, None) != block(x, None)).any(dim=-1)[0].nonzero()
    assert reached.min(dim=0).values.tolist() == [4, 4, 4]
    assert reached.max(dim=0).values.tolist() == [8, 8, 8]


def test_outputs_of_all_resolutions():
    network = make_network("hybrid", classes=3, deep_supervision=True)
    outputs = network(torch.rand(1, 1, *TINY_CROP))
    assert [tuple(output.shape) for output in outputs] == [
        (1, 3, 16, 16, 32), (1, 3, 16, 8, 16), (1, 3, 8, 4, 8), (1, 3, 4, 4, 4), (1, 3, 4, 4, 4),
    ]  # fmt: skip
    network.decoder.deep_supervision = False
    assert torch.equal(network(torch.rand(1, 1, *TINY_CROP)).isfinite().all(), torch.tensor(True))


def test_arguments_come_from_plans():
    network = HybridUNETR(2, 3, **json.loads(json.dumps(TINY_HYBRID)), drop_path=0.2)
    assert network.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert isinstance(network.encoder.stages[0][0].drop_path, nn.Identity)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_size": [16, 16, 20]}, "is not divisible by the product of the strides"),
        ({"strides": FULL_STRIDES[1:]}, "strides must be six, of which the first is 1"),
        ({"strides": [*FULL_STRIDES[:5]]}, "strides must be six"),
        ({"encoder": {"widths": [8, 8, 16], "depths": [1] * 4}}, "four stages, got 4 strides, 3 widths and 4 depths"),
        (
            {"encoder": {"widths": [8, 8, 16, 25], "depths": [1] * 4, "num_heads": 2}},
            "width 25 of the last stage",
        ),
        ({"encoder": {"local_start": "no"}}, "local_start must be true or false"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HybridUNETR(1, 2, **{**TINY_HYBRID, **changes})


def test_the_decoder_of_pre_training_has_the_published_size():
    with torch.device("meta"):
        autoencoder = autoencoder_of(HybridUNETR(1, 1, (96, 96, 96), FULL_STRIDES, {}, deep_supervision=False), 512)
    decoder = autoencoder.decoder
    assert (decoder.embed.out_features, len(decoder.blocks), decoder.blocks[0].attn.num_heads) == (576, 8, 16)
    assert decoder.to_voxels.out_features == 4096
    assert [projection.stride for projection in autoencoder.tokens.projections] == [(8,) * 3, (4,) * 3, (2,) * 3]


def test_tokens_of_pre_training_hold_all_stages():
    task = make_method("MiM of the hybrid network").eval()
    mask = make_visible(1)[0]
    crop = torch.rand(1, 1, *TINY_CROP)
    before = task.autoencoder.decode(task.encoder, crop, mask, 26)
    nn.init.zeros_(task.autoencoder.tokens.projections[0].weight)
    after = task.autoencoder.decode(task.encoder, crop, mask, 26)
    assert not torch.allclose(before, after)


def test_padding_does_not_make_gradients_explode():
    encoder = make_encoder()
    crop = torch.zeros(1, 1, *TINY_CROP)
    crop[..., :16] = torch.rand(16)
    sum(stage.square().mean() for stage in encoder(crop)).backward()
    assert max(p.grad.norm() for p in encoder.parameters()) < 100
