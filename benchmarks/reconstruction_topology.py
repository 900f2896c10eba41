"""Does the topological loss keep topology? Betti errors of what pre-trainings of TopoMAE reconstruct.

    python benchmarks/reconstruction_topology.py 4 -p WITH WITHOUT [-c 3d_fullres] [-f 0] [--batches 12] [--cell 1]

Takes pre-trainings that have ended, by the names of their plans, and their validation crops at full resolution, with
the hidden patches reconstructed. With ``--cell 2``, means of 2 x 2 x 2 voxels are compared in place of voxels. Betti
numbers (components, loops, voids) of super-level sets are compared with those of the crop itself at 19 thresholds, the
5th to 95th percentile of its voxels. Prints, per branch and for two predictors that learn nothing, the mean absolute
difference over thresholds and crops for each dimension, the 2-Wasserstein distance of the loss, and the mean squared
error over hidden voxels. nnU-Net's environment variables name the folders.
"""

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from ended_pretraining import open_trainer, parser
from torch import Tensor

from nnunet_topomae.methods.base import Batch
from nnunet_topomae.methods.losses import compose, masked_mse
from nnunet_topomae.methods.topomae import TopoMAE
from nnunet_topomae.topology import TopologicalLoss, persistence_diagrams

_PERCENTILES = np.linspace(5, 95, 19)
_COLUMNS = ("components", "loops", "voids", "2-Wasserstein", "MSE")


def betti_curves(volume: Tensor, thresholds: np.ndarray) -> np.ndarray:
    """Betti numbers of the super-level sets of a (D, H, W) volume, (3, number of thresholds)."""
    diagrams = [diagram.numpy() for diagram in persistence_diagrams(volume)]
    return np.array([[((d[:, 0] >= t) & (d[:, 1] < t)).sum() for t in thresholds] for d in diagrams])


def betti_errors(image: Tensor, crop: Tensor) -> np.ndarray:
    """Mean absolute difference of the Betti numbers over thresholds, channels and crops, by dimension."""
    errors = []
    for volume, original in zip(image.flatten(0, 1), crop.flatten(0, 1), strict=True):
        thresholds = np.percentile(original.numpy(), _PERCENTILES)
        errors.append(np.abs(betti_curves(volume, thresholds) - betti_curves(original, thresholds)).mean(axis=1))
    return np.mean(errors, axis=0)


def measure(task: TopoMAE, batch: Batch, cell: int) -> dict[str, list[float]]:
    """The columns of the table, by branch and by the name of what learns nothing."""
    hidden, crop = task.hidden_voxels(batch), batch["crop"]
    with task.without_loss():
        images = task.images(task(batch), batch) | task.baselines(batch)
    errors = {name: masked_mse(image, crop, hidden).item() for name, image in images.items()}
    pooled, *others = (
        F.avg_pool3d(volume, cell) for volume in (crop, *(compose(crop, i, hidden) for i in images.values()))
    )
    distances = TopologicalLoss()(pooled, *others)
    return {
        task.headings.get(name, name): [*betti_errors(image, pooled), distance.item(), errors[name]]
        for name, image, distance in zip(images, others, distances, strict=True)
    }


@torch.no_grad()
def main() -> None:
    """Reconstruct with every pre-training, and print the table."""
    options = parser(batches=12, several=True)
    options.add_argument("--cell", type=int, default=1, help="voxels per axis that are averaged before")
    arguments = options.parse_args()
    lines, width = [], max(map(len, arguments.plans)) + 2
    for plans in arguments.plans:
        trainer = open_trainer(arguments, plans)
        _, validation = trainer.get_dataloaders()
        found = defaultdict(list)
        for _ in range(arguments.batches):
            for name, figures in measure(trainer.task, trainer.to_device(next(validation)), arguments.cell).items():
                found[name].append(figures)
        lines += [
            f"{plans:<{width}}{name:<22}" + "".join(f"{value:>15.4g}" for value in np.mean(figures, axis=0))
            for name, figures in found.items()
        ]
    print(f"\n{'plans':<{width}}{'reconstruction':<22}" + "".join(f"{c:>15}" for c in _COLUMNS), *lines, sep="\n")


if __name__ == "__main__":
    main()
