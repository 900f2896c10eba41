import pytest
import torch

from nnunet_topomae.methods.masking import hardest_patches_mask, mask_to_voxels, num_hidden_patches, random_patch_mask


@pytest.mark.parametrize(
    ("num_patches", "ratio", "expected"), [(8, 0.5, 4), (216, 0.75, 162), (10, 0.01, 1), (10, 0.99, 9), (7, 0.5, 4)]
)
def test_number_of_hidden_patches(num_patches, ratio, expected):
    assert num_hidden_patches(num_patches, ratio) == expected


def test_random_mask_hides_exactly_the_ratio_and_follows_its_generator():
    masks = [random_patch_mask((4, 5, 6), 0.4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert [int(mask.sum()) for mask in masks] == [48, 48, 48]
    assert masks[0].shape == (4, 5, 6)
    assert masks[0].dtype == torch.bool
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_every_patch_is_hidden_equally_often():
    generator = torch.Generator().manual_seed(0)
    share = torch.stack([random_patch_mask((2, 2, 2), 0.5, generator).float() for _ in range(2000)]).mean(0)
    assert (share - 0.5).abs().max() < 0.06  # five standard deviations


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5])
def test_ratio_outside_the_open_interval_is_refused(ratio):
    with pytest.raises(ValueError, match="mask ratio must lie inside"):
        random_patch_mask((2, 2, 2), ratio, torch.Generator())


def test_a_single_patch_cannot_be_masked():
    with pytest.raises(ValueError, match="at least 2 patches"):
        random_patch_mask((1, 1, 1), 0.5, torch.Generator())


def test_mask_to_voxels_repeats_each_patch():
    mask = torch.zeros(1, 2, 1, 2, dtype=torch.bool)
    mask[0, 1, 0, 0] = True
    voxels = mask_to_voxels(mask, (2, 3, 4))
    assert voxels.shape == (1, 1, 4, 3, 8)
    assert voxels[0, 0, 2:, :, :4].all()
    assert int(voxels.sum()) == 2 * 3 * 4


def test_the_hardest_patches_are_hidden_and_chance_takes_the_rest():
    errors = torch.tensor([[0.0, 5.0, 1.0, 4.0, 0.0, 3.0], [9.0, 0.0, 0.0, 8.0, 7.0, 0.0]]).reshape(2, 1, 2, 3)
    counts = torch.zeros(2, 6)
    for _ in range(200):
        mask = hardest_patches_mask(errors, num_hidden=3, num_hardest=2, order=torch.rand(errors.shape)).flatten(1)
        assert mask.sum(dim=1).tolist() == [3, 3]
        counts += mask
    assert counts[0, [1, 3]].tolist() == [200, 200]
    assert counts[1, [0, 3]].tolist() == [200, 200]
    others = torch.cat([counts[0, [0, 2, 4, 5]], counts[1, [1, 2, 4, 5]]])
    assert others.min() > 25  # 50 expected of each
    assert others.max() < 80


def test_without_hardest_patches_the_order_alone_decides():
    errors, order = torch.arange(24.0).reshape(1, 2, 3, 4), torch.rand(1, 2, 3, 4)
    mask = hardest_patches_mask(errors, 12, 0, order)
    assert torch.equal(mask, order > order.median())
