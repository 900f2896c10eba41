"""How well the landmark network finds the same place, and what finding it costs, on augmented copies of a CT.

    python benchmarks/matcher.py CT.nii.gz [--iterations 500] [--batch 2] [--copies 8] [--cache FOLDER] [--device cpu]

The copies are turned by up to 15 degrees about each axis, scaled by 0.85 to 1.15, and brightened differently. The
network is trained on all copies but two, and then finds 300 places of the one in the other; where they are is known.
With ``--cache`` a training that was interrupted goes on, and a finished one is used again.

Then it draws pairs as the loader's processes do, and measures how much of that time is the search. A pair is drawn
beside the training step, so that what counts is whether the processes keep up; the ratio to a step of a ViT-B with the
crop and the device given is printed, too.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch.utils.data import default_collate

from nnunet_topomae.methods import to_float32
from nnunet_topomae.methods.alice import Alice, AliceConfig
from nnunet_topomae.methods.alice.augmentation import Placement, changed_intensities, view_of
from nnunet_topomae.methods.alice.landmarks.matcher import ByEmbedding
from nnunet_topomae.methods.alice.landmarks.settings import LandmarkConfig
from nnunet_topomae.methods.alice.landmarks.training import prepare_landmarks
from nnunet_topomae.methods.alice.matching import body
from nnunet_topomae.networks import UNETR

_WINDOW = (-1000.0, 1000.0)  # HU


class Copies:
    """Augmented copies of one image, to be drawn from like the images of a dataset."""

    def __init__(self, file: Path, count: int, cache: Path):
        image = sitk.ReadImage(str(file))
        volume = sitk.GetArrayFromImage(image).astype(np.float32).clip(*_WINDOW)[None]
        self.spacing, self.cache = image.GetSpacing()[::-1], cache
        self.placements, self.volumes = {}, {}
        for n in range(count):
            rng = np.random.default_rng(n)
            angles = rng.uniform(-np.pi / 12, np.pi / 12, 3).tolist()
            placement = Placement((0, 0, 0), volume.shape[1:], tuple(angles), float(rng.uniform(0.85, 1.15)))
            copy = changed_intensities(view_of(volume - _WINDOW[0], placement), rng)  # air outside
            self.placements[f"copy{n}"], self.volumes[f"copy{n}"] = placement, (copy / copy.std()).numpy()
        self.identifiers, self.partners = list(self.volumes)[:-2], list(self.volumes)

    def load(self, case: str) -> np.ndarray:
        """A copy."""
        return self.volumes[case]


def errors(
    images: Copies, matcher: ByEmbedding, query: str, key: str, count: int = 300
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm between where places were found and where they are, and which matches are accepted."""
    inside = np.argwhere(body(images.load(query)[0])).astype(float)
    points = inside[np.random.default_rng(0).choice(len(inside), 4 * count)]
    true = images.placements[key].from_volume(images.placements[query].to_volume(points))
    seen = ((true >= 0) & (true <= np.array(images.load(key).shape[1:]) - 1)).all(axis=1)
    points, true = points[seen][:count], true[seen][:count]
    store = matcher.store(images)
    matches = matcher.match(store, images, (query, key), store.embedding(query), points)
    return np.linalg.norm((matches.points - true) * images.spacing, axis=1), matcher.accepts(store, matches)


def seconds(action, repeats: int) -> float:
    """Mean duration; the first call is left out."""
    action(0)
    started = time.perf_counter()
    for n in range(1, repeats + 1):
        action(n)
    return (time.perf_counter() - started) / repeats


def main() -> None:
    """Print errors and costs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--crop", type=int, nargs=3, default=[96, 96, 96])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    config = LandmarkConfig(iterations=options.iterations, batch_size=options.batch)
    with tempfile.TemporaryDirectory() as temporary:
        images = Copies(options.file, options.copies, options.cache or Path(temporary))
        store = prepare_landmarks(images, config, device, lambda line: print(line, flush=True))
        matcher = ByEmbedding(options.crop, config, torch.tensor(list(store.identity()), dtype=torch.uint8))
        *_, first, second = images.partners
        for query, key in ((first, second), (second, first)):
            distances, accepted = errors(images, matcher, query, key)
            print(
                f"{query} in {key}: median error {np.median(distances):.1f} mm, 90 % below "
                f"{np.percentile(distances, 90):.1f} mm; {accepted.mean():.0%} accepted, of these "
                f"{np.median(distances[accepted]):.1f} mm"
            )
        costs(images, matcher, options.crop, device)


def costs(images: Copies, matcher: ByEmbedding, crop: list[int], device: torch.device) -> None:
    """Print what drawing an item, finding its pair, and a training step take."""
    vit = {"patch_size": (16, 16, 16), "width": 768, "num_heads": 12}
    network = UNETR(1, 1, crop, [[1] * 3, *[[2] * 3] * 4], vit, features=4, deep_supervision=False)
    task = Alice.build(network, AliceConfig(matcher="position"), crop).to(device)
    views = task.views()
    views.matcher = matcher
    case = images.identifiers[0]
    batch = {
        name: value.to(device)
        for name, value in default_collate(
            [views.draw(images, case, np.random.default_rng(n), True) for n in range(2)]
        ).items()
    }

    def step(_: int) -> None:
        task.loss_terms(to_float32(task(batch)), batch)["total"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    finding = seconds(lambda n: matcher.pair(images, case, np.random.default_rng(n)), 10)
    drawing = seconds(lambda n: views.draw(images, case, np.random.default_rng(n), True), 10)
    stepping = seconds(step, 2)
    print(f"an item: {drawing:.3f} s, of which finding the pair {finding:.3f} s; a step with 2 items: {stepping:.3f} s")
    print(f"finding the pairs of a step in one process takes {2 * finding / stepping:.1%} of the step, beside it")


if __name__ == "__main__":
    main()
