import pytest
from timm.optim import param_groups_weight_decay

from nnunet_topomae.networks.grids import PatchVoxels, Positions, TokenProjection
from nnunet_topomae.networks.traits import fixed_parameters, grid_tensors, no_weight_decay
from tiny import make_method, make_network


def test_positions_mask_tokens_temperatures_and_gains_have_no_weight_decay():
    task = make_method("TopoMAE")
    expected = {
        name
        for name, _ in task.named_parameters()
        if name.endswith(("pos_embed", "mask_token", "_temperature")) or ".gains." in name
    }
    assert len(expected) > 20
    assert no_weight_decay(task) == expected
    _, decayed = param_groups_weight_decay(task, 0.1, no_weight_decay(task))
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    assert all(names[id(p)].endswith("weight") or ".to_voxels." in names[id(p)] for p in decayed["params"])


@pytest.mark.parametrize(
    ("kind", "fixed"), [("fused", {"vit.pos_embed"}), ("unetr", {"vit.pos_embed"}), ("plain", set())]
)
def test_only_sine_cosine_positions_are_fixed(kind, fixed):
    assert fixed_parameters(make_network(kind)) == fixed


def test_tensors_on_grids_are_named_in_full():
    tensors = grid_tensors(make_method("TopoMAE"))
    assert tensors["vit.pos_embed"] == Positions((4, 4, 4))
    assert tensors["encoder.stages.0.0.attention.project.weight"] == TokenProjection((8, 8, 16))
    assert tensors["vit_decoder.to_voxels.weight"] == PatchVoxels((4, 4, 8), 1)
