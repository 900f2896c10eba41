"""The planner's estimate of memory against the peak of real training steps.

    python benchmarks/memory.py [--device cpu]

CPU: growth of a process of its own over two steps in float32. CUDA: the peak that PyTorch's allocator reports over two
steps in mixed precision, without the CUDA context.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_topomae.methods import to_float32
from nnunet_topomae.methods.topomae import TopologyConfig, TopoMAE, TopoMAEConfig
from nnunet_topomae.networks import FusedViTUNETRPP
from nnunet_topomae.nnunet.planning.geometry import choose_patch_size, fit_strides
from nnunet_topomae.nnunet.planning.memory import CONTEXT, GIB
from nnunet_topomae.nnunet.planning.traces import StepSizes, trace_finetuning, trace_pretraining
from nnunet_topomae.planners.topomae_planner import TopoMAEPlanner

STAGES = {"pre-training": partial(trace_pretraining, TopoMAE), "fine-tuning": trace_finetuning}


class Plan(NamedTuple):
    """What a planner would decide."""

    crop: tuple[int, int, int]
    spacing: tuple[float, float, float]
    batch_size: int
    channels: int
    classes: int

    def architecture(self) -> dict[str, Any]:
        """Keyword arguments of the network, as the planner chooses them."""
        crop, strides, _ = fit_strides(self.spacing, self.crop)
        patch = choose_patch_size(crop, self.spacing)
        return {
            "crop_size": crop,
            "strides": strides,
            "features_per_stage": TopoMAEPlanner.features_per_stage,
            "vit": {"patch_size": patch, **TopoMAEPlanner.vit},
        }


PLANS = {
    "hippocampus": Plan((40, 56, 40), (1, 1, 1), 7, 1, 3),
    "CT, 96^3": Plan((96, 96, 96), (1.5, 1.5, 1.5), 2, 1, 14),
    "Synapse": Plan((64, 128, 128), (3, 0.76, 0.76), 2, 1, 14),
    "ACDC": Plan((16, 160, 160), (10, 1.56, 1.56), 4, 1, 4),
    "Lung": Plan((32, 192, 192), (1.24, 0.79, 0.79), 2, 1, 2),
    "four sequences": Plan((64, 64, 64), (1, 1, 1), 4, 4, 4),
    "CT and PET": Plan((48, 96, 96), (3, 1.5, 1.5), 3, 2, 3),
    "thin": Plan((12, 48, 48), (6, 1, 1), 12, 1, 3),
}


def measure(plan: Plan, stage: str, device: torch.device) -> float:
    """GiB that two steps of training take."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    architecture = plan.architecture()
    crops = torch.rand(plan.batch_size, plan.channels, *architecture["crop_size"], device=device)
    if stage == "pre-training":
        network = FusedViTUNETRPP(plan.channels, plan.channels, deep_supervision=False, **architecture)
        config = TopoMAEConfig(topology=TopologyConfig(enabled=False))
        network = TopoMAE(network, config, architecture["crop_size"]).to(device)
    else:
        network = FusedViTUNETRPP(plan.channels, plan.classes, **architecture).to(device)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-5)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cuda", enabled=device.type == "cuda"):
            loss = pretraining_loss(network, crops) if stage == "pre-training" else finetuning_loss(network, crops)
        loss.backward()
        optimizer.step()
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() - held) / GIB
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / GIB


def pretraining_loss(task: TopoMAE, crops: torch.Tensor) -> torch.Tensor:
    """Of any masks and key points."""
    example = {name: tensor.to(crops.device) for name, tensor in task.views().example(*crops.shape[:2]).items()}
    batch = {**example, "crop": crops}
    return task.loss_terms(to_float32(task(batch)), batch)["total"]


def finetuning_loss(network: FusedViTUNETRPP, crops: torch.Tensor) -> torch.Tensor:
    """nnU-Net's loss of all outputs that it weighs above 0."""
    options = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)
    outputs = network(crops)[:-1]
    return sum(loss(o, torch.zeros(len(crops), 1, *o.shape[2:], device=crops.device)) for o in outputs)


def estimate(plan: Plan, stage: str, cuda: bool) -> float:
    """GiB that the planner expects."""
    arguments = json.dumps(plan.architecture())
    sizes = StepSizes(FusedViTUNETRPP, arguments, plan.channels, plan.classes, plan.batch_size, cuda)
    trace = STAGES[stage](sizes)
    return (trace - cuda * CONTEXT) / GIB


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--measure", nargs=2, metavar=("PLAN", "STAGE"), help="one measurement, in this process")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.measure:
        sys.stdout.write(f"{measure(PLANS[options.measure[0]], options.measure[1], device)}\n")
        return
    cases = [(name, stage) for name in PLANS for stage in STAGES]
    cuda = device.type == "cuda"
    print(f"GiB, {device}")
    print(f"{'plan':<16}{'crop':>14}{'batch':>7}  {'stage':<14}{'estimated':>10}{'measured':>10}{'error':>9}")
    with ProcessPoolExecutor(os.cpu_count() if cuda else 1, get_context("spawn")) as pool:
        estimates = [pool.submit(estimate, PLANS[name], stage, cuda) for name, stage in cases]
        for (name, stage), expected in zip(cases, estimates, strict=True):
            measured = measure(PLANS[name], stage, device) if cuda else measure_apart(name, stage, options.device)
            report(name, stage, expected.result(), measured)


def measure_apart(name: str, stage: str, device: str) -> float:
    """The same as :func:`measure`, in a fresh process."""
    command = [sys.executable, __file__, "--device", device, "--measure", name, stage]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed tensors leave the process
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(result.stdout)


def report(name: str, stage: str, expected: float, measured: float) -> None:
    """A line of the table."""
    plan = PLANS[name]
    crop = " x ".join(map(str, plan.crop))
    print(
        f"{name:<16}{crop:>14}{plan.batch_size:>7}  {stage:<14}{expected:>10.2f}{measured:>10.2f}"
        f"{expected / measured - 1:>+9.1%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
