"""Images at the spacing of the landmark network, and their embeddings, kept beside the preprocessed data."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from skimage.transform import resize
from torch import Tensor

from nnunet_topomae.files import read_json, write_file, write_json
from nnunet_topomae.methods.alice.landmarks.network import COARSE_STRIDE, STRIDE
from nnunet_topomae.methods.alice.landmarks.settings import LandmarkConfig
from nnunet_topomae.methods.alice.matching import body
from nnunet_topomae.methods.base import ImageSource

_RECIPE = 1  # raised when the network or its training changes, so that nothing old is used
_COARSEST, _EDGE = 4.0, 40  # mm; voxels along the mean edge of an image
_SETTINGS, _NETWORK = "settings.json", "network.pth"
_PREFIX, _NAME_BYTES = "landmarks_", 8  # of a folder; its name ends with as many bytes in hexadecimal
IDENTITY_BYTES = _NAME_BYTES + hashlib.sha256().digest_size


class Embedding(NamedTuple):
    """What the landmark network makes of an image.

    Attributes:
        fine: (128, d, h, w), a vector for every second voxel of the image as the network sees it.
        coarse: (128, ...), one for every eighth; it covers a padded image.
        body: (D, H, W) bool, voxels of the image as the network sees it that are not background.
    """

    fine: Tensor
    coarse: Tensor
    body: npt.NDArray[np.bool_]

    @property
    def padded_size(self) -> tuple[int, ...]:
        """Voxels per axis of the image once it was padded for the network."""
        return tuple(COARSE_STRIDE * cells for cells in self.coarse.shape[1:])


@dataclass(frozen=True)
class LandmarkStore:
    """A folder of one landmark network and what it needs and makes; all files in it belong together.

    Attributes:
        folder: named by what the network depends on, so another one has another folder.
        spacing: mm per voxel of the images as the network sees them.
    """

    folder: Path
    spacing: float

    @classmethod
    def of(cls, images: ImageSource, config: LandmarkConfig) -> "LandmarkStore":
        """The store for a network that is trained on ``images.identifiers``; nothing is written.

        Its name depends on the images (their shape, and the slice in their middle), their spacing, and the settings
        that training depends on.
        """
        spacing = config.spacing or choose_spacing(images)
        described = {
            "recipe": _RECIPE,
            "iterations": config.iterations,
            "batch_size": config.batch_size,
            "spacing": spacing,
            "spacing of the images": list(map(float, images.spacing)),
            "images": {case: fingerprint(images.load(case)) for case in sorted(images.identifiers)},
        }
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        return cls(images.cache / f"{_PREFIX}{digest[: 2 * _NAME_BYTES]}", spacing)

    @classmethod
    def opened(cls, cache: Path, identity: bytes) -> "LandmarkStore":
        """The store that a training began with.

        Args:
            cache: of the images.
            identity: see :meth:`identity`.

        Raises:
            ValueError: if it is not there any more, or its network is another one by now.
        """
        folder = cache / f"{_PREFIX}{identity[:_NAME_BYTES].hex()}"
        store = cls(folder, read_json(folder / _SETTINGS)["spacing"] if folder.is_dir() else 0)
        if not store.network_file.is_file() or store.identity() != identity:
            raise ValueError(
                f"{folder} does not hold the landmark network that this pre-training began with; bring the folder "
                "back, or delete the checkpoints of the pre-training to start anew"
            )
        return store

    def identity(self) -> bytes:
        """What tells this trained network from any other: the name of the folder, and a hash of the weights."""
        weights = hashlib.sha256(self.network_file.read_bytes()).digest()
        return bytes.fromhex(self.folder.name.removeprefix(_PREFIX)) + weights

    @property
    def network_file(self) -> Path:
        """The trained network; it is there once training is complete."""
        return self.folder / _NETWORK

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Make the folder, with a file that says what the network was trained with."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(dict(settings), self.folder / _SETTINGS)

    def image(self, images: ImageSource, case: str) -> npt.NDArray[np.float32]:
        """An image as the network sees it, (C, D, H, W); resampled the first time."""
        file, mark = self.folder / "images" / f"{case}.npz", fingerprint(images.load(case))
        stored = _read(file, mark, ("image",))
        if stored is None:
            volume = np.asarray(images.load(case)[:], dtype=np.float32)
            size = self.size_of(volume.shape[1:], images.spacing)
            channels = [resize(channel, size, order=1, anti_aliasing=True) for channel in volume]
            shrunk = np.stack(channels)
            fits = np.abs(shrunk).max() <= np.finfo(np.float16).max  # not always, where values are not normalised
            stored = [shrunk.astype(np.float16 if fits else np.float32)]  # rounded, as it will be read again
            _write(file, mark, image=stored[0])
        return stored[0].astype(np.float32)

    def size_of(self, shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...]:
        """Voxels per axis of an image as the network sees it."""
        return tuple(max(round(n * mm / self.spacing), 1) for n, mm in zip(shape, spacing, strict=True))

    def has_embedding(self, images: ImageSource, case: str) -> bool:
        """Whether the embedding of an image is there, and is of the image as it is now."""
        return _read(self._embedding_file(case), fingerprint(images.load(case)), ()) is not None

    def write_embedding(self, images: ImageSource, case: str, fine: Tensor, coarse: Tensor) -> None:
        """Keep what the network makes of a padded image, (128, ...) each."""
        image = self.image(images, case)
        cells = tuple(-(-voxels // STRIDE) for voxels in image.shape[1:])
        arrays = {
            "fine": fine[:, : cells[0], : cells[1], : cells[2]].half().cpu().numpy(),
            "coarse": coarse.half().cpu().numpy(),
            "body": body(image[0]),
        }
        _write(self._embedding_file(case), fingerprint(images.load(case)), **arrays)

    def embedding(self, case: str) -> Embedding:
        """The embedding of an image.

        Raises:
            FileNotFoundError: if there is none.
        """
        file = self._embedding_file(case)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist, but the matcher needs it; go on with --c, which makes what is missing"
            )
        with np.load(file) as stored:
            fine, coarse = (torch.from_numpy(stored[name]).float() for name in ("fine", "coarse"))
            return Embedding(fine, coarse, stored["body"])

    def _embedding_file(self, case: str) -> Path:
        return self.folder / "embeddings" / f"{case}.npz"


def choose_spacing(images: ImageSource) -> float:
    """4 mm, or finer if the median image would have less than 40 voxels along its mean edge, but not finer than it is.

    "Mean" is the geometric mean of the three axes.
    """
    shapes = np.array([images.load(case).shape[1:] for case in images.identifiers])
    mean_spacing = float(np.prod(images.spacing)) ** (1 / 3)
    edge = float(np.prod(np.median(shapes, axis=0))) ** (1 / 3) * mean_spacing
    return max(min(_COARSEST, edge / _EDGE), mean_spacing)


def fingerprint(volume: Any) -> str:
    """What tells an image (C, D, H, W) from another one: its shape and the slice in its middle, hashed."""
    middle = np.ascontiguousarray(volume[:, volume.shape[1] // 2])
    return hashlib.sha256(str(tuple(volume.shape)).encode() + middle.tobytes()).hexdigest()


def _read(file: Path, mark: str, names: Sequence[str]) -> list[npt.NDArray[Any]] | None:
    """Arrays of a file; None if there is no such file, or it is of another image."""
    if not file.is_file():
        return None
    with np.load(file) as stored:
        return [stored[name] for name in names] if str(stored["mark"]) == mark else None


def _write(file: Path, mark: str, **arrays: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, lambda stream: np.savez(stream, allow_pickle=False, mark=np.array(mark), **arrays))
