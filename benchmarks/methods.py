"""What a step of every pre-training method costs, relative to training with nnU-Net on the same plans.

    python benchmarks/methods.py DATASET [-c 3d_fullres] [--device cpu] [--steps 3]

The dataset must have been planned by nnUNetv2_plan_experiment (default and ResEnc M) and nnUNetv2_topomae (default and
TopoMAEUNETRPlanner); plans that are missing are left out. Batches are random; medians of steps that take turns.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from tqdm import tqdm

import nnunet_topomae.trainers
from nnunet_topomae.nnunet.training.pretraining import Pretrainer

METHODS = {  # by plans
    "nnUNetPlans": ("SparKPretrainer", "AnatoMaskPretrainer"),
    "nnUNetResEncUNetMPlans": ("SparKPretrainer", "AnatoMaskPretrainer"),
    "nnUNetTopoMAEPlans": ("TopoMAEPretrainer",),
    "nnUNetTopoMAEUNETRPlans": ("MAEPretrainer",),
}


def make_trainer(dataset: str, configuration: str, name: str, plans: str, device: torch.device) -> nnUNetTrainer:
    """A trainer that writes nothing into the results."""
    trainer = get_trainer_from_args(dataset, configuration, "all", name, plans, device=device)
    folder = tempfile.mkdtemp()
    trainer.output_folder, trainer.log_file = folder, os.path.join(folder, "log.txt")
    trainer.initialize()
    trainer.progress = tqdm(disable=True)
    return trainer


def make_batch(trainer: nnUNetTrainer) -> dict:
    """Random images with what the trainer needs beside them."""
    manager = trainer.configuration_manager
    size = manager.batch_size, trainer.num_input_channels, *manager.patch_size
    if isinstance(trainer, Pretrainer):
        return {**trainer.task.views().example(*size[:2]), "case": ["random"] * size[0]}
    with torch.no_grad():
        outputs = trainer.network(torch.rand(1, *size[1:], device=trainer.device))
    return {"data": torch.rand(size), "target": [torch.zeros(size[0], 1, *output.shape[2:]) for output in outputs]}


def main() -> None:
    """Print a table per plans."""
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset")
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    os.environ["nnUNet_extTrainer"] = str(nnunet_topomae.trainers.FOLDER)
    device = torch.device(options.device)
    dataset = maybe_convert_to_dataset_name(options.dataset)
    for plans, methods in METHODS.items():
        if not (Path(nnUNet_preprocessed) / dataset / f"{plans}.json").is_file():
            continue
        trainers = {
            name: make_trainer(dataset, options.configuration, name, plans, device)
            for name in ("nnUNetTrainer", *methods)
        }
        batches = {name: make_batch(trainer) for name, trainer in trainers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(options.steps + 1):
            for name, trainer in trainers.items():
                started = time.perf_counter()
                trainer.train_step(batches[name])
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
        shape = tuple(batches["nnUNetTrainer"]["data"].shape)
        print(f"{plans}, {type(trainers['nnUNetTrainer'].network).__name__}, {shape}, {device}")
        for name, value in medians.items():
            print(f"  {name:<20}{value:>8.2f} s{value / medians['nnUNetTrainer']:>8.2f} x nnUNetTrainer", flush=True)


if __name__ == "__main__":
    main()
