import torch
from torch import nn

from nnunet_topomae.methods.light_decoder import DecoderStage, Densify


def test_hidden_positions_are_filled_with_the_mask_token_of_each_channel():
    densify = Densify(2, 2, deepest=True)  # nothing is projected
    nn.init.constant_(densify.mask_token[:, 0], 3.0)
    nn.init.constant_(densify.mask_token[:, 1], -2.0)
    features = torch.tensor([[1.0, 5.0, 99.0], [2.0, 0.0, 99.0]]).reshape(1, 2, 1, 1, 3)
    visible = torch.tensor([True, True, False]).reshape(1, 1, 1, 1, 3)
    expected = torch.tensor([-1.0, 1.0, 3.0, 1.0, -1.0, -2.0])  # visible ones normalised
    torch.testing.assert_close(densify(features, visible).flatten(), expected, rtol=0, atol=1e-4)


def test_between_its_convolutions_a_stage_cuts_off_below_0_and_above_6():
    stage = DecoderStage(4, 2, (2, 2, 2))
    between = []
    stage.blocks[1].conv.register_forward_pre_hook(lambda _, inputs: between.append(inputs[0]))
    nn.init.constant_(stage.blocks[0].norm.weight, 100.0)
    stage(torch.randn(1, 4, 4, 4, 4))
    (values,) = between
    assert (values.min().item(), values.max().item()) == (0, 6)
