"""How long a start and reading take with many preprocessed cases: makes small ones in nnU-Net's format, and measures.

``python benchmarks/many_cases.py FOLDER [--cases 10000] [--edge 16] [--workers 2]``
"""

import argparse
import os
import pickle
import sys
from itertools import islice
from pathlib import Path
from time import perf_counter

import blosc2
import numpy as np

from nnunet_topomae.methods.masked import CropViews
from nnunet_topomae.nnunet.data.checking import CheckedFiles, check_finite
from nnunet_topomae.nnunet.data.preprocessed import cases_in, open_cases
from nnunet_topomae.nnunet.data.stream import Batches, CaseImages, ItemStream, StreamSampler

_ITEMS = 2000


def make(folder: Path, count: int, edge: int) -> None:
    """Write cases of ``edge`` voxels per axis, as nnU-Net's preprocessing does."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(len(cases_in(folder)), count):
        name = folder / f"case_{number:05d}"
        image = rng.standard_normal((1, edge, edge, edge), np.float32)
        blosc2.asarray(image, urlpath=f"{name}.b2nd", mode="w")
        blosc2.asarray((image > 0).astype(np.int16), urlpath=f"{name}_seg.b2nd", mode="w")
        Path(f"{name}.pkl").write_bytes(pickle.dumps({"class_locations": {}}))


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--edge", type=int, default=16)
    parser.add_argument("--workers", default="2")
    options = parser.parse_args()
    os.environ["nnUNet_n_proc_DA"] = options.workers

    def measure(what: str, work):
        started = perf_counter()
        result = work()
        sys.stdout.write(f"{what}: {perf_counter() - started:.1f} s\n")
        return result

    images = options.folder / "images"
    measure("writing", lambda: make(images, options.cases, options.edge))
    names = measure("listing the cases", lambda: cases_in(images))
    cases, checked = open_cases(images, names), CheckedFiles(options.folder, with_labels=False)
    unknown = measure("which files are unknown, first start", lambda: checked.unknown(cases))
    measure(f"reading {len(unknown)} cases", lambda: check_finite(cases, unknown, show_progress=False))
    measure("remembering them", lambda: checked.add(cases, unknown))
    left = measure("which files are unknown, second start", lambda: checked.unknown(cases))
    sys.stdout.write(f"unknown at the second start: {len(left)}\n")
    views = CropViews((options.edge // 2,) * 3, (2, 2, 2), 0.5)
    stream = ItemStream(views, CaseImages(cases, (1, 1, 1)), (0,), mirror=True)
    batches = Batches(stream, StreamSampler(), 4)
    measure(f"{_ITEMS} items", lambda: list(islice(batches, _ITEMS // 4)))


if __name__ == "__main__":
    main()
