"""The topological loss of one pair of volumes against other implementations, side by side in one run.

    python benchmarks/topology.py [IMAGE.nii.gz] [--sizes 24 32 48 64 96] [--case visible|noise] [--limit 300]

Per size: the crop of a CT with the most soft tissue (clipped to [-175, 250] HU, scaled to [0, 1]; a phantom if no image
is given) and a reconstruction: as training sees it ("visible": half of the 8^3 patches are copied, half are blurred
with sigma 2) or the worst case ("noise": 0.7 x blurred with sigma 1 + 0.3 x crop + noise of sigma 0.02). Every
implementation runs in its own process, forward (diagrams and distances of dimensions 0, 1 and 2), and backward where it
can, and is stopped at the time limit. Peers: gudhi (CubicalComplex) with gudhi.wasserstein (exact, dense POT) and with
gudhi.hera (delta 0.01); cripser's compute_ph_torch and wasserstein_distance, and torch_topological if it is installed
(both dense POT, differentiable).
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
import SimpleITK as sitk
import torch
from scipy.ndimage import gaussian_filter

from nnunet_topomae.commands.phantom import make_case
from nnunet_topomae.topology import TopologicalLoss, persistence_diagrams, wasserstein_distance

Result = tuple[float, Callable[[], str]]  # value, and a remark that is made when the clock has stopped


def read_ct(file: Path | None, size: int) -> np.ndarray:
    """A CT, or a phantom of at least that size, clipped to [-175, 250] HU and scaled to [0, 1]."""
    image = make_case(0, [max(size, 24)] * 3)[0] if file is None else sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    return (np.clip(image, -175, 250).astype(np.float32) + 175) / 425


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

    def remark() -> str:
        diagrams = [persistence_diagrams(torch.tensor(v, dtype=torch.float64)) for v in (target, reconstruction)]
        pairs = zip(*diagrams, strict=True)
        gaps = [wasserstein_distance(*p, tolerance=tolerance, return_certificate=True)[1].gap for p in pairs]
        return f"forward and backward, certified gap {max(gaps):.0e}, points {[len(d) for d in diagrams[0]]}"

    return value.item(), remark


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
    return sum(
        wasserstein_distance(x, y, order=2, internal_p=np.inf) ** 2 for x, y in pairs
    ) ** 0.5, lambda: "forward only"


def gudhi_hera(target: np.ndarray, reconstruction: np.ndarray) -> Result:
    """Gudhi's cubical complex and Hera's approximation, forward only."""
    from gudhi.hera import wasserstein_distance

    pairs = zip(_gudhi_diagrams(target), _gudhi_diagrams(reconstruction), strict=True)
    squares = [wasserstein_distance(x, y, order=2, internal_p=np.inf, delta=0.01) ** 2 for x, y in pairs]
    return sum(squares) ** 0.5, lambda: "forward only, delta 0.01"


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
    return value.item(), lambda: "forward and backward, without the essential component"


def torch_topological(target: np.ndarray, reconstruction: np.ndarray) -> Result:
    """torch_topological's layers, forward and backward."""
    from torch_topological.nn import CubicalComplex, WassersteinDistance

    volume = torch.tensor(reconstruction, dtype=torch.float64).requires_grad_()
    diagrams = [CubicalComplex(superlevel=True, dim=3)(v) for v in (torch.tensor(target, dtype=torch.float64), volume)]
    value = WassersteinDistance(q=2)(*diagrams)
    value.backward()
    return value.item(), lambda: "forward and backward, voxels as top cells"


OURS: dict[str, tuple[Callable[..., Result], tuple, int]] = {  # name: function, options, largest size tried
    "ours, exact": (ours, (0.0,), 96),
    "ours, 1 %": (ours, (0.01,), 96),
}
PEERS: dict[str, tuple[Callable[..., Result], tuple, int]] = {
    "gudhi.wasserstein": (gudhi_exact, (), 32),
    "gudhi.hera": (gudhi_hera, (), 96),
    "cripser": (cripser_own, (), 32),
    "torch_topological": (torch_topological, (), 32),
}


def _run(results: multiprocessing.Queue, function: Callable[..., Result], arguments: tuple) -> None:
    try:
        function(*(np.ascontiguousarray(a[:8, :8, :8]) for a in arguments[:2]), *arguments[2:])  # imports and warm-up
    except Exception as error:
        results.put(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:80]}")
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    value, remark = function(*arguments)
    seconds = time.perf_counter() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    results.put((seconds, grown / 2**20, value, remark()))


def measure(function: Callable[..., Result], arguments: tuple, limit: float) -> tuple[float, float, float, str] | str:
    """Seconds, growth of memory in GiB, value and remark in a fresh process, or why there are none.

    The largest memory that the process ever had counts, less what it had after a warm-up on 8^3 voxels.
    """
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
        pair = make_pair(read_ct(options.image, size), size, options.case)
        print(f"\n{size}^3, {options.case}\n  {'':<20}{'seconds':>9}{'GiB':>7}{'value':>11}")
        seconds = {}
        for name, (function, extra, largest) in {**OURS, **PEERS}.items():
            if size > largest:
                print(f"  {name:<20}not tried")
                continue
            answer = measure(function, (*pair, *extra), options.limit)
            if isinstance(answer, str):
                print(f"  {name:<20}{answer}", flush=True)
                continue
            seconds[name], memory, value, remark = answer
            print(f"  {name:<20}{seconds[name]:>9.3f}{memory:>7.2f}{value:>11.5f}  {remark}", flush=True)
        finished = [name for name in PEERS if name in seconds]
        for name in OURS if finished else ():
            ratios = "  ".join(
                f"{peer} {seconds[peer] / seconds[name]:.1f}" for peer in sorted(finished, key=seconds.get)
            )
            print(f"  times as fast as, {name}: {ratios}", flush=True)


if __name__ == "__main__":
    main()
