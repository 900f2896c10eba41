"""Collect wheels for a machine without network on which PyTorch is installed already (docs/offline.md).

    python install/bundle.py wheels --present torch==2.8.0 torchvision==0.23.0

Run it with the Python version, on the system and the processor of the other machine, in a checkout of this repository.
``--present`` names what is installed there; it and all that it needs are left out.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def resolve(*requirements: str) -> dict[str, str]:
    """Versions by name of all that pip would install into an empty environment."""
    options = ["--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    report = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *requirements], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report)["install"]}


def main() -> None:
    """Resolve, build or fetch, and say how to go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the wheels")
    parser.add_argument("--present", nargs="+", default=["torch", "torchvision"], help="what the other machine has")
    options = parser.parse_args()
    present, needed = resolve(*options.present), resolve(str(PROJECT), *options.present)
    missing = [f"{name}=={version}" for name, version in needed.items() if name not in present]
    missing = [requirement for requirement in missing if not requirement.startswith("nnunet-topomae==")]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(options.folder)]
    subprocess.run([*command, str(PROJECT), *missing], check=True)
    size = sum(file.stat().st_size for file in options.folder.glob("*.whl"))
    sys.stdout.write(f"{len(missing) + 1} wheels, {size / 1e6:.0f} MB. On the other machine:\n\n")
    sys.stdout.write(f"    pip install --no-index --find-links {options.folder.name} nnunet-topomae\n")


if __name__ == "__main__":
    main()
