"""Trains the landmark network on images without labels, and embeds them."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_topomae.files import take_lock, write_file
from nnunet_topomae.methods.alice.landmarks.contrast import Points, contrast
from nnunet_topomae.methods.alice.landmarks.network import COARSE_STRIDE, LandmarkNetwork
from nnunet_topomae.methods.alice.landmarks.settings import LandmarkConfig
from nnunet_topomae.methods.alice.landmarks.store import LandmarkStore
from nnunet_topomae.methods.alice.landmarks.views import draw_views
from nnunet_topomae.methods.alice.matching import body
from nnunet_topomae.methods.base import ImageSource
from nnunet_topomae.settings import to_block

_RATE, _MOMENTUM, _WEIGHT_DECAY = 0.02, 0.9, 1e-4  # SAM
_MAX_GRADIENT_NORM = 10
_LARGEST_VIEW, _SHARE = 48, 0.75  # voxels; edge of a view in edges of the median image
_SAVE_EVERY = 250
_SEED = 12345
_UNFINISHED = "training.pth"

Log = Callable[[str], None]


def prepare_landmarks(images: ImageSource, config: LandmarkConfig, device: torch.device, log: Log) -> LandmarkStore:
    """Train the network if there is none for these images and settings, and embed what has not been embedded.

    What an interrupted call has done is not done again. Several processes may call it at once: one works, the others
    wait for it.

    Args:
        images: the network is trained on ``identifiers``; ``partners`` are embedded, too.
        config: its settings.
        device: to train on.
        log: is told how it goes on.
    """
    store = LandmarkStore.of(images, config)
    store.describe({**to_block(config), "spacing": store.spacing, "images": sorted(images.identifiers)})
    with _working_alone(store, log):
        if not store.network_file.is_file():
            _train(store, images, config, device, log)
    embed_missing(store, images, device, log)
    return store


def embed_missing(store: LandmarkStore, images: ImageSource, device: torch.device, log: Log) -> None:
    """Embed those of the images that have not been, with the network of a store.

    Arguments are those of :func:`prepare_landmarks`.
    """
    with _working_alone(store, log):
        cases = {*images.identifiers, *images.partners}
        missing = [case for case in sorted(cases) if not store.has_embedding(images, case)]
        if missing:
            log(f"Embedding {len(missing)} images with the landmark network in {store.folder}")
            _embed(store, images, missing, device)


@contextmanager
def _working_alone(store: LandmarkStore, log: Log) -> Iterator[None]:
    with (store.folder / ".lock").open("ab") as stream:
        take_lock(stream, lambda said: log(f"WARNING: {said}"), wait=True)
        yield


def _train(store: LandmarkStore, images: ImageSource, config: LandmarkConfig, device: torch.device, log: Log) -> None:
    cases = sorted(images.identifiers)
    log(
        f"Training a landmark network on {len(cases)} images at {store.spacing:.3g} mm, {config.iterations} steps; "
        f"it is kept in {store.folder}"
    )
    shrunk = {case: store.image(images, case) for case in cases}
    bodies = {case: body(image[0]) for case, image in shrunk.items()}
    size = view_size([image.shape[1:] for image in shrunk.values()])
    torch.manual_seed(_SEED)
    network = LandmarkNetwork(next(iter(shrunk.values())).shape[0]).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), _RATE, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY)
    first = _restore(store.folder / _UNFINISHED, network, optimizer, device)

    def draw(iteration: int) -> tuple[Tensor, list[Points]]:
        rng = np.random.default_rng((_SEED, iteration))
        chosen = [cases[int(n)] for n in rng.integers(len(cases), size=config.batch_size)]
        firsts, seconds, points = zip(*(draw_views(shrunk[c], bodies[c], size, rng) for c in chosen), strict=True)
        return torch.stack([*firsts, *seconds]), list(points)

    losses: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(draw, first)
        for iteration in range(first, config.iterations):
            batch, points = upcoming.result()
            upcoming = pool.submit(draw, iteration + 1)
            torch.manual_seed(_SEED + iteration)  # of the negatives, so that a resumed training draws the same
            rate = _RATE * (1 + math.cos(math.pi * iteration / config.iterations)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses.append(_step(network, optimizer, batch.to(device), points, size))
            if not math.isfinite(losses[-1]):
                raise ValueError(
                    f"the loss of the landmark network is {losses[-1]} in step {iteration + 1}; see that images are "
                    f"normalised (normalization_schemes in the plans), delete {store.folder}, and start again"
                )
            if (iteration + 1) % _SAVE_EVERY == 0:
                _save({"network": network, "optimizer": optimizer}, iteration + 1, store.folder / _UNFINISHED)
                log(f"  step {iteration + 1}: loss {np.mean(losses):.3f}")
                losses.clear()
    _save({"network": network}, config.iterations, store.network_file)
    (store.folder / _UNFINISHED).unlink(missing_ok=True)


def _step(
    network: LandmarkNetwork, optimizer: torch.optim.Optimizer, batch: Tensor, points: list[Points], size: Sequence[int]
) -> float:
    points = [Points(*(each.to(batch.device) for each in both)) for both in points]
    fine, coarse = network(batch)
    shape = tuple(size)
    loss = contrast(fine, points, shape, coarse=False) + contrast(coarse, points, shape, coarse=True)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), _MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.item()


def view_size(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Voxels per axis of a view: three quarters of the median image, at most 48, a multiple of 8, at least 16."""
    median = np.median(np.array(shapes), axis=0)
    cells = (np.minimum(_SHARE * median, _LARGEST_VIEW) // COARSE_STRIDE).clip(2)
    return tuple(int(n) * COARSE_STRIDE for n in cells)


def _save(parts: dict[str, Any], iteration: int, file: Path) -> None:
    state = {**{name: part.state_dict() for name, part in parts.items()}, "iteration": iteration}
    write_file(file, lambda stream: torch.save(state, stream))


def _restore(file: Path, network: LandmarkNetwork, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Go on with a training that was interrupted; returns the steps that are done."""
    if not file.is_file():
        return 0
    state = torch.load(file, map_location=device, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return state["iteration"]


@torch.no_grad()
def _embed(store: LandmarkStore, images: ImageSource, cases: Sequence[str], device: torch.device) -> None:
    state = torch.load(store.network_file, map_location=device, weights_only=True)
    network = LandmarkNetwork(store.image(images, cases[0]).shape[0]).to(device).eval()
    network.load_state_dict(state["network"])
    for case in cases:
        image = torch.from_numpy(store.image(images, case))[None].to(device)
        missing = [-size % COARSE_STRIDE for size in image.shape[2:]]
        padded = F.pad(image, [pad for size in reversed(missing) for pad in (0, size)], mode="replicate")
        fine, coarse = network(padded)
        store.write_embedding(images, case, fine[0], coarse[0])
