"""Collect wheels for a machine without network (docs/offline.md).

    python install/bundle.py wheels --present torch==2.8.0 torchvision==0.23.0

Run it with the Python version, on the system and the processor of the other machine, in a checkout of this repository;
it needs pip 22.2 or newer. ``--present`` names the PyTorch that is installed there; it and the libraries of CUDA that
it brings are left out.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
CUDA = ("nvidia-", "cuda-", "triton")  # names of what PyTorch brings and nothing else needs


def pip(*arguments: str) -> str:
    """What a command of pip prints; ends the program with pip's own errors if it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise SystemExit("\n".join([f"pip {arguments[0]} has failed:", *errors]))
    return done.stdout


def missing(project: str, present: list[str]) -> list[str]:
    """All that the project needs beside what is there, as NAME==VERSION."""
    report = pip("install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", project, *present)
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report)["install"]}
    there = {requirement.split("==")[0] for requirement in present} | {"nnunet-topomae"}
    return [f"{name}=={version}" for name, version in found.items() if name not in there and not name.startswith(CUDA)]


def main() -> None:
    """Resolve, build or fetch, and say how to go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the wheels")
    parser.add_argument("--present", nargs="*", default=["torch", "torchvision"], help="what the other machine has")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # what earlier builds have left in the checkout would be packed, too
        project = Path(folder) / "project"
        shutil.copytree(PROJECT, project, ignore=shutil.ignore_patterns(".git", "build", "*.egg-info", "wheels*"))
        needed = missing(str(project), options.present)
        pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(options.folder), str(project), *needed)
    size = sum(file.stat().st_size for file in options.folder.glob("*.whl"))
    sys.stdout.write(f"{len(needed) + 1} wheels, {size / 1e6:.0f} MB. On the other machine:\n\n")
    sys.stdout.write(f"    pip install --no-index --find-links {options.folder.name} nnunet-topomae\n")


if __name__ == "__main__":
    main()
