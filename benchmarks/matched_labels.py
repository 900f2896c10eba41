"""How often a place of one patient is found in the same structure of another one, which the labels of both tell.

    nnUNetv2_topomae train_matcher -d 18 -p PLANS -c 3d_fullres
    python benchmarks/matched_labels.py 18 -p PLANS [-c 3d_fullres] [--cases 20] [--points 40]

Draws places in every structure of the first cases, and in the body outside of all structures, and looks for each in the
next case. Prints the share of them that was found in the same structure: by the landmark network that was trained last,
by the relative position in the bounding boxes of both bodies, and by chance, which is the share of the body that the
structure takes. Labels judge what was found; nothing has learned from them.
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_topomae.files import read_json
from nnunet_topomae.methods.alice import AliceConfig
from nnunet_topomae.methods.alice.landmarks.matcher import ByEmbedding
from nnunet_topomae.methods.alice.landmarks.store import LandmarkStore
from nnunet_topomae.methods.alice.matching import body, bounding_box
from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from nnunet_topomae.nnunet.data.stream import CaseImages
from nnunet_topomae.settings import read_block

Points = npt.NDArray[np.float64]  # (P, 3), voxels
OUTSIDE = "outside of all"


def main() -> None:
    """Print a line for each structure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset", type=int, help="ID of the dataset")
    parser.add_argument("-p", "--plans", required=True)
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--points", type=int, default=40, help="places of a structure in a case")
    options = parser.parse_args()
    dataset = PlannedDataset.of(options.dataset, options.plans)
    (name,) = dataset.configurations([options.configuration])
    folder, cache = dataset.labelled_folder(name), dataset.cache_folder(name)
    cases = infer_dataset_class(str(folder))(str(folder))
    images = CaseImages(cases, dataset.plans.get_configuration(name).spacing, cache)
    matcher = newest_matcher(cache, dataset.plans.get_configuration(name).configuration["pretraining"])
    labels = {case: np.asarray(cases.load_case(case)[1][0]) for case in images.identifiers[: options.cases]}
    structures = {number: name for name, number in dataset.description["labels"].items() if number}
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for query, key in itertools.pairwise([*labels, next(iter(labels))]):
        for structure, shares in compare(images, matcher, (query, key), labels, structures, options.points).items():
            found[structure].append(shares)
    columns = list(found[OUTSIDE][0])
    print(f"{'structure':<20}{''.join(f'{column:>20}' for column in columns)}")
    for structure, of_pairs in found.items():
        means = [np.nanmean([shares[column] for shares in of_pairs]) for column in columns]
        print(f"{structure:<20}{''.join(f'{mean:>20.1%}' for mean in means)}")


def newest_matcher(cache: Path, settings: Mapping[str, Any]) -> ByEmbedding:
    """The landmark network that was trained last."""
    folder = max(cache.glob("landmarks_*/network.pth"), key=lambda file: file.stat().st_mtime).parent
    store = LandmarkStore(folder, read_json(folder / "settings.json")["spacing"])
    identity = torch.tensor(list(store.identity()), dtype=torch.uint8)
    return ByEmbedding([1, 1, 1], read_block(AliceConfig, settings, "pretraining").landmarks, identity)


def compare(
    images: CaseImages,
    matcher: ByEmbedding,
    pair: tuple[str, str],
    labels: Mapping[str, npt.NDArray],
    structures: Mapping[int, str],
    count: int,
) -> dict[str, dict[str, float]]:
    """Shares of the places of each structure that are found in the same one, by what they were found with."""
    query, key = pair
    bodies = {case: body(np.asarray(images.load(case)[0])) for case in pair}
    store, rng = matcher.store(images), np.random.default_rng(0)
    shares = {}
    for number, structure in {**structures, 0: OUTSIDE}.items():
        inside = np.argwhere((labels[query] == number) & bodies[query])
        points = inside[rng.choice(len(inside), count)].astype(float)
        matches = matcher.match(store, images, pair, store.embedding(query), points)
        accepted = matcher.accepts(store, matches)
        same = label_at(labels[key], matches.points) == number
        by_position = label_at(labels[key], same_position(points, bodies[query], bodies[key])) == number
        shares[structure] = {
            "landmarks, accepted": same[accepted].mean() if accepted.any() else np.nan,
            "landmarks, all": same.mean(),
            "share accepted": accepted.mean(),
            "position": by_position.mean(),
            "chance": (labels[key][bodies[key]] == number).mean(),
        }
    return shares


def label_at(label: npt.NDArray, points: Points) -> npt.NDArray:
    """Labels of the nearest voxels."""
    return label[tuple(points.round().astype(int).clip(0, np.array(label.shape) - 1).T)]


def same_position(points: Points, first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> Points:
    """Points with the same relative coordinates in the bounding box of another body."""
    (low, high), (other_low, other_high) = bounding_box(first), bounding_box(second)
    return other_low + (points - low) / (high - low) * (other_high - other_low)


if __name__ == "__main__":
    main()
