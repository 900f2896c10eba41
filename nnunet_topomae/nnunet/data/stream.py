"""The endless stream of items that a method draws from the images, so that a run can be repeated exactly."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from nnunet_topomae.methods.base import Views
from nnunet_topomae.nnunet.data.preprocessed import Cases, JoinedCases

_CASE = "case"  # key of the case's name in an item


class CaseImages:
    """The images of preprocessed cases; their labels cannot be reached.

    Args:
        cases: nnU-Net's preprocessed cases.
        spacing: mm per voxel and axis.
        cache: see :class:`nnunet_topomae.methods.base.ImageSource`.
        others: cases that items about ``cases`` may use, too.

    Raises:
        ValueError: if there is no case.
    """

    def __init__(self, cases: Cases, spacing: Sequence[float], cache: Path, others: Cases | None = None):
        if not cases.identifiers:
            raise ValueError(f"there is no case to draw crops from in {cases.source_folder}")
        self._cases = JoinedCases(others, cases) if others else cases
        self.identifiers: Sequence[str] = cases.identifiers
        self.partners: Sequence[str] = self._cases.identifiers
        self.spacing: Sequence[float] = tuple(spacing)
        self.cache = cache

    def load(self, case: str) -> Any:
        """See :meth:`nnunet_topomae.methods.base.ImageSource.load`."""
        return self._cases.load_case(case)[0]


class ItemStream(Dataset):
    """An endless stream of items. The case of item n and all that is drawn from it depend on the seed and n alone.

    So an interrupted run goes on with the very items it would have seen, whatever the number of workers.

    Args:
        views: what the method draws.
        images: the images to draw from.
        seed: integers that tell this stream from others.
        mirror: whether items may be mirrored.
    """

    def __init__(self, views: Views, images: CaseImages, seed: Sequence[int], *, mirror: bool):
        self.views, self.images, self.seed, self.mirror = views, images, tuple(seed), mirror

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Item number ``index``: the tensors that the method draws, and ``case``, the identifier."""
        rng = np.random.default_rng((*self.seed, index))
        case = self.images.identifiers[int(rng.integers(len(self.images.identifiers)))]
        return self._draw(case, rng)

    def of_case(self, case: str) -> dict[str, Any]:
        """An item of a given case, the same in every call."""
        return self._draw(case, np.random.default_rng((*self.seed, list(self.images.identifiers).index(case))))

    def _draw(self, case: str, rng: np.random.Generator) -> dict[str, Any]:
        item = self.views.draw(self.images, case, rng, self.mirror)
        for name, value in item.items():
            if name == _CASE or not isinstance(value, torch.Tensor):
                raise ValueError(
                    f'{type(self.views).__name__}.draw must give tensors under other names than "{_CASE}", got '
                    f"{name}: {type(value).__name__}"
                )
        return {**item, _CASE: case}


class StreamSampler(Sampler[int]):
    """Indices for an :class:`ItemStream`: from ``start`` on without end, or the first ``period`` over and over.

    Several processes (DDP) share the stream: process ``rank`` of ``world_size`` takes every ``world_size``-th index.
    """

    def __init__(self, start: int = 0, period: int | None = None, rank: int = 0, world_size: int = 1):
        self.start, self.period, self.rank, self.world_size = start, period, rank, world_size

    def __iter__(self) -> Iterator[int]:
        """Endless indices."""
        if self.period is None:
            return count(self.start + self.rank, self.world_size)
        return cycle(range(self.rank, self.period, self.world_size))


def endless_batches(stream: ItemStream, sampler: StreamSampler, batch_size: int, *, pin_memory: bool) -> Iterator[dict]:
    """Batches without end, prepared by as many processes as nnU-Net allows (``nnUNet_n_proc_DA``)."""
    return iter(
        DataLoader(
            stream,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=get_allowed_n_proc_DA(),
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else making the loader would change the random state that dropout uses
        )
    )


def check_finite(cases: Cases, *, show_progress: bool) -> None:
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
