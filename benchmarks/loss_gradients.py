"""How strongly each term of TopoMAE's loss pulls at the network: the ground for ``pretraining.topology.weight``.

    python benchmarks/loss_gradients.py [IMAGE.nii.gz] [--crop 96 96 96] [--patch 16 16 16] [--steps 10]

Trains the network of the defaults for some steps on random crops of one CT (clipped to [-175, 250] HU and normalised to
mean 0 and deviation 1, with --unit to [0, 1]; a phantom if none is given) and prints, per term, its value and the norm
of its gradient with respect to all trained parameters of its branch, before and after the paper's lambdas, for several
topology grids.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from nnunet_topomae.commands.phantom import make_case
from nnunet_topomae.methods.masking import random_patch_mask
from nnunet_topomae.methods.topomae import TopologyConfig, TopoMAE, TopoMAEConfig
from nnunet_topomae.methods.topomae.keypoints import NUM_KEYPOINTS
from nnunet_topomae.methods.topomae.task import loss_weights
from nnunet_topomae.networks import FusedViTUNETRPP
from nnunet_topomae.nnunet.planning.geometry import fit_strides
from nnunet_topomae.topology import TopologicalLoss


def read_ct(file: Path | None, crop: list[int], *, unit: bool) -> np.ndarray:
    """A CT, (D, H, W), in [0, 1] or with mean 0 and deviation 1."""
    if file is None:
        image = make_case(0, [max(size, 24) for size in crop])[0]
    else:
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    clipped = np.clip(image, -175, 250).astype(np.float32)
    return (clipped + 175) / 425 if unit else (clipped - clipped.mean()) / clipped.std()


def draw(image: np.ndarray, task: TopoMAE, crop: list[int], rng: np.random.Generator, batch: int):
    """A batch of random crops and masks; key points are all 0."""
    starts = [[rng.integers(n - c + 1) for n, c in zip(image.shape, crop, strict=True)] for _ in range(batch)]
    crops = [image[tuple(slice(s, s + c) for s, c in zip(start, crop, strict=True))] for start in starts]
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    masks = [random_patch_mask(task.mask_grid, 0.5, generator) for _ in range(batch)]
    points = torch.zeros(batch, NUM_KEYPOINTS, 3)
    return {"crop": torch.tensor(np.stack(crops))[:, None], "mask": torch.stack(masks), "keypoints": points}


def main() -> None:
    """Train, then print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("image", type=Path, nargs="?")
    parser.add_argument("--crop", type=int, nargs=3, default=[96, 96, 96])
    parser.add_argument("--patch", type=int, nargs=3, default=[16, 16, 16])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--unit", action="store_true", help="images in [0, 1], as in the paper's set-ups")
    parser.add_argument("--skip-full", action="store_true", help="leave out the full resolution")
    options = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    _, strides, _ = fit_strides((1, 1, 1), options.crop)
    vit = {"patch_size": options.patch, "local_start": not options.unit}
    network = FusedViTUNETRPP(1, 1, options.crop, strides, vit, deep_supervision=False)
    network.apply(network.initialize)
    dropout = None if options.unit else 0.0
    without = replace(TopoMAEConfig(), dropout=dropout, topology=TopologyConfig(enabled=False))
    task = TopoMAE(network, without, options.crop)
    trained = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.5e-4)
    image = read_ct(options.image, options.crop, unit=options.unit)
    for _ in range(options.steps):
        drawn = draw(image, task, options.crop, rng, 2)
        optimizer.zero_grad()
        task.loss_terms(task(drawn), drawn)["total"].backward()
        optimizer.step()
    drawn = draw(image, task, options.crop, rng, 2)
    weights = loss_weights(replace(TopoMAEConfig(), topology=TopologyConfig(weight=1.0)))
    print(f"crop {options.crop}, {options.steps} steps\n{'term':<34}{'value':>12}{'gradient':>12}{'x lambdas':>12}")
    grids = [None, [s // 2 for s in options.crop], [s // 4 for s in options.crop]]
    for grid in grids[options.skip_full :]:
        task.topological_loss = TopologicalLoss(grid)
        task.config = replace(TopoMAEConfig(), topology=TopologyConfig(weight=1.0, grid=grid))
        terms = task.loss_terms(task(drawn), drawn)
        for name, term in terms.items():
            if name == "total" or ("topological" not in name and grid is not grids[-1]):
                continue
            gradients = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
            norm = torch.stack([g.norm() for g in gradients if g is not None]).norm().item()
            label = f"{name} grid {grid or 'full'}" if "topological" in name else name
            print(f"{label:<34}{term.item():>12.5f}{norm:>12.5f}{norm * weights[name]:>12.5f}", flush=True)


if __name__ == "__main__":
    main()
