r"""How fast pre-training learns: skill against steps, for settings and seeds side by side.

    python benchmarks/skill.py 4 --steps 1500 --every 50 --seeds 0 1 2 --variant planned \
        --variant "not local" architecture.arch_kwargs.vit.local_start=false --out skill

Trains with nnU-Net's own command line, in the folders that nnU-Net's environment variables name. Every variant is the
plans with some keys of the configuration replaced; a key is a path of names joined by dots, a value is JSON. Keys that
decide how images are preprocessed have no effect. What has been trained before is not trained again; an interrupted run
is continued from its last checkpoint. Writes ``OUT.png`` and ``OUT.csv``, and prints a table of the last skills.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

from nnunet_topomae import trainers
from nnunet_topomae.files import read_json, write_json
from nnunet_topomae.nnunet.planning.plans import PRETRAINING
from nnunet_topomae.nnunet.training.logger import SKILL
from nnunet_topomae.nnunet.weights.checkpoints import read_checkpoint

Curves = dict[str, list[float]]  # skills by branch


def write_plans(folder: Path, source: str, name: str, configuration: str, replaced: dict[str, Any]) -> None:
    """Write plans of another name, with some keys replaced."""
    plans = read_json(folder / f"{source}.json")
    plans["plans_name"] = name
    plans["configurations"][configuration].setdefault(PRETRAINING, {})  # plans of nnU-Net's own planners have none
    for path, value in replaced.items():
        place = plans["configurations"][configuration]
        *parents, key = path.split(".")
        for parent in parents:
            place = place[parent]
        place[key] = value
    write_json(plans, folder / f"{name}.json")


def train(options: argparse.Namespace, dataset: str, plans: str) -> Curves:
    """Train, or go on with what is there, and return the skills of all epochs."""
    run = Path(nnUNet_results, dataset, f"{options.trainer}__{plans}__{options.configuration}", f"fold_{options.fold}")
    if not (run / "checkpoint_final.pth").exists():
        command = ["nnUNetv2_train", dataset, options.configuration, options.fold, "-tr", options.trainer, "-p", plans]
        command += ["-device", options.device]
        command += ["--c"] if (run / "checkpoint_latest.pth").exists() else []
        environment = {**os.environ, "nnUNet_extTrainer": str(trainers.FOLDER)}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    log = read_checkpoint(run / "checkpoint_final.pth")["logging"]
    return {key.removeprefix(SKILL): values for key, values in log.items() if key.startswith(SKILL)}


def draw(curves: dict[tuple[str, int], Curves], every: int, file: Path) -> None:
    """A panel per branch: skill against steps on a log axis, a colour per variant, a line per seed."""
    branches = sorted({branch for skills in curves.values() for branch in skills})
    variants = list(dict.fromkeys(variant for variant, _ in curves))
    figure = Figure(figsize=(6 * len(branches), 4), layout="constrained")
    for axis, branch in zip(figure.subplots(1, len(branches), squeeze=False)[0], branches, strict=True):
        for (variant, seed), skills in curves.items():
            values = skills.get(branch, [])
            steps = [every * (epoch + 1) for epoch in range(len(values))]
            first = seed == next(s for v, s in curves if v == variant)
            axis.plot(steps, values, color=f"C{variants.index(variant)}", label=variant if first else None)
        axis.axhline(0, color="black", linewidth=1, linestyle="--")
        axis.set(xscale="log", xlabel="steps", ylabel="skill", title=branch, ylim=(-1.2, 1))
        axis.legend()
    figure.savefig(file, dpi=100)


def main() -> None:
    """Train all variants with all seeds, then draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=int)
    parser.add_argument("-tr", "--trainer", default="TopoMAEPretrainer")
    parser.add_argument("-p", "--plans", default="nnUNetTopoMAEPlans")
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("-f", "--fold", default="0")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=50, help="steps between two validations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variant", nargs="+", action="append", required=True, metavar="NAME key=value")
    parser.add_argument("--out", type=Path, default=Path("skill"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    dataset = convert_id_to_dataset_name(options.dataset)
    num_epochs = options.steps // options.every
    schedule = {"num_epochs": num_epochs, "num_iterations_per_epoch": options.every, "warmup_epochs": num_epochs / 20}
    curves: dict[tuple[str, int], Curves] = {}
    for seed in options.seeds:
        for name, *replaced in options.variant:
            keys = {f"{PRETRAINING}.{key}": value for key, value in {**schedule, "seed": seed}.items()}
            keys |= {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in replaced)}
            digest = hashlib.sha1(json.dumps(keys, sort_keys=True).encode(), usedforsecurity=False).hexdigest()[:8]
            plans = re.sub(r"\W+", "-", f"Skill {options.plans} {name} {digest}")
            folder = Path(nnUNet_preprocessed, dataset)
            write_plans(folder, options.plans, plans, options.configuration, keys)
            curves[name, seed] = train(options, dataset, plans)
    draw(curves, options.every, options.out.with_suffix(".png"))
    with options.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", "branch", "step", "skill"])
        for (name, seed), skills in curves.items():
            for branch, values in skills.items():
                writer.writerows(
                    [name, seed, branch, options.every * (epoch + 1), value] for epoch, value in enumerate(values)
                )
    print_table(curves)


def print_table(curves: dict[tuple[str, int], Curves]) -> None:
    """The last skill of every variant and branch: mean and range over seeds."""
    for name in dict.fromkeys(name for name, _ in curves):
        runs = [skills for (variant, _), skills in curves.items() if variant == name]
        for branch in runs[0]:
            last = [run[branch][-1] for run in runs]
            sys.stdout.write(
                f"{name:<40} {branch:<10} {statistics.mean(last):6.3f}  ({min(last):.3f} to {max(last):.3f})\n"
            )


if __name__ == "__main__":
    main()
