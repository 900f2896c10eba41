import torch

from nnunet_topomae.methods.losses import compose, masked_mse


def test_masked_mse_is_a_mean_over_hidden_voxels_of_all_channels():
    target = torch.zeros(1, 2, 1, 1, 3)
    prediction = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0]]).reshape(1, 2, 1, 1, 3)
    mask = torch.tensor([True, True, False]).reshape(1, 1, 1, 1, 3)
    assert masked_mse(prediction, target, mask).item() == (1 + 4 + 9 + 16) / 4


def test_compose_takes_hidden_voxels_from_the_prediction():
    crop, prediction = torch.zeros(1, 2, 1, 1, 2), torch.ones(1, 2, 1, 1, 2)
    mask = torch.tensor([True, False]).reshape(1, 1, 1, 1, 2)
    assert compose(crop, prediction, mask).flatten().tolist() == [1, 0, 1, 0]
