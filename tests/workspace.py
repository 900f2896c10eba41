"""A preprocessed phantom dataset and trainers on it."""

import json
from copy import deepcopy
from pathlib import Path

import torch
from nnunetv2.run.run_training import get_trainer_from_args

from tiny import PLANNED_CROP, PLANNED_NETWORK, SCHEDULE

DATASET = "Dataset998_Phantom"
PLANS = "nnUNetTopoMAEPlans"
SETTINGS = {"pretraining": {**SCHEDULE, "topology": {"grid": [12, 16, 16]}}, "finetuning": SCHEDULE}
CROP, NETWORK = PLANNED_CROP, PLANNED_NETWORK


class Workspace:
    """nnU-Net's three folders with a planned and preprocessed phantom dataset."""

    def __init__(self, folder: Path, dataset: str = DATASET):
        self.folder, self.dataset = folder, dataset
        self.preprocessed = folder / "preprocessed" / dataset
        self.results = folder / "results" / dataset

    def plans(self) -> dict:
        return json.loads((self.preprocessed / f"{PLANS}.json").read_text())

    def write_plans(self, name: str, edit) -> str:
        """Plans of another name, edited by ``edit(configuration)``."""
        plans = deepcopy(self.plans())
        plans["plans_name"] = name
        edit(plans["configurations"]["3d_fullres"])
        (self.preprocessed / f"{name}.json").write_text(json.dumps(plans))
        return name

    def trainer(self, name: str, plans: str = PLANS, fold: int | str = 0, continue_training: bool = False):
        """A trainer as nnU-Net's command makes it."""
        return get_trainer_from_args(
            self.dataset, "3d_fullres", fold, name, plans, continue_training, torch.device("cpu")
        )

    def checkpoint(self, trainer: str, plans: str = PLANS, fold: int | str = 0, name: str = "final") -> Path:
        return self.results / f"{trainer}__{plans}__3d_fullres" / f"fold_{fold}" / f"checkpoint_{name}.pth"
