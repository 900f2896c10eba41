"""Trains every method for 2,000 steps on the phantom, and prints how memory, open files, threads and files have grown.

``python benchmarks/soak.py FOLDER [--steps 2000] [--plans NAME ...]``; FOLDER is made as by same_training.py. Every
training runs in a process of its own. The exit status is 1 if anything has grown by more than its bound between the
first fifth of the run and its end. Memory that is free, but that the allocator of glibc keeps, is given back before
memory is measured; the last column is the memory at the end without that.
"""

import argparse
import ctypes
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

from same_training import DATASET, RUNS, prepare

EPOCHS = 10
BOUNDS = {"MB": 50, "open files": 4, "threads": 2, "temporary files": 0}


def main() -> None:
    """Train, and print a row per run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--plans", nargs="+", default=[plans for _, plans in RUNS], help="train with these plans only")
    options = parser.parse_args()
    prepare(options.folder)
    header = f"{'trainer':<26}{'plans':<24}{''.join(f'{what:>18}' for what in BOUNDS)}   growth; MB with what is free\n"
    sys.stdout.write(header)
    sys.stdout.flush()
    start = multiprocessing.get_context("spawn").Process
    failed = False
    for name, plans in RUNS:
        if plans in options.plans:
            process = start(target=soak, args=(name, plans, options.steps // EPOCHS))
            process.start()
            process.join()
            failed |= process.exitcode != 0
    sys.exit(failed)


def soak(name: str, plans: str, steps_per_epoch: int) -> None:
    """Train with one trainer; leave with status 1 if anything has grown by more than its bound."""
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
    growth = {what: used[-1][what] - max(early[what] for early in used[: EPOCHS // 5]) for what in BOUNDS}
    sys.stdout.write(
        f"{name:<26}{plans:<24}{''.join(f'{growth[what]:>18}' for what in BOUNDS)}{used[-1]['resident']:>10}\n"
    )
    sys.stdout.flush()
    sys.exit(any(growth[what] > bound for what, bound in BOUNDS.items()))


def measure(folder: Path) -> dict[str, int]:
    """What this process uses now."""
    with_free = resident()
    ctypes.CDLL(None).malloc_trim(0)
    temporary = [file for place in (folder, Path(tempfile.gettempdir())) for file in place.glob(".*.[0-9]*")]
    return {
        "MB": resident(),
        "resident": with_free,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": int(status()["Threads"]),
        "temporary files": len(temporary),
    }


def resident() -> int:
    """MB of memory that this process takes."""
    return int(status()["VmRSS"].split()[0]) // 1024


def status() -> dict[str, str]:
    """What Linux says of this process."""
    return dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())


if __name__ == "__main__":
    main()
