from dataclasses import replace

import pytest

from nnunet_topomae.settings import FinetuningConfig, UNetFinetuningConfig, read_block
from nnunet_topomae.settings.recipes import RECIPES


def _read(values, config_class=FinetuningConfig):
    return read_block(config_class, values, "finetuning")


@pytest.mark.parametrize(("num_epochs", "warmup"), [(1000, 50), (150, 7.5), (2000, 50)])
def test_the_default_warms_up_for_five_percent(num_epochs, warmup):
    assert _read({"num_epochs": num_epochs}).warmup_epochs == warmup


def test_anatomask_as_published():
    """Li et al.'s code: AdamW, 1e-4, weight decay 1e-5, eps 1e-4, cosine over 1000 epochs, no warm-up."""
    config = _read({"recipe": "anatomask"}, UNetFinetuningConfig)
    assert (config.optimizer, config.base_lr, config.scale_lr) == ("adamw", 1e-4, False)
    assert (config.weight_decay, config.eps, config.warmup_epochs) == (1e-5, 1e-4, 0)
    assert (config.schedule, config.schedule_step, config.num_epochs) == ("cosine", "epoch", 1000)


@pytest.mark.parametrize(("num_epochs", "phase"), [(1000, 50), (150, 15)])
def test_nnssl_as_published(num_epochs, phase):
    """nnssl: SGD, 1e-3, momentum 0.99, poly; 50 of 1000 or 15 of 150 epochs of warm-up."""
    config = _read({"recipe": "nnssl", "num_epochs": num_epochs}, UNetFinetuningConfig)
    assert (config.optimizer, config.base_lr, config.scale_lr, config.momentum) == ("sgd", 1e-3, False, 0.99)
    assert (config.weight_decay, config.schedule, config.schedule_step) == (3e-5, "poly", "epoch")
    assert config.warmup_epochs == phase
    staged = _read({"recipe": "staged", "num_epochs": num_epochs})
    assert (staged.freeze_epochs, staged.warmup_epochs) == (phase, phase)


def test_frozen_is_the_default_but_for_the_encoder():
    frozen, default = _read({"recipe": "frozen"}), _read({})
    assert (frozen.encoder_lr, default.encoder_lr) == (0, 1)
    assert replace(frozen, recipe="default", encoder_lr=1.0) == default


@pytest.mark.parametrize("name", RECIPES)
def test_a_key_that_the_plans_have_wins(name):
    values = {"recipe": name, "base_lr": 0.5, "weight_decay": 0.25, "warmup_epochs": 3, "schedule": "poly"}
    config = _read(values)
    assert all(getattr(config, key) == value for key, value in values.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "nnsl"}, "finetuning.recipe in the plans must be one of default, anatomask, nnssl, staged, frozen"),
        ({"recipe": ["nnssl"]}, "finetuning.recipe in the plans must be one of"),
        ({"recipe": "staged", "num_epochs": 0}, "finetuning.num_epochs in the plans must be a whole number"),
        ({"recipe": "staged", "num_epochs": "ten"}, "finetuning.num_epochs in the plans must be a whole number"),
        (
            {"momentum": 0.9},
            "finetuning.momentum in the plans belongs to the optimizer sgd, but the optimizer is adamw",
        ),
        ({"recipe": "nnssl", "eps": 1e-4}, "finetuning.eps in the plans belongs to the optimizer adamw"),
        ({"optimizer": "lion", "eps": 1e-4}, "finetuning.optimizer in the plans must be one of adamw, sgd"),
        ({"recipe": "staged", "num_epochs": 10, "freeze_epochs": 9}, r"freeze_epochs \(9\) and warmup_epochs \(1\)"),
    ],
)
def test_what_contradicts_itself_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        _read(values)
