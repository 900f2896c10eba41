"""The topological loss of one pair of volumes against other implementations, side by side in one run.

    python benchmarks/topology.py [IMAGE.nii.gz] [--sizes 24 32 48 64 96] [--case visible|noise] [--limit 300]

Per size: the crop of a CT with the most soft tissue (clipped to [-175, 250] HU, scaled to [0, 1]; a phantom if no image
is given) and a reconstruction: as training sees it ("visible": half of the 8^3 patches are copied, half are blurred
with sigma 2) or the worst case ("noise": 0.7 x blurred with sigma 1 + 0.3 x crop + noise of sigma 0.02). Every
implementation runs in its own process, forward (diagrams and distances of dimensions 0, 1 and 2), and backward where it
can, and is stopped at the time limit. Peers: gudhi (CubicalComplex) with gudhi.wasserstein (exact, dense POT) and with
gudhi.hera (delta 0.01); cripser's compute_ph_torch and wasserstein_distance (exact, dense POT, differentiable).
"""

import argparse
import multiprocessing
import platform
import queue
import resource
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from loss_gradients import read_ct
from scipy.ndimage import gaussian_filter

from nnunet_topomae.topology import TopologicalLoss

Result = tuple[float, str]  # value, remark


def make_pair(image: np.ndarray, size: int, case: str) -> tuple[np.ndarray, np.ndarray]:
    """The crop (size, size, size) with the most soft tissue and its reconstruction."""
    candidates = product(*(np.linspace(0, n - size, 5).astype(int) for n in image.shape))
    crops = [image[tuple(slice(s, s + size) for s in start)] for start in candidates]
    crop = max(crops, key=lambda c: np.count_nonzero((c > 0) & (c < 1)))
    rng = np.random.default_rng(0)
    if case == "noise":
        noisy = 0.7 * gaussian_filter(crop, 1) + 0.3 * crop + rng.normal(0, 0.02, crop.shape)
        return crop, noisy.astype(np.float32)
    patches = rng.random((size // 8,) * 3) < 0.5
    hidden = np.kron(patches, np.ones((8, 8, 8))).astype(bool)
    return crop, np.where(hidden, gaussian_filter(crop, 2), crop).astype(np.float32)


def ours(target: np.ndarray, reconstruction: np.ndarray, tolerance: float) -> Result:
    """This package, forward and backward."""
    loss = TopologicalLoss(tolerance=tolerance)
    volume = torch.tensor(reconstruction)[None, None].requires_grad_()
    (value,) = loss(torch.tensor(target)[None, None], volume)
    value.backward()
    return value.item(), f"certified gap <= {tolerance:g}"


def _gudhi_diagrams(volume: np.ndarray) -> list[np.ndarray]:
    import gudhi

    complex_ = gudhi.CubicalComplex(vertices=-volume.astype(np.float64))
    complex_.compute_persistence(min_persistence=0)
    diagrams = [complex_.persistence_intervals_in_dimension(k).reshape(-1, 2) for k in range(3)]
    diagrams[0][np.isinf(diagrams[0])] = -volume.min()
    return [d[d[:, 0] != d[:, 1]] for d in diagrams]


def gudhi_exact(target: np.ndarray, reconstruction: np.ndarray) -> Result:
    """Gudhi's cubical complex and its exact distance, forward only."""
    from gudhi.wasserstein import wasserstein_distance

    pairs = zip(_gudhi_diagrams(target), _gudhi_diagrams(reconstruction), strict=True)
    return sum(wasserstein_distance(x, y, order=2, internal_p=np.inf) ** 2 for x, y in pairs) ** 0.5, "forward only"


def gudhi_hera(target: np.ndarray, reconstruction: np.ndarray) -> Result:
    """Gudhi's cubical complex and Hera's approximation, forward only."""
    from gudhi.hera import wasserstein_distance

    pairs = zip(_gudhi_diagrams(target), _gudhi_diagrams(reconstruction), strict=True)
    squares = [wasserstein_distance(x, y, order=2, internal_p=np.inf, delta=0.01) ** 2 for x, y in pairs]
    return sum(squares) ** 0.5, "delta 0.01, forward only"


def cripser_own(target: np.ndarray, reconstruction: np.ndarray) -> Result:
    """Cubical Ripser's own torch functions, forward and backward."""
    from cripser import compute_ph_torch, wasserstein_distance

    volume = torch.tensor(reconstruction, dtype=torch.float64).requires_grad_()
    tables = [compute_ph_torch(-v, maxdim=2) for v in (torch.tensor(target, dtype=torch.float64), volume)]
    squares = []
    for k in range(3):
        points = [t[(t[:, 0] == k) & torch.isfinite(t[:, 2])] for t in tables]
        squares.append(wasserstein_distance(*points, dim=k, p=2, q=float("inf")) ** 2)
    value = torch.stack(squares).sum().sqrt()
    value.backward()
    return value.item(), "without the essential component"


COMPETITORS: dict[str, tuple[Callable[..., Result], tuple, int]] = {  # name: function, options, largest size tried
    "ours, exact": (ours, (0.0,), 96),
    "ours, 1 %": (ours, (0.01,), 96),
    "gudhi.wasserstein": (gudhi_exact, (), 32),
    "gudhi.hera": (gudhi_hera, (), 96),
    "cripser": (cripser_own, (), 32),
}


def _run(results: multiprocessing.Queue, function: Callable[..., Result], arguments: tuple) -> None:
    function(*(np.ascontiguousarray(a[:8, :8, :8]) for a in arguments[:2]), *arguments[2:])  # imports and warm-up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    value, remark = function(*arguments)
    seconds = time.perf_counter() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    results.put((seconds, grown / 2**20, value, remark))


def measure(function: Callable[..., Result], arguments: tuple, limit: float) -> tuple[float, float, float, str] | str:
    """Seconds, growth of memory in GiB, value and remark in a fresh process, or why there are none."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_run, args=(results, function, arguments))
    process.start()
    deadline = time.monotonic() + limit + 30  # imports
    try:
        while time.monotonic() < deadline:
            try:
                return results.get(timeout=1)
            except queue.Empty:
                if not process.is_alive():
                    return f"failed (exit status {process.exitcode})"
        return f"stopped after {limit:.0f} s"
    finally:
        process.kill()
        process.join()


def main() -> None:
    """Print a table per size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("image", type=Path, nargs="?")
    parser.add_argument("--sizes", type=int, nargs="+", default=[24, 32, 48, 64, 96])
    parser.add_argument("--case", choices=["visible", "noise"], default="visible")
    parser.add_argument("--limit", type=float, default=300, help="seconds per run")
    options = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {multiprocessing.cpu_count()} cores, torch {torch.__version__}"
    )
    for size in options.sizes:
        pair = make_pair(read_ct(options.image, [size] * 3), size, options.case)
        print(f"\n{size}^3\n  {'':<20}{'seconds':>9}{'GiB':>7}{'value':>11}")
        reference = None
        for name, (function, extra, largest) in COMPETITORS.items():
            if size > largest:
                continue
            answer = measure(function, (*pair, *extra), options.limit)
            if isinstance(answer, str):
                print(f"  {name:<20}{answer}", flush=True)
                continue
            seconds, memory, value, remark = answer
            reference = reference or seconds
            ratio = f"{seconds / reference:8.1f} x ours, exact" if name != "ours, exact" else ""
            print(f"  {name:<20}{seconds:>9.3f}{memory:>7.2f}{value:>11.5f}  {remark:<32}{ratio}", flush=True)


if __name__ == "__main__":
    main()
