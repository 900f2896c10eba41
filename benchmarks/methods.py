"""What a step of every pre-training method costs, relative to its bare networks and to nnU-Net's training.

    python benchmarks/methods.py DATASET [-c 3d_fullres] [--device cpu] [--steps 3]

The dataset must have been planned by nnUNetv2_plan_experiment (default and ResEnc M) and nnUNetv2_topomae (default and
the planners of UNETR, MiM and Alice); plans that are missing are left out. Images are noise, smooth for pre-training;
medians of steps that take turns. "Bare" is the same forward pass, with the mean square of all outputs as its loss, and
the same optimiser: what the method adds are its loss terms, and a teacher's pass if it has one. ``nnUNet_compile``
counts.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from training_step import median_seconds

import nnunet_topomae.trainers
from nnunet_topomae.nnunet.training.pretraining import Pretrainer

METHODS = {  # by plans
    "nnUNetPlans": ("SparKPretrainer", "AnatoMaskPretrainer"),
    "nnUNetResEncUNetMPlans": ("SparKPretrainer", "AnatoMaskPretrainer"),
    "nnUNetTopoMAEPlans": ("TopoMAEPretrainer",),
    "nnUNetTopoMAEUNETRPlans": ("MAEPretrainer",),
    "nnUNetMiMUNETRPlans": ("MiMPretrainer",),
    "nnUNetAliceUNETRPlans": ("AlicePretrainer",),
}
BARE = "bare"


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
        example = trainer.task.views().example(*size[:2])
        return {**example, "crop": smooth(example["crop"]), "case": ["random"] * size[0]}
    with torch.no_grad():
        outputs = trainer.network(torch.rand(1, *size[1:], device=trainer.device))
    return {"data": torch.rand(size), "target": [torch.zeros(size[0], 1, *output.shape[2:]) for output in outputs]}


def smooth(noise: torch.Tensor) -> torch.Tensor:
    """Noise of mean 0 and deviation 1 whose diagrams have about as many points as those of MRI, unlike white noise."""
    blurred = torch.nn.functional.avg_pool3d(noise, 13, stride=1, padding=6, count_include_pad=False)
    return (blurred - blurred.mean()) / blurred.std()


def bare_step(trainer: Pretrainer, batch: dict) -> None:
    """The networks of a method alone: forward, backward, optimiser."""
    with trainer.task.without_loss():
        output = trainer.predict(trainer.to_device(batch))
    trainer.optimise(sum(tensor.square().mean() for tensor in tree_leaves(output) if tensor.requires_grad))


def steps_of(trainers: dict[str, nnUNetTrainer]) -> dict[str, Callable[[], object]]:
    """A step of every trainer, and one of its bare networks for every method."""
    steps: dict[str, Callable[[], object]] = {}
    for name, trainer in trainers.items():
        batch = make_batch(trainer)
        if isinstance(trainer, Pretrainer):
            steps[name] = partial(trainer.step, batch)
            steps[f"{name}, {BARE}"] = partial(bare_step, trainer, batch)
        else:
            steps[name] = partial(trainer.train_step, batch)
    return steps


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
        medians = median_seconds(steps_of(trainers), options.steps, device)
        manager = trainers["nnUNetTrainer"].configuration_manager
        crops = f"{manager.batch_size} crops of {tuple(manager.patch_size)}"
        print(f"{plans}, {type(trainers['nnUNetTrainer'].network).__name__}, {crops}, {device}")
        report(medians)


def report(medians: dict[str, float]) -> None:
    """A line per step."""
    for name, value in medians.items():
        bare = medians.get(f"{name}, {BARE}")
        of_bare = f"{value / bare:>8.2f} x bare" if bare else ""
        of_training = f"{value / medians['nnUNetTrainer']:>8.2f} x nnUNetTrainer"
        print(f"  {name:<28}{value:>8.3f} s{of_training}{of_bare}", flush=True)


if __name__ == "__main__":
    main()
