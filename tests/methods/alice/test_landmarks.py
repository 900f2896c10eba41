import errno
import fcntl
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnunet_topomae.commands.phantom import make_case
from nnunet_topomae.methods.alice import Alice, AliceConfig
from nnunet_topomae.methods.alice.augmentation import Placement, changed_intensities, view_of
from nnunet_topomae.methods.alice.landmarks import training
from nnunet_topomae.methods.alice.landmarks.contrast import Points, contrast, sample
from nnunet_topomae.methods.alice.landmarks.inspection import inspect
from nnunet_topomae.methods.alice.landmarks.matcher import ByEmbedding
from nnunet_topomae.methods.alice.landmarks.network import DIMENSIONS, LandmarkNetwork
from nnunet_topomae.methods.alice.landmarks.search import find
from nnunet_topomae.methods.alice.landmarks.settings import LandmarkConfig
from nnunet_topomae.methods.alice.landmarks.store import Embedding, LandmarkStore, choose_spacing
from nnunet_topomae.methods.alice.landmarks.training import prepare_landmarks, view_size
from nnunet_topomae.methods.alice.landmarks.views import draw_views
from nnunet_topomae.methods.alice.matching import body
from tiny import TINY_CROP, make_network

CONFIG = LandmarkConfig(iterations=3, batch_size=2, min_similarity=-1, max_cycle=1000)
CPU = torch.device("cpu")
CROP = (16, 16, 16)
SPACING = (2.0, 2.0, 2.0)


class Phantoms:
    """Turned, scaled and differently bright copies of one phantom."""

    spacing = SPACING

    def __init__(self, cache: Path, count: int = 3, seed: int = 0):
        image = make_case(seed)[0].astype(np.float32)[None] / 200
        self.placements, self.volumes = {}, {}
        for n in range(count):
            rng = np.random.default_rng((seed, n))
            angles = rng.uniform(-np.pi / 18, np.pi / 18, 3).tolist()
            placement = Placement((0, 0, 0), image.shape[1:], tuple(angles), float(rng.uniform(0.9, 1.1)))
            copy = view_of(image - image.min(), placement) + float(image.min())
            self.placements[f"copy{n}"] = placement
            self.volumes[f"copy{n}"] = changed_intensities(copy, rng).numpy()
        self.identifiers, self.partners, self.cache = list(self.volumes)[:-1], list(self.volumes), cache

    def load(self, case: str) -> np.ndarray:
        return self.volumes[case]


@pytest.fixture
def images(tmp_path):
    return Phantoms(tmp_path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Images, the store of their network, and what a training keeps of it; only to be read."""
    images = Phantoms(tmp_path_factory.mktemp("prepared"))
    store = prepare_landmarks(images, CONFIG, CPU, ignore)
    return images, store, torch.tensor(list(store.identity()), dtype=torch.uint8)


def ignore(line: str) -> None:
    pass


def weights(store: LandmarkStore) -> dict[str, torch.Tensor]:
    return torch.load(store.network_file, weights_only=True)["network"]


def test_vectors_have_length_1_at_two_scales():
    fine, coarse = LandmarkNetwork(2)(torch.rand(1, 2, 16, 24, 16))
    assert (fine.shape, coarse.shape) == ((1, DIMENSIONS, 8, 12, 8), (1, DIMENSIONS, 2, 3, 2))
    for features in (fine, coarse):
        torch.testing.assert_close(features.norm(dim=1), torch.ones_like(features[:, 0]))


def test_vectors_are_sampled_where_the_voxels_lie():
    """A map of coordinates, of every second voxel: its cells lie between the voxels."""
    cells = torch.stack(torch.meshgrid(*(torch.arange(n) * 2 + 0.5 for n in (4, 6, 5)), indexing="ij"))
    points = torch.tensor([[2.5, 4.5, 6.5], [3.5, 5.0, 1.0]])
    torch.testing.assert_close(sample(cells, points, (8, 12, 10)), F.normalize(points, dim=1))


@pytest.mark.parametrize(("coarse", "num_negatives"), [(False, 90), (True, 390)])
def test_the_contrast_is_low_where_only_the_same_places_are_alike(coarse, num_negatives):
    """Maps whose vectors are all perpendicular: positives have a cosine of 1, or of 0, negatives of 0.

    Of the 64 places of a view, 19 are too near to a point. The coarse map has 300 more, a few of which are the point.
    """
    size, cells = (8, 8, 8), (4, 4, 4)
    maps = torch.eye(64).T.reshape(1, 64, *cells).repeat(2, 1, 1, 1, 1)
    places = torch.tensor([[2.5, 2.5, 2.5], [4.5, 4.5, 2.5]])
    alike = contrast(maps, [Points(places, places)], size, coarse=coarse)
    different = contrast(maps, [Points(places, places.flip(0))], size, coarse=coarse)
    positive = np.exp(1 / 0.5)
    assert alike == pytest.approx(np.log((positive + num_negatives) / positive), abs=0.1 if coarse else 1e-4)
    assert different == pytest.approx(np.log(1 + num_negatives), abs=0.1 if coarse else 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_places_of_both_views_are_the_same(seed):
    """In an image that grows along an axis, both views have the same intensity at a place, but for scale and shift."""
    shape, size = (40, 40, 40), (16, 16, 16)
    for axis in range(3):
        image = np.broadcast_to(np.arange(40.0).reshape([-1 if a == axis else 1 for a in range(3)]), shape)
        first, second, points = draw_views(
            image[None].astype(np.float32), np.ones(shape, bool), size, np.random.default_rng(seed)
        )
        assert ((points.second >= 0) & (points.second <= 15)).all()
        values = [
            F.grid_sample(view[None], ((2 * at + 1) / 16 - 1).flip(-1)[None, :, None, None], align_corners=False)
            for view, at in ((first, points.first), (second, points.second))
        ]
        correlation = np.corrcoef(*(value.flatten().numpy() for value in values))[0, 1]
        assert correlation > 0.95  # noise; places of another draw are not related


def made_up_embedding(vectors: torch.Tensor) -> Embedding:
    """Of an image of 16^3 voxels whose coarse vectors are all alike."""
    coarse = F.normalize(torch.ones(DIMENSIONS, 2, 2, 2), dim=0)
    return Embedding(F.normalize(vectors, dim=0), coarse, np.ones((16, 16, 16), bool))


def test_a_shifted_image_is_found_with_its_shift_and_back():
    query = torch.randn(DIMENSIONS, 8, 8, 8)
    matches = find(
        made_up_embedding(query), made_up_embedding(query.roll((1, -2, 0), (1, 2, 3))), np.array([[6.5, 8.5, 4.5]])
    )
    np.testing.assert_allclose(matches.points, [[8.5, 4.5, 4.5]], atol=0.4)  # between the cells, for chance alone
    np.testing.assert_allclose(matches.similarity, [1], atol=1e-5)
    np.testing.assert_allclose(matches.cycle, [0], atol=0.5)


def test_places_between_the_cells_are_found():
    """Vectors of an image of coordinates turn with the place; what lies between two cells is most like both."""
    angles = torch.stack(torch.meshgrid(*(torch.arange(8) * 0.4 for _ in range(3)), indexing="ij"))
    vectors = torch.cat([angles.cos(), angles.sin(), torch.zeros(DIMENSIONS - 6, 8, 8, 8)])
    image = made_up_embedding(vectors)
    place = np.array([[6.0, 7.1, 8.3]])
    np.testing.assert_allclose(find(image, image, place).points, place, atol=0.1)


def test_a_match_that_does_not_lead_back_has_a_cycle_error():
    query = torch.randn(DIMENSIONS, 8, 8, 8)
    key = torch.randn(DIMENSIONS, 8, 8, 8)
    key[:, 1, 1, 1] = query[:, 3, 3, 3] + 0.3 * query[:, 7, 3, 3]
    query[:, 7, 3, 3] = key[:, 1, 1, 1]
    matches = find(made_up_embedding(query), made_up_embedding(key), np.array([[6.5, 6.5, 6.5]]))
    np.testing.assert_allclose(matches.points, [[2.5, 2.5, 2.5]], atol=0.5)
    np.testing.assert_allclose(matches.cycle, [8], atol=0.8)


def test_the_network_is_trained_once_and_only_what_is_new_is_embedded(images):
    said: list[str] = []
    store = prepare_landmarks(images, CONFIG, CPU, said.append)
    assert [line.split()[0] for line in said] == ["Training", "Embedding"]
    assert f"Embedding {len(images.partners)} images" in said[1]
    again = prepare_landmarks(images, CONFIG, CPU, said.append)
    assert (again, len(said)) == (store, 2)
    images.volumes["copy2"] = images.volumes["copy2"] + 1  # no training image
    assert prepare_landmarks(images, CONFIG, CPU, said.append) == store
    assert "Embedding 1 images" in said[2]


def test_a_training_goes_on_with_images_that_were_added_since(images):
    store, said = prepare_landmarks(images, CONFIG, CPU, ignore), []
    task = Alice.build(make_network("unetr"), AliceConfig(head_width=32, landmarks=CONFIG), TINY_CROP)
    task.landmarks.copy_(torch.tensor(list(store.identity()), dtype=torch.uint8))
    images.volumes["added"] = images.volumes["copy0"] + 1
    images.identifiers, images.partners = [*images.identifiers, "added"], [*images.partners, "added"]
    task.catch_up(images, CPU, said.append)
    assert said == [f"Embedding 1 images with the landmark network in {store.folder}"]
    assert store.embedding("added").body.any()


def test_what_is_accepted_does_not_change_the_network_but_images_and_training_do(images):
    store = LandmarkStore.of(images, CONFIG)
    assert LandmarkStore.of(images, replace(CONFIG, min_similarity=0.5, max_cycle=3.0)) == store
    assert LandmarkStore.of(images, replace(CONFIG, iterations=4)).folder != store.folder
    images.volumes["copy0"] = images.volumes["copy0"] + 1
    assert LandmarkStore.of(images, CONFIG).folder != store.folder


class Interrupted(Exception):
    pass


def test_an_interrupted_training_goes_on_and_ends_with_the_same_network(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SAVE_EVERY", 2)
    config = replace(CONFIG, iterations=4)
    whole, parts = Phantoms(tmp_path / "whole"), Phantoms(tmp_path / "parts")
    expected = weights(prepare_landmarks(whole, config, CPU, ignore))

    def stop(line: str) -> None:
        if "step 2" in line:
            raise Interrupted

    step = training._step
    steps = []
    monkeypatch.setattr(training, "_step", lambda *arguments: steps.append(0) or step(*arguments))
    with pytest.raises(Interrupted):
        prepare_landmarks(parts, config, CPU, stop)
    assert not LandmarkStore.of(parts, config).network_file.exists()
    got = weights(prepare_landmarks(parts, config, CPU, ignore))
    assert len(steps) == 2 + 4 - 2
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_large_values_stay_finite(images):
    expected = images.volumes["copy0"] * 1e6
    images.volumes["copy0"] = expected
    store = LandmarkStore.of(images, CONFIG)
    for _ in range(2):  # resampled, then read
        assert np.abs(store.image(images, "copy0")).max() == pytest.approx(np.abs(expected).max(), rel=0.1)


def test_a_training_that_diverges_ends_and_leaves_no_network(images, monkeypatch):
    monkeypatch.setattr(training, "contrast", lambda *_, **__: torch.tensor(torch.nan, requires_grad=True))
    with pytest.raises(ValueError, match="the loss of the landmark network is nan in step 1; see that images are"):
        prepare_landmarks(images, CONFIG, CPU, ignore)
    assert not LandmarkStore.of(images, CONFIG).network_file.exists()


def test_landmarks_are_prepared_on_a_disk_without_locks(images, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    said = []
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    store = prepare_landmarks(images, replace(CONFIG, iterations=1), CPU, said.append)
    assert store.network_file.is_file()
    assert said[0].startswith(f"WARNING: {store.folder} is on a disk without locks (No locks available)")


def test_pairs_depend_on_the_random_generator_alone_and_are_looked_at(prepared):
    images, store, identity = prepared
    pairs = [
        ByEmbedding(CROP, CONFIG, identity).pair(images, "copy0", np.random.default_rng(seed)) for seed in (1, 1, 2)
    ]
    assert pairs[0] == pairs[1]
    assert pairs[0] != pairs[2]
    assert pairs[0].key[0] != "copy0"
    assert (pairs[0].quality["accepted"], pairs[0].quality["tries"]) == (1, 1)
    said: list[str] = []
    inspect(ByEmbedding(CROP, CONFIG, identity), images, said.append)
    assert said[0].startswith("100% of the matches of the landmark network are accepted")
    assert (store.folder / "matches.png").stat().st_size > 0


def test_weak_matches_are_drawn_again_and_never_pass_as_accepted(prepared):
    images, _, identity = prepared
    matcher = ByEmbedding(CROP, replace(CONFIG, min_similarity=1.0, max_cycle=1e-6), identity)
    quality = matcher.pair(images, "copy0", np.random.default_rng(0)).quality
    assert (quality["accepted"], quality["tries"]) == (0, 96)


@pytest.mark.parametrize("what", ["another network", "nothing"])
def test_a_run_is_not_continued_with(what, prepared, tmp_path):
    images, store, identity = prepared
    other = Phantoms(tmp_path)
    if what == "another network":
        shutil.copytree(store.folder, tmp_path / store.folder.name)
        file = tmp_path / store.folder.name / store.network_file.name
        file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ValueError, match="does not hold the landmark network that this pre-training began with"):
        ByEmbedding(CROP, CONFIG, identity).pair(other, "copy0", np.random.default_rng(0))


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [((300, 350, 350), (1.0, 1.0, 1.0), 4), ((80, 80, 80), (1.0, 1.0, 1.0), 2), ((20, 20, 20), (1.5, 1.5, 1.5), 1.5)],
)
def test_the_spacing_fits_the_images(images, shape, spacing, expected):
    images.volumes = dict.fromkeys(images.volumes, np.zeros((1, *shape), np.int8))
    images.spacing = spacing
    assert choose_spacing(images) == pytest.approx(expected)


def test_views_are_a_part_of_the_median_image():
    assert view_size([(20, 40, 100)] * 2 + [(200, 200, 200)]) == (16, 24, 48)


def test_the_same_place_is_found_in_another_copy(tmp_path):
    """Quick, on a phantom: benchmarks/matcher.py does it on a CT."""
    images = Phantoms(tmp_path, count=4)
    store = prepare_landmarks(images, LandmarkConfig(iterations=50, batch_size=2, spacing=2.0), CPU, ignore)
    query, key = images.partners[0], images.partners[-1]  # of which the second was not seen
    rng = np.random.default_rng(0)
    scale = SPACING[0] / store.spacing
    points = np.argwhere(body(images.load(query)[0])).astype(float)
    points = points[rng.choice(len(points), 200, replace=False)]
    expected = images.placements[key].from_volume(images.placements[query].to_volume(points))
    seen = ((expected >= 0) & (expected <= np.array(images.load(key).shape[1:]) - 1)).all(axis=1)
    matches = find(store.embedding(query), store.embedding(key), (points + 0.5) * scale - 0.5)
    errors = np.linalg.norm((matches.points + 0.5) / scale - 0.5 - expected, axis=1)[seen] * SPACING[0]
    by_chance = np.linalg.norm(np.roll(expected, 1, axis=0) - expected, axis=1)[seen] * SPACING[0]
    assert np.median(errors) < 8  # mm, after seconds of training
    assert np.median(by_chance) > 25
