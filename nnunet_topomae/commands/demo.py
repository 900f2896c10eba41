"""``nnUNetv2_topomae demo``: planning, both trainings and prediction of a made-up dataset, on a laptop."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nnunet_topomae import trainers
from nnunet_topomae.commands.phantom import LABELS, write_dataset
from nnunet_topomae.commands.terminal import say
from nnunet_topomae.files import write_json
from nnunet_topomae.planners.topomae_planner import TopoMAEPlanner
from nnunet_topomae.studies.running import executable

_DATASET_ID, _DATASET = 999, "Dataset999_TopoMAEPhantom"
_CONFIGURATION, _FOLD = "3d_fullres", 0
_NUM_TRAINING, _NUM_TEST = 10, 3
_PLANS = TopoMAEPlanner.default_plans_name
_SCRATCH_PLANS = f"{_PLANS}Scratch"
_CROP = [32, 32, 32]
_ITERATIONS = 20  # per epoch
_SCHEDULE = {"num_iterations_per_epoch": _ITERATIONS, "num_val_iterations_per_epoch": 2, "warmup_epochs": 1}
_NETWORK = {
    "features_per_stage": [8, 16, 32, 64],
    "vit": {"patch_size": [8, 8, 8], "width": 96, "depth": 4, "num_heads": 3, "local_start": True},
    "taps": [0, 1, 2],
    "pyramid_channels": [8, 16, 32, None],
    "pyramid_blocks": [1, 1, 1, 0],
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "pretraining": {"num_epochs": 5, "base_lr": 0.064, "topology": {"grid": [16, 16, 16]}, **_SCHEDULE},
    "finetuning": {"num_epochs": 5, "base_lr": 0.4, **_SCHEDULE},
}


def run(keep: Path | None) -> None:
    """Make phantoms, plan, pre-train, fine-tune, train from scratch, predict, and print the Dice of both.

    Args:
        keep: folder to leave everything in; must not exist yet or be empty. None: a temporary folder.

    Raises:
        ValueError: if ``keep`` holds files.
        RuntimeError: if a command fails; names it and its log.
    """
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise ValueError(f"{keep} is not empty; name a new folder")
    folder = (keep or Path(tempfile.mkdtemp(prefix="topomae_demo_"))).resolve()
    started = time.monotonic()
    try:
        demo = Demo(folder)
        demo.run()
        say(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if keep is None:
        say("Use --keep FOLDER to look at pictures, checkpoints and predictions.")
    else:
        say("\n".join(["Pictures to look at:", *(f"  {file}" for file in demo.pictures())]))


class Demo:
    """The steps of the demo in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.raw, self.preprocessed, self.results, self.logs = (
            folder / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "logs")
        )
        for part in (self.raw, self.preprocessed, self.results, self.logs):
            part.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(self) -> None:
        """Plan, train and predict, in the order of the README."""
        dataset = self.raw / _DATASET
        write_dataset(dataset, _NUM_TRAINING, _NUM_TEST)
        say(f"{_NUM_TRAINING} phantoms to train on and {_NUM_TEST} to test in {dataset}; device: {self.device}\n")
        self.execute("nnUNetv2_topomae", "plan_and_preprocess", "-d", _DATASET_ID, "-c", _CONFIGURATION, "-np", 2)
        self.shrink_plans()
        self.train(_PLANS, "TopoMAEPretrainer")
        self.train(_PLANS, "FusedFinetuneTrainer")
        self.train(_SCRATCH_PLANS, "FusedFinetuneTrainer")
        dice = {plans: self.predict_and_measure(plans) for plans in (_PLANS, _SCRATCH_PLANS)}
        self.report(dice[_PLANS], dice[_SCRATCH_PLANS])

    def shrink_plans(self) -> None:
        """Edit the plans as a user would; a copy of them trains from scratch."""
        file = self.preprocessed / _DATASET / f"{_PLANS}.json"
        plans = json.loads(file.read_text())
        shrink_configuration(plans["configurations"][_CONFIGURATION], _CROP, _NETWORK, _SETTINGS)
        write_json(plans, file)
        plans["plans_name"] = _SCRATCH_PLANS
        plans["configurations"][_CONFIGURATION]["finetuning"]["from_scratch"] = True
        write_json(plans, file.with_name(f"{_SCRATCH_PLANS}.json"))

    def train(self, plans: str, trainer: str) -> None:
        """One ``nnUNetv2_train``."""
        self.execute(
            "nnUNetv2_train", _DATASET_ID, _CONFIGURATION, _FOLD, "-p", plans, "-tr", trainer, "-device", self.device
        )

    def predict_and_measure(self, plans: str) -> dict[str, float]:
        """Predict the test cases; mean Dice per structure."""
        dataset, predictions = self.raw / _DATASET, self.folder / "predictions" / plans
        model = ("-d", _DATASET_ID, "-c", _CONFIGURATION, "-f", _FOLD, "-p", plans, "-tr", "FusedFinetuneTrainer")
        self.execute("nnUNetv2_predict", *model, "-i", dataset / "imagesTs", "-o", predictions, "-device", self.device)
        labels = [str(label) for label in LABELS.values() if label]
        self.execute("nnUNetv2_evaluate_simple", dataset / "labelsTs", predictions, "-l", *labels)
        summary = json.loads((predictions / "summary.json").read_text())
        return {name: summary["mean"][str(label)]["Dice"] for name, label in LABELS.items() if label}

    def report(self, pretrained: dict[str, float], scratch: dict[str, float]) -> None:
        """Print both columns of Dice."""
        steps = _SETTINGS["finetuning"]["num_epochs"] * _ITERATIONS
        say(f"\nDice of {_NUM_TEST} test cases, {steps} training steps each")
        say(f"  {'structure':<16}{'pre-trained':>14}{'from scratch':>14}")
        for name, value in pretrained.items():
            say(f"  {name:<16}{value:>14.3f}{scratch[name]:>14.3f}")
        say("One seed and tiny networks: this shows that everything works, not how much pre-training helps.")

    def pictures(self) -> list[Path]:
        """The pictures that the trainings have made."""
        fold = f"{_PLANS}__{_CONFIGURATION}/fold_{_FOLD}"
        pretraining, finetuning = (
            self.results / _DATASET / f"{trainer}__{fold}" for trainer in ("TopoMAEPretrainer", "FusedFinetuneTrainer")
        )
        return [
            pretraining / "progress.png",
            pretraining / "validation" / "reconstructions.png",
            finetuning / "progress.png",
        ]

    def execute(self, command: str, *arguments: object) -> None:
        """Run a console command in its own process; its output goes to a log.

        Raises:
            RuntimeError: if it fails.
        """
        words = [command, *map(str, arguments)]
        log = self.logs / f"{len(list(self.logs.iterdir())):02d}_{command}.log"
        say(f"$ {' '.join(words)}")
        started = time.monotonic()
        with log.open("w") as output:
            status = subprocess.run(
                [executable(command), *words[1:]], stdout=output, stderr=output, env=self._environment(), check=False
            )
        if status.returncode:
            tail = "\n".join(log.read_text().splitlines()[-20:])
            raise RuntimeError(f"{command} failed with exit status {status.returncode}; its output ends:\n{tail}")
        say(f"  {time.monotonic() - started:.0f} s")

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_extTrainer": str(trainers.FOLDER),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "f",
        }


def shrink_configuration(
    configuration: dict[str, Any], crop_size: Sequence[int], network: dict[str, Any], settings: dict[str, dict]
) -> None:
    """Edit a configuration of our plans in place: crop, network and the two blocks.

    Args:
        configuration: of a plans file.
        crop_size: voxels per axis.
        network: replaces keyword arguments of the network.
        settings: ``pretraining`` and ``finetuning``: keys to replace.
    """
    configuration["batch_size"] = 2
    configuration["patch_size"] = list(crop_size)
    configuration["architecture"]["arch_kwargs"].update(network, crop_size=list(crop_size))
    for block, values in settings.items():
        configuration[block].update(values)
