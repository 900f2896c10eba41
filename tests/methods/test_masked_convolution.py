import pytest
import torch
from torch import nn

from nnunet_topomae.methods.masked_convolution import choose_patch_size, hide_in, masked_instance_norm
from nnunet_topomae.methods.masking import mask_to_voxels, random_patch_mask
from tiny import make_network, make_spark

CROP = (16, 16, 32)
PATCH = (4, 8, 8)


def _masks(batch_size=2, ratio=0.6):
    grid = [size // patch for size, patch in zip(CROP, PATCH, strict=True)]
    return torch.stack([random_patch_mask(grid, ratio, torch.Generator().manual_seed(s)) for s in range(batch_size)])


@pytest.fixture(params=["plain", "residual"])
def encoder(request):
    network = make_network(request.param)
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return network.encoder.eval()


def test_with_nothing_hidden_the_encoder_is_the_plain_one(encoder):
    crop = torch.rand(2, 1, *CROP)
    with torch.no_grad():
        expected = encoder(crop)
        hidden = hide_in(encoder)
        unset = encoder(crop)
        hidden.mask = torch.zeros_like(_masks())
        got = encoder(crop)
    for a, b, c in zip(expected, unset, got, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, a, rtol=1e-5, atol=1e-5)


def _first_convolution(encoder):
    return next(module for module in encoder.modules() if isinstance(module, nn.Conv3d))


def test_visible_features_do_not_depend_on_hidden_voxels_and_hidden_ones_are_zero(encoder):
    hidden, mask = hide_in(encoder), _masks()
    hidden.mask = mask
    voxels = mask_to_voxels(mask, PATCH)
    crop = torch.rand(2, 1, *CROP).masked_fill(voxels, 0)
    features = encoder(crop)
    for scale in features:
        visible = hidden.visible_at(scale)
        assert (scale * ~visible == 0).all()
        assert (scale * visible != 0).any()


@pytest.mark.parametrize("masked", [True, False])
def test_what_a_convolution_writes_into_hidden_voxels_goes_no_further(encoder, masked):
    """Garbage is put there after the first convolution; without the mask it reaches the visible features."""
    mask = _masks()
    voxels = mask_to_voxels(mask, PATCH)
    crop = torch.rand(2, 1, *CROP).masked_fill(voxels, 0)
    garbage = [False]

    def spoil(module, inputs, output):
        return torch.where(voxels, torch.randn_like(output) * 100, output) if garbage[0] else output

    _first_convolution(encoder).register_forward_hook(spoil)  # before the hook that hides
    if masked:
        hide_in(encoder).mask = mask
    with torch.no_grad():
        before = encoder(crop)
        garbage[0] = True
        after = encoder(crop)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [masked] * len(before)


def test_norms_take_the_statistics_of_each_samples_visible_voxels():
    norm = nn.InstanceNorm3d(3, affine=True)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    features, visible = torch.randn(2, 3, 4, 4, 4) * 5 + 2, torch.rand(2, 1, 4, 4, 4) < 0.4
    got = masked_instance_norm(features, visible, norm)
    for sample in range(2):
        seen = features[sample][:, visible[sample, 0]]  # (C, visible voxels), which torch normalises as a 1D signal
        expected = nn.functional.instance_norm(seen[None], weight=norm.weight, bias=norm.bias, eps=norm.eps)[0]
        torch.testing.assert_close(got[sample][:, visible[sample, 0]], expected)
        assert (got[sample][:, ~visible[sample, 0]] == 0).all()


def test_a_layer_of_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"encoder\.1 is a BatchNorm3d, from which patches cannot be hidden; use"):
        hide_in(nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2)))


@pytest.mark.parametrize(
    ("strides", "patch"),
    [
        ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]], (16, 16, 16)),  # the coarsest sees all
        ([[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]], (4, 16, 16)),
        ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]], (8, 8, 8)),  # hippocampus
    ],
)
def test_patches_are_the_cumulative_stride_up_to_16(strides, patch):
    assert choose_patch_size(strides) == patch


def test_stages_coarser_than_the_patches_see_everything(monkeypatch):
    monkeypatch.setattr("nnunet_topomae.methods.masked_convolution._LARGEST_PATCH", 4)
    task = make_spark()
    assert task.patch_size == (2, 4, 4)
    hidden = task.autoencoder.hidden
    hidden.mask = torch.rand(1, *task.mask_grid) < 0.5
    shapes = [hidden.visible_at(scale) for scale in task.encoder(torch.rand(1, 1, *CROP))]
    assert [visible is None for visible in shapes] == [False, False, False, True]
