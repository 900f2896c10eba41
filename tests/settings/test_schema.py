import json

import pytest

from nnunet_topomae.methods.alice import AliceConfig
from nnunet_topomae.methods.mae import MAEConfig
from nnunet_topomae.methods.mim import MiMConfig
from nnunet_topomae.methods.spark import AnatoMaskConfig, SparKConfig
from nnunet_topomae.methods.topomae import TopoMAEConfig
from nnunet_topomae.settings import FinetuningConfig, UNetFinetuningConfig, read_block, to_block

CONFIG_CLASSES = [
    TopoMAEConfig,
    MAEConfig,
    SparKConfig,
    AnatoMaskConfig,
    MiMConfig,
    AliceConfig,
    FinetuningConfig,
    UNetFinetuningConfig,
]


def test_defaults_are_the_papers():
    config = TopoMAEConfig()
    assert (config.mask_ratio, config.lambda1, config.lambda2, config.lambda3) == (0.5, 0.5, 0.1, 0.1)
    assert (config.base_lr, FinetuningConfig().base_lr, config.weight_decay) == (6.4e-3, 1e-1, 0.005)


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
def test_a_block_survives_json(config_class):
    config = config_class()
    block = json.loads(json.dumps(to_block(config)))
    assert read_block(config_class, block, "block") == config


def test_left_out_keys_take_their_defaults():
    config = read_block(TopoMAEConfig, {"mask_ratio": 0.7, "topology": {"grid": [8, 8, 8]}}, "pretraining")
    assert config.mask_ratio == 0.7
    assert config.topology.grid == (8, 8, 8)
    assert config.topology.enabled
    assert config.num_iterations_per_epoch == 250


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"mask_rati": 0.5}, "unknown key pretraining.mask_rati in the plans; did you mean mask_ratio?"),
        ({"zzz": 0.5}, "unknown key pretraining.zzz in the plans; known keys: num_epochs"),
        ({"mask_ratio": 1}, "pretraining.mask_ratio in the plans must be a number above 0 and below 1, got 1"),
        ({"mask_ratio": "0.5"}, "pretraining.mask_ratio in the plans must be a number"),
        ({"num_epochs": 2.5}, "pretraining.num_epochs in the plans must be a whole number of at least 1, got 2.5"),
        ({"num_epochs": True}, "pretraining.num_epochs"),
        ({"lambda2": 0.6}, "pretraining.lambda2 in the plans must be a number of at least 0 and at most 0.5"),
        ({"branches": []}, "pretraining.branches in the plans must be a list of one or more of vit, unetrpp"),
        ({"branches": ["vit", "vit"]}, "pretraining.branches"),
        ({"branches": "vit"}, "pretraining.branches"),
        (
            {"branches": [["vit"]]},
            "pretraining.branches in the plans must be a list of one or more of vit, unetrpp, got",
        ),
        ({"base_lr": float("inf")}, "pretraining.base_lr in the plans must be a number above 0, got inf"),
        ({"base_lr": float("nan")}, "pretraining.base_lr in the plans must be a number above 0, got nan"),
        ({"weight_decay": 10**400}, "pretraining.weight_decay in the plans must be a number of at least 0, got 1000"),
        ({"topology": {"gird": None}}, "unknown key pretraining.topology.gird in the plans; did you mean grid?"),
        ({"topology": {"grid": [8, 8]}}, "pretraining.topology.grid in the plans must be null or three whole numbers"),
        ({"dropout": 1}, "pretraining.dropout in the plans must be null or a number of at least 0 and below 1, got 1"),
        ({"mask_ratio": None}, "pretraining.mask_ratio in the plans must be a number above 0 and below 1, got None"),
        ({"topology": True}, "pretraining.topology must be a block of settings, got True"),
        ({"spatial": {"enabled": 1}}, "pretraining.spatial.enabled in the plans must be true or false, got 1"),
        ({"from_scratch": True}, "unknown key pretraining.from_scratch"),
        ({"datasets_plans": "../x"}, "pretraining.datasets_plans in the plans must be null or the name of plans, got"),
        ({"datasets_plans": ""}, "pretraining.datasets_plans in the plans must be null or the name of plans, got"),
    ],
)
def test_bad_keys_are_named(block, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?").split("[")[0]):
        read_block(TopoMAEConfig, block, "pretraining")


@pytest.mark.parametrize("value", [[0.5, 0.6], [0.5, 0.6, 1], "0.5", [0.5, 0.6, True], 0.5])
def test_a_list_of_numbers_is_checked_one_by_one(value):
    with pytest.raises(
        ValueError, match=r"mask_ratios in the plans must be a list of 3, each a number above 0 and below 1"
    ):
        read_block(MiMConfig, {"mask_ratios": value}, "pretraining")
    assert read_block(MiMConfig, {"mask_ratios": [0.5, 0.25, 0.75]}, "pretraining").mask_ratios == (0.5, 0.25, 0.75)
