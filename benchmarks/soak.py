"""Trains every method for 2,000 steps on the phantom, and prints how memory, open files, threads and files have grown.

``python benchmarks/soak.py FOLDER [--steps 2000]``; FOLDER is made as by same_training.py. The exit status is 1 if
anything has grown by more than its bound between the first quarter of the run and its end.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from same_training import DATASET, RUNS, prepare

EPOCHS = 20
BOUNDS = {"MB": 100, "open files": 4, "threads": 2, "temporary files": 0}


def main() -> None:
    """Train, and print a row per run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    prepare(options.folder)
    sys.stdout.write(f"{'trainer':<26}{'plans':<24}{''.join(f'{what:>18}' for what in BOUNDS)}   (growth)\n")
    grown = [soak(name, plans, options.steps // EPOCHS) for name, plans in RUNS]
    sys.exit(any(grown))


def soak(name: str, plans: str, steps_per_epoch: int) -> bool:
    """Train with one trainer; whether anything has grown by more than its bound."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(1)
    silenced, sys.stdout = sys.stdout, sys.stderr
    trainer = get_trainer_from_args(DATASET, "3d_fullres", 0, name, plans, False, torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch = EPOCHS, steps_per_epoch
    used: list[dict[str, int]] = []
    end_epoch = trainer.on_epoch_end

    def measuring() -> None:
        end_epoch()
        used.append(measure(Path(trainer.output_folder)))

    trainer.on_epoch_end = measuring
    try:
        trainer.run_training()
    finally:
        sys.stdout = silenced
    growth = {what: used[-1][what] - max(early[what] for early in used[: EPOCHS // 4]) for what in BOUNDS}
    sys.stdout.write(f"{name:<26}{plans:<24}{''.join(f'{growth[what]:>18}' for what in BOUNDS)}\n")
    sys.stdout.flush()
    return any(growth[what] > bound for what, bound in BOUNDS.items())


def measure(folder: Path) -> dict[str, int]:
    """What this process uses now."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    temporary = [file for place in (folder, Path(tempfile.gettempdir())) for file in place.glob(".*.[0-9]*")]
    return {
        "MB": int(status["VmRSS"].split()[0]) // 1024,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "temporary files": len(temporary),
    }


if __name__ == "__main__":
    main()
