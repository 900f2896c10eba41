"""What nnU-Net's switch for Weights & Biases sends, with a stand-in for the module."""

from types import SimpleNamespace

import pytest
from nnunetv2.training.logging import nnunet_logger


class StandIn:
    """Keeps what a run of Weights & Biases is told."""

    def __init__(self):
        self.logged, self.summary, self.options = {}, {}, {}
        self.config, self.step = {}, 0

    def init(self, **options):
        self.options = options
        return self

    def log(self, values, step):
        for key, value in values.items():
            self.logged.setdefault(key, []).append((step, value))


@pytest.fixture
def wandb(monkeypatch):
    run = StandIn()
    monkeypatch.setattr(nnunet_logger, "wandb", SimpleNamespace(init=run.init))
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    monkeypatch.setenv("nnUNet_wandb_project", "liver")
    monkeypatch.setenv("nnUNet_wandb_mode", "offline")
    return run


def test_every_term_and_skill_of_every_epoch_is_sent(workspace, wandb):
    trainer = workspace.trainer("TopoMAEPretrainer", workspace.write_plans("Wandb"))
    trainer.run_training()
    log = trainer.logger.local_logger.my_fantastic_logging
    assert {"train_vit_topological", "val_unetrpp_spatial", "skill_vit", "train_losses", "lrs"} <= set(wandb.logged)
    assert wandb.logged == {key: list(enumerate(values)) for key, values in log.items()}
    assert (wandb.options["project"], wandb.options["mode"]) == ("liver", "offline")
    assert wandb.config["plans"]["plans_name"] == "Wandb"

    trainer.perform_actual_validation()
    assert {"final_val/vit/skill", "final_val/unetrpp/topological_distance"} <= set(wandb.summary)


def test_nothing_is_sent_unless_asked(workspace, wandb, monkeypatch):
    monkeypatch.setenv("nnUNet_wandb_enabled", "0")
    workspace.trainer("TopoMAEPretrainer", workspace.write_plans("NoWandb"))
    assert wandb.options == {}
