"""Crops of unlabelled images with masks and key points, drawn so that a run can be repeated exactly."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from nnunet_topomae.keypoints import crop_keypoints, mirrored_start, scaled_interval
from nnunet_topomae.masking import random_patch_mask
from nnunet_topomae.nnunet.dataset import Cases

_SPATIAL_AXES = (0, 1, 2)


class CropDataset(Dataset):
    """The n-th crop of an endless stream: case, place, mirroring and mask depend on the seed and n alone.

    So an interrupted run goes on with the very crops it would have seen, whatever the number of workers.

    Args:
        cases: nnU-Net's preprocessed cases; labels are never read.
        crop_size: voxels per axis; cases smaller than that are padded with 0.
        mask_grid: patches per axis.
        mask_ratio: share of patches hidden.
        spacing: mm per voxel and axis.
        seed: of the stream, a sequence of integers.
        mirror: flip each axis with probability 1/2; key points move with the flipped volume.
    """

    def __init__(
        self,
        cases: Cases,
        crop_size: Sequence[int],
        mask_grid: Sequence[int],
        mask_ratio: float,
        spacing: Sequence[float],
        seed: Sequence[int],
        mirror: bool,
    ):
        if not cases.identifiers:
            raise ValueError(f"there is no case to draw crops from in {cases.source_folder}")
        self.cases, self.crop_size, self.mask_grid, self.mask_ratio = cases, tuple(crop_size), mask_grid, mask_ratio
        self.spacing, self.seed, self.mirror = np.asarray(spacing), tuple(seed), mirror

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Crop number ``index``.

        Returns:
            ``data`` (C, D, H, W) float32, ``mask`` (d, h, w) bool, ``keypoints`` (9, 3) in [-1, 1], ``extent`` (3,) in
            mm of the interval that key points are scaled by, and ``case``, the identifier.
        """
        rng = np.random.default_rng((*self.seed, index))
        case = self.cases.identifiers[rng.integers(len(self.cases.identifiers))]
        volume = self.cases.load_case(case)[0]
        shape = volume.shape[1:]
        start = random_start(shape, self.crop_size, rng)
        box = [[s, s + size] for s, size in zip(start, self.crop_size, strict=True)]
        crop = crop_and_pad_nd(volume, box, 0).astype(np.float32)
        axes = [axis for axis in _SPATIAL_AXES if self.mirror and rng.random() < 0.5]
        crop = np.flip(crop, [axis + 1 for axis in axes])
        start = mirrored_start(start, self.crop_size, shape, axes)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63 - 1)))
        return {
            "data": torch.from_numpy(np.ascontiguousarray(crop)),
            "mask": random_patch_mask(self.mask_grid, self.mask_ratio, generator),
            "keypoints": torch.from_numpy(crop_keypoints(start, self.crop_size, shape)),
            "extent": torch.from_numpy(scaled_interval(start, self.crop_size, shape)[1] * self.spacing),
            "case": case,
        }


def random_start(volume_shape: Sequence[int], crop_size: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    """First voxel of a crop, uniform over all places inside the volume; a volume smaller than the crop is centred."""
    return tuple(
        int(rng.integers(volume - crop + 1)) if volume >= crop else -((crop - volume) // 2)
        for volume, crop in zip(volume_shape, crop_size, strict=True)
    )


class StreamSampler(Sampler[int]):
    """Indices for a :class:`CropDataset`: from ``start`` on without end, or the first ``period`` over and over.

    Several processes (DDP) share the stream: process ``rank`` of ``world_size`` takes every ``world_size``-th index.
    """

    def __init__(self, start: int = 0, period: int | None = None, rank: int = 0, world_size: int = 1):
        self.start, self.period, self.rank, self.world_size = start, period, rank, world_size

    def __iter__(self) -> Iterator[int]:
        """Endless indices."""
        if self.period is None:
            return count(self.start + self.rank, self.world_size)
        return cycle(range(self.rank, self.period, self.world_size))


def endless_batches(dataset: CropDataset, sampler: StreamSampler, batch_size: int, pin_memory: bool) -> Iterator[dict]:
    """Batches without end, prepared by as many processes as nnU-Net allows (``nnUNet_n_proc_DA``)."""
    return iter(
        DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=get_allowed_n_proc_DA(),
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else making the loader would advance the random state of dropout
        )
    )


def check_finite(cases: Cases, show_progress: bool) -> None:
    """Read every preprocessed case once and make sure that its values are finite.

    Raises:
        ValueError: names the cases that hold NaN or inf.
    """

    def is_finite(case: str) -> bool:
        volume: npt.NDArray = cases.load_case(case)[0][:]
        return bool(np.isfinite(volume).all())

    with ThreadPoolExecutor(max_workers=max(1, get_allowed_n_proc_DA())) as pool:
        results = pool.map(is_finite, cases.identifiers)
        progress = tqdm(
            results, "Checking cases", len(cases.identifiers), leave=False, disable=None if show_progress else True
        )
        broken = [case for case, finite in zip(cases.identifiers, progress, strict=True) if not finite]
    if broken:
        raise ValueError(
            f"NaN or inf in {len(broken)} preprocessed case(s) in {cases.source_folder}: {', '.join(broken[:10])}; "
            f"repair the images, then preprocess again"
        )
