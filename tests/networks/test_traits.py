import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from nnunet_topomae.methods import PretextTask
from nnunet_topomae.networks.grids import PatchVoxels, Positions, TokenProjection
from nnunet_topomae.networks.traits import constant_parameters, encoder_parameters, grid_tensors, no_weight_decay
from nnunet_topomae.settings import PretrainingConfig
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
    assert constant_parameters(make_network(kind)) == fixed


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("fused", {"vit", "encoder", "full_resolution_skip"}),
        ("unetr", {"vit"}),
        ("hybrid", {"encoder"}),
        ("plain", {"encoder"}),
    ],
)
def test_which_parts_are_the_encoder(kind, parts):
    network = make_network(kind)
    expected = {name for name, _ in network.named_parameters() if name.split(".")[0] in parts}
    assert encoder_parameters(network) == expected
    assert {name.split(".")[0] for name in expected} == parts


def test_a_network_without_an_encoder_by_name_is_refused():
    with pytest.raises(ValueError, match="Sequential has no part that is named encoder; give it a method"):
        encoder_parameters(nn.Sequential(nn.Linear(2, 2)))


def test_tensors_on_grids_are_named_in_full():
    tensors = grid_tensors(make_method("TopoMAE"))
    assert tensors["vit.pos_embed"] == Positions((4, 4, 4))
    assert tensors["encoder.stages.0.0.attention.project.weight"] == TokenProjection((8, 8, 16))
    assert tensors["vit_decoder.to_voxels.weight"] == PatchVoxels((4, 4, 8), 1)


class Rooted(nn.Module):
    """Speaks of its own tensors at its root, as timm's networks do."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 8, 4), requires_grad=False)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.encoder = self.backbone = nn.Linear(4, 4)

    def no_weight_decay(self):
        return {"positions", "encoder.weight"}

    def constant_parameters(self):
        return {"positions"}

    def resizing(self):
        return {"positions": Positions((2, 2, 2))}


class Task(PretextTask):
    def views(self): ...

    def forward(self, batch): ...

    def loss_terms(self, output, batch): ...

    def shown(self, output, batch): ...


def test_a_task_says_what_its_network_says_and_holds_all_of_it():
    network = Rooted()
    task = Task(network, PretrainingConfig(), (8, 8, 8))
    assert no_weight_decay(task) == {"positions", "encoder.weight"}
    assert task.fixed_parameters() == ["positions"]
    assert grid_tensors(task) == {"positions": Positions((2, 2, 2))}
    assert task.state_dict().keys() == network.state_dict().keys()


def test_a_network_whose_parts_are_called_as_a_task_is_refused():
    network = nn.Module()
    network.views = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r'^Module has a part named "views", which is also an attribute of Task'):
        Task(network, PretrainingConfig(), (8, 8, 8))
