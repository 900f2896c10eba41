"""What a pre-training step spends its time on, for a planned and preprocessed dataset.

    python benchmarks/training_step.py DATASET [-p nnUNetTopoMAEPlans] [-c 3d_fullres] [--device cpu] [--steps 3]
        [--longest_axes 24 48] [--processes 0 4 8]

nnU-Net's environment variables must point to the dataset. ``--longest_axes`` measures topology on other grids than the
plans', too: with the given numbers of cells along the longest axis of the crop; 0 is every voxel. ``--processes``
measures it with these numbers of processes that find matchings; with 0, threads do. Medians over the steps, the first
one left out:

    data        one batch of crops read and augmented by one process; loader processes hide it behind the steps
    ViT         a step of the ViT branch alone, without topology
    UNETR++     the same of the other branch
    both        a step of both branches without topology
    topology    the topological loss of both branches alone, forward and backward
    one thread  the same with one thread in place of one per core; on a GPU without --processes with one process, too
    exposed     what topology adds to a step of both branches
    hidden      the rest of it, which runs beside the GPU's work
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from torch.utils.data import default_collate

import nnunet_topomae.trainers
from nnunet_topomae.methods import to_float32
from nnunet_topomae.methods.losses import compose
from nnunet_topomae.methods.topomae import TopoMAE, TopoMAEConfig
from nnunet_topomae.nnunet.planning.plans import build_network
from nnunet_topomae.nnunet.training.pretraining import Pretrainer
from nnunet_topomae.topology import TopologicalLoss


def median_seconds(actions: dict[str, Callable[[], object]], steps: int, device: torch.device) -> dict[str, float]:
    """Median duration of every action; they take turns, so that a busy machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(steps + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def make_step(
    trainer: Pretrainer, config: TopoMAEConfig, batch: dict, num_processes: int | None = None
) -> Callable[[], None]:
    """A step of optimisation of a fresh network."""
    channels = batch["crop"].shape[1]
    network = build_network(trainer.configuration_manager, channels, num_classes=channels, deep_supervision=False)
    task = TopoMAE(network, config, batch["crop"].shape[2:]).to(trainer.device)
    task.topological_loss.num_processes = num_processes
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-4)
    inputs = trainer.to_device(batch)

    def step() -> None:
        optimizer.zero_grad()
        with trainer.autocast():
            output = task(inputs)
        task.loss_terms(to_float32(output), inputs)["total"].backward()
        optimizer.step()

    return step


def make_topology(
    trainer: Pretrainer,
    config: TopoMAEConfig,
    batch: dict,
    num_threads: int | None = None,
    num_processes: int | None = None,
) -> Callable[[], None]:
    """The topological loss of two reconstructions as early in training: the crop, blurred where it is hidden."""
    inputs = trainer.to_device(batch)
    crop, hidden = inputs["crop"], trainer.task.hidden_voxels(inputs)
    loss = TopologicalLoss(config.topology.grid, config.topology.tolerance, num_threads, num_processes)
    blurred = [torch.nn.functional.avg_pool3d(crop, k, stride=1, padding=k // 2) for k in (3, 5)]
    predictions = [b.detach().requires_grad_() for b in blurred]

    def both_branches() -> None:
        sum(loss(crop, *(compose(crop, p, hidden) for p in predictions))).backward()

    return both_branches


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset")
    parser.add_argument("-p", "--plans", default="nnUNetTopoMAEPlans")
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--longest_axes", nargs="*", type=int, default=[], help="more grids of topology")
    parser.add_argument("--processes", nargs="*", type=int, default=[None], help="numbers of processes")
    options = parser.parse_args()
    os.environ["nnUNet_extTrainer"] = str(nnunet_topomae.trainers.FOLDER)
    device = torch.device(options.device)
    dataset = maybe_convert_to_dataset_name(options.dataset)
    trainer = get_trainer_from_args(
        dataset, options.configuration, "all", "TopoMAEPretrainer", options.plans, device=device
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer.output_folder = folder
        trainer.log_file = os.path.join(folder, "log.txt")
        trainer.initialize()
    config, size = trainer.config, trainer.configuration_manager.batch_size
    items = trainer.stream(trainer.get_tr_and_val_datasets()[0], 0, mirror=True)
    batch = default_collate([items[i] for i in range(size)])
    without = replace(config, topology=replace(config.topology, enabled=False))
    actions = {
        "data": lambda: [items[i] for i in range(size)],
        "ViT": make_step(trainer, replace(without, branches=("vit",)), batch),
        "UNETR++": make_step(trainer, replace(without, branches=("unetrpp",)), batch),
        "both": make_step(trainer, without, batch),
    }
    grids = [config.topology.grid, *(grid_of(batch["crop"].shape[2:], cells) for cells in options.longest_axes)]
    variants = [(grid, number) for grid in grids for number in options.processes]
    for grid, number in variants:
        other = replace(config, topology=replace(config.topology, grid=grid))
        actions[f"topology {grid} {number}"] = make_topology(trainer, other, batch, num_processes=number)
        actions[f"one thread {grid} {number}"] = make_topology(trainer, other, batch, 1, number)
        actions[f"whole {grid} {number}"] = make_step(trainer, other, batch, number)
    print(
        f"{dataset}: crop {tuple(batch['crop'].shape)}, tolerance {config.topology.tolerance}; {device}, "
        f"{os.cpu_count()} cores ({platform.machine()})"
    )
    seconds = median_seconds(actions, options.steps, device)
    networks = {name: seconds[name] for name in ("data", "ViT", "UNETR++", "both")}
    for grid, number in variants:
        alone, whole = seconds[f"topology {grid} {number}"], seconds[f"whole {grid} {number}"]
        exposed = max(whole - seconds["both"], 0.0)
        hidden = max(alone - exposed, 0.0)
        processes = "" if number is None else f", {number} processes"
        print(f"topology on {'every voxel' if grid is None else ' x '.join(map(str, grid))}{processes}")
        rows = {
            **networks,
            "topology": alone,
            "one thread": seconds[f"one thread {grid} {number}"],
            "exposed": exposed,
            "hidden": hidden,
            "whole step": whole,
        }
        for name, value in rows.items():
            print(f"  {name:<11}{value:>9.3f} s{value / whole:>8.1%} of the step")


def grid_of(crop_size: Sequence[int], cells: int) -> tuple[int, ...] | None:
    """A grid of cubes of voxels with about so many cells along the longest axis; None for every voxel, if 0."""
    if cells == 0:
        return None
    edge = max(1, round(max(crop_size) / cells))
    return tuple(-(-size // edge) for size in crop_size)


if __name__ == "__main__":
    main()
