"""Plans that cannot be trained are refused by one sentence before anything is written."""

import pytest

from nnunet_topomae.trainers.topomae_pretrainer import TopoMAEPretrainer
from workspace import ANYTHING, says, snapshot


def _network(configuration, **changes):
    configuration["architecture"]["arch_kwargs"].update(changes)


def _vit(configuration, **changes):
    configuration["architecture"]["arch_kwargs"]["vit"].update(changes)


FUSED = "nnunet_topomae.networks.fused.FusedViTUNETRPP"
EDITS = {  # what Python says of unknown arguments differs between its versions
    "misspelt argument of the network": (
        lambda c: _network(c, fusion_gian=1),
        f"architecture {FUSED}: {ANYTHING} unexpected keyword argument 'fusion_gian'",
    ),
    "taps out of range": (
        lambda c: _network(c, taps=[0, 1, 9]),
        "taps must be 3 increasing blocks of a ViT of depth 4: [0, 1, 9]",
    ),
    "taps in disorder": (
        lambda c: _network(c, taps=[2, 1, 0]),
        "taps must be 3 increasing blocks of a ViT of depth 4: [2, 1, 0]",
    ),
    "four strides": (
        lambda c: _network(c, strides=[[1, 1, 1]] + [[2, 2, 2]] * 3),
        "UNETR++ takes five strides of which the first is 1 on every axis, got "
        "[[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]",
    ),
    "strides that do not divide": (
        lambda c: _network(c, strides=[[1, 1, 1], [5, 2, 2]] + [[1] * 3] * 3),
        "crop size (24, 32, 32) is not divisible by the total stride of the network, (5, 2, 2); choose a crop size "
        "whose axes are multiples of it",
    ),
    "heads that do not divide": (lambda c: _vit(c, num_heads=5), "ViT width 32 is not divisible by 5 heads"),
    "shallow ViT": (lambda c: _vit(c, depth=2), "taps must be 3 increasing blocks of a ViT of depth 2: [0, 1, 2]"),
    "misspelt argument of the ViT": (
        lambda c: _vit(c, widht=3),
        f"architecture {FUSED}: {ANYTHING} unexpected keyword argument 'widht'",
    ),
    "one adapter too few": (
        lambda c: _network(c, pyramid_channels=[8, 8, 8]),
        "pyramid_channels and pyramid_blocks need a value for each of four scales, got [8, 8, 8] and [1, 1, 1, 0]",
    ),
    "channels of UNETR++ without heads": (
        lambda c: _network(c, features_per_stage=[8, 8, 16, 18]),
        "features_per_stage must be divisible by twice the 4 heads, got 18",
    ),
    "no such network": (
        lambda c: c["architecture"].update(network_class_name="nnunet_topomae.networks.none.None"),
        f"architecture nnunet_topomae.networks.none.None: {ANYTHING}",
    ),
    "crop and patch_size differ": (
        lambda c: c.update(patch_size=[32, 32, 32]),
        "patch_size [32, 32, 32] and architecture.arch_kwargs.crop_size [24, 32, 32] must be equal",
    ),
    "patch_size is a number": (
        lambda c: c.update(patch_size=96),
        "patch_size must be a list of whole numbers of at least 1, got 96",
    ),
    "half a batch": (
        lambda c: c.update(batch_size=0.5),
        "batch_size must be a whole number of at least 1, got 0.5",
    ),
    "patch_size is missing": (
        lambda c: c.pop("patch_size"),
        "patch_size must be a list of whole numbers of at least 1, got None",
    ),
    "folder elsewhere": (
        lambda c: c.update(data_identifier="../../other"),
        "data_identifier must be a name, as folders are named by it, got '../../other'",
    ),
    "unknown key": (
        lambda c: c["pretraining"].update(epochs=3),
        "unknown key pretraining.epochs in the plans; did you mean num_epochs?",
    ),
    "own block missing": (
        lambda c: c.update(pretraining=None),
        "pretraining must be a block of settings, got None",
    ),
    "datasets of text": (
        lambda c: c["pretraining"].update(datasets=["7"]),
        "pretraining.datasets in the plans must be a list of dataset IDs, got ['7']",
    ),
}


def _check(workspace, trainer, edit, sentence) -> None:
    plans = workspace.write_plans("Spoilt", edit)
    before = snapshot(workspace.folder)
    with pytest.raises(ValueError, match='plans "Spoilt"') as error:
        workspace.trainer(trainer, plans)
    said = str(error.value)
    assert says(said, f'plans "Spoilt", configuration "3d_fullres": {sentence}'), said
    assert snapshot(workspace.folder) == before


@pytest.mark.parametrize(("edit", "sentence"), EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize("trainer", ["TopoMAEPretrainer", "FusedFinetuneTrainer"])
def test_plans(workspace, trainer, edit, sentence):
    _check(workspace, trainer, edit, sentence)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("plans_name", "/../../elsewhere", "plans_name must be a name, as folders are named by it"),
        ("plans_name", "", "plans_name must be a name, as folders are named by it"),
        ("plans_name", 5, "plans_name must be a name, as folders are named by it"),
        ("dataset_name", "..", "dataset_name must be a name, as folders are named by it"),
        ("configurations", None, "the configurations in the plans, and the architecture of each, must be JSON objects"),
        ("configurations", {"3d_fullres": "x"}, "the configurations in the plans, and the architecture of each"),
        ("configurations", {"3d_fullres": {"architecture": []}}, "the configurations in the plans, and the archit"),
    ],
)
def test_plans_whose_frame_makes_no_sense(workspace, key, value, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        TopoMAEPretrainer.check_plans({**workspace.plans(), key: value}, "3d_fullres")


def test_a_topology_grid_that_does_not_fit(workspace):
    def edit(configuration):
        configuration["pretraining"]["topology"].update(grid=[99, 9, 9])

    sentence = (
        "topology grid (99, 9, 9) does not fit a crop of (24, 32, 32) voxels: cells of (1, 4, 4) voxels give "
        "(24, 8, 8); use (24, 8, 8) or another grid of whole cells"
    )
    _check(workspace, "TopoMAEPretrainer", edit, sentence)
