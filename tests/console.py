"""Runs console commands in fresh processes, as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

from nnunet_topomae import trainers
from nnunet_topomae.commands.demo import shrink_configuration
from tiny import PLANNED_NETWORK, SHORT_SCHEDULE

PLANS = "nnUNetTopoMAEPlans"


class Site:
    """A user's nnU-Net folders and environment."""

    def __init__(self, folder: Path, with_trainers: bool = True):
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
        for name in ("raw", "preprocessed", "results"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            self.environment[f"nnUNet_{name}"] = str(folder / name)
        self.environment |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
        if with_trainers:
            self.environment["nnUNet_extTrainer"] = str(trainers.FOLDER)

    def run(self, command: str, *arguments, status: int = 0, patience: float = 600, **environment: str) -> str:
        """Output of a command, which must end with ``status``, within ``patience`` seconds."""
        script = Path(sys.executable).parent / command
        result = subprocess.run(
            [str(script), *map(str, arguments)],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=patience,
            check=False,
        )
        output = result.stdout + result.stderr
        assert result.returncode == status, f"{command} {arguments}\n{output}"
        return output

    def train(self, dataset_id: int, trainer: str, *arguments, fold: int | str = 0, status: int = 0) -> str:
        return self.run(
            "nnUNetv2_train", dataset_id, "3d_fullres", fold, "-p", PLANS, "-tr", trainer, "-device", "cpu", *arguments,
            status=status,
        )  # fmt: skip

    def predict(self, dataset_id: int, images: Path, output: str, **environment: str) -> Path:
        target = self.folder / output
        self.run(
            "nnUNetv2_predict", "-d", dataset_id, "-c", "3d_fullres", "-f", 0, "-p", PLANS,
            "-tr", "FusedFinetuneTrainer", "-i", images, "-o", target, "-device", "cpu",
            "-npp", 1, "-nps", 1, **environment,  # each process imports PyTorch
        )  # fmt: skip
        return target

    def shrink_plans(self, dataset: str, crop_size: list[int]) -> None:
        """Tiny networks and two training steps."""
        file = self.folder / "preprocessed" / dataset / f"{PLANS}.json"
        plans = json.loads(file.read_text())
        configuration = plans["configurations"]["3d_fullres"]
        settings = {
            "pretraining": {**SHORT_SCHEDULE, "topology": {"grid": [size // 2 for size in crop_size]}},
            "finetuning": SHORT_SCHEDULE,
        }
        shrink_configuration(configuration, crop_size, PLANNED_NETWORK, settings)
        file.write_text(json.dumps(plans))
