"""How strongly each term of TopoMAE's loss pulls at the network: the ground for ``pretraining.topology.weight``.

    python benchmarks/loss_gradients.py 4 -p nnUNetTopoMAEPlans [-c 3d_fullres] [-f 0] [--batches 4] [--untrained]

Takes a pre-training that has ended (with ``--untrained`` its network before the first step) and batches of its
validation cases. Prints, per term, its value and the norm of its gradient with respect to all trained parameters,
before and after the paper's lambdas with a topology weight of 1, for several topology grids. Figures are means over
the batches. nnU-Net's environment variables name the folders.
"""

from collections import defaultdict
from dataclasses import replace
from statistics import mean

import torch
from ended_pretraining import open_trainer, parser
from torch import Tensor

from nnunet_topomae.methods.base import Batch
from nnunet_topomae.methods.topomae import TopologyConfig, TopoMAE
from nnunet_topomae.methods.topomae.task import loss_weights
from nnunet_topomae.topology import TopologicalLoss


def gradient_norms(task: TopoMAE, batch: Batch, grid: list[int] | None) -> dict[str, tuple[float, float]]:
    """Value of every term, and the norm of its gradient; topology on a grid, or on every voxel."""
    task.topological_loss = TopologicalLoss(grid)
    task.config = replace(task.config, topology=TopologyConfig(weight=1.0, grid=grid))
    trained = [p for p in task.parameters() if p.requires_grad]
    norms = {}
    for name, term in task.loss_terms(task(batch), batch).items():
        gradients = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
        norms[name] = (term.item(), torch.stack([g.norm() for g in gradients if g is not None]).norm().item())
    return norms


def grids_of(crop_size: list[int]) -> list[list[int] | None]:
    """Every voxel, and cells of 2 and 4 voxels a side."""
    return [None, *([size // cells for size in crop_size] for cells in (2, 4))]


def collect(task: TopoMAE, batches: list[dict[str, Tensor]]) -> dict[str, list[tuple[float, float]]]:
    """Values and norms of all batches by the term's label in the table."""
    found = defaultdict(list)
    for grid in grids_of(list(task.crop_size)):
        for batch in batches:
            for name, figures in gradient_norms(task, batch, grid).items():
                topological = "topological" in name
                if topological:
                    found[f"{name}, {'every voxel' if grid is None else f'grid {grid}'}"].append(figures)
                elif grid is None and name != "total":
                    found[name].append(figures)
    return found


def main() -> None:
    """Read the run, and print the table."""
    arguments = parser(batches=4)
    arguments.add_argument("--untrained", action="store_true", help="the network before the first step")
    arguments.add_argument("--device", default="cpu")
    options = arguments.parse_args()
    trainer = open_trainer(options, options.plans, options.device, trained=not options.untrained)
    task = trainer.task
    _, validation = trainer.get_dataloaders()
    batches = [trainer.to_device(next(validation)) for _ in range(options.batches)]
    weights = loss_weights(replace(task.config, topology=TopologyConfig(weight=1.0)))
    print(f"{'term':<54}{'value':>12}{'gradient':>12}{'x lambdas':>12}")
    for label, figures in collect(task, batches).items():
        value, norm = (mean(column) for column in zip(*figures, strict=True))
        print(f"{label:<54}{value:>12.4g}{norm:>12.4g}{norm * weights[label.split(',')[0]]:>12.4g}")


if __name__ == "__main__":
    main()
