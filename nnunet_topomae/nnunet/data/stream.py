"""The endless streams that both stages draw from the cases, so that a run can be repeated exactly."""

import os
import pickle
import random
import re
import signal
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, cycle
from multiprocessing import active_children
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from nnunet_topomae.methods.base import Views
from nnunet_topomae.nnunet.data.preprocessed import Cases, JoinedCases, load_image

CASE = "case"  # key of the case's name in an item
_UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)
_OF_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")  # PyTorch's message
_MEND = "preprocess it again, or delete its files there and go on with --c"


class CaseError(ValueError):
    """A case that no crop can be drawn from; the message says why."""


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
        self._opened: set[str] = set()  # for the present item
        self.identifiers: Sequence[str] = cases.identifiers
        self.partners: Sequence[str] = self._cases.identifiers
        self.spacing: Sequence[float] = tuple(spacing)
        self.source_folder: str = cases.source_folder
        self.cache = cache

    def load(self, case: str) -> Any:
        """See :meth:`nnunet_topomae.methods.base.ImageSource.load`.

        Raises:
            CaseError: if the case cannot be opened.
        """
        self._opened.add(case)
        try:
            return load_image(self._cases, case)
        except _UNREADABLE as error:
            raise CaseError(_cannot_be_read(case, self.source_folder, error)) from error

    @contextmanager
    def blamed(self, case: str) -> Iterator[None]:
        """Name the case to blame for an error: one of those that were loaded if its files are ill, else ``case``.

        Args:
            case: that the item is about.

        Raises:
            CaseError: in place of an error of reading or of computing.
        """
        self._opened.clear()
        try:
            yield
        except CaseError:
            raise
        except _UNREADABLE as error:
            ill = (_defect_in_words(self._cases, each, with_label=False) for each in sorted(self._opened))
            raise CaseError(next(filter(None, ill), _fails(case, self.source_folder, error))) from error


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
        """Item number ``index``: the tensors that the method draws, and ``case``, the identifier.

        Raises:
            CaseError: if the case cannot be read, holds NaN or inf, or the method fails on it or makes such
                values of it.
        """
        return self._draw(*self._choose(index))

    def cases_of(self, index: int) -> list[str]:
        """The case of item number ``index``."""
        return [self._choose(index)[0]]

    def of_case(self, case: str) -> dict[str, Any]:
        """An item of a given case, the same in every call."""
        return self._draw(case, np.random.default_rng((*self.seed, list(self.images.identifiers).index(case))))

    def _choose(self, index: int) -> tuple[str, np.random.Generator]:
        rng = np.random.default_rng((*self.seed, index))
        return self.images.identifiers[int(rng.integers(len(self.images.identifiers)))], rng

    def _draw(self, case: str, rng: np.random.Generator) -> dict[str, Any]:
        with self.images.blamed(case):
            item = self.views.draw(self.images, case, rng, self.mirror)
            _check_finite(*item.values())
        for name, value in item.items():
            if name == CASE or not isinstance(value, torch.Tensor):
                raise ValueError(
                    f'{type(self.views).__name__}.draw must give tensors under other names than "{CASE}", got '
                    f"{name}: {type(value).__name__}"
                )
        return {**item, CASE: case}


class AugmentedItems(Dataset):
    """An endless stream of augmented items of nnU-Net. All that is random about item n depends on the seed and n alone.

    Args:
        loader: nnU-Net's loader of batches.
        batch_size: items in a batch, of which the last ones show foreground, as nnU-Net has it.
        seed: integers that tell this stream from others.
    """

    def __init__(self, loader: nnUNetDataLoader, batch_size: int, seed: Sequence[int]):
        self.loader, self.batch_size, self.seed = loader, batch_size, tuple(seed)
        loader.batch_size = batch_size
        self._oversampled = [loader.get_do_oversample(position) for position in range(batch_size)]
        loader.batch_size = 1
        _choose_by_rule(loader.transforms)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Item number ``index``: ``data`` (C, D, H, W), ``target`` as nnU-Net makes it, and ``case``.

        Raises:
            CaseError: if the case cannot be read, holds NaN or inf, or cropping or augmenting fails on it or makes such
                values of it.
        """
        self.loader.get_do_oversample = lambda _: self._oversampled[index % self.batch_size]
        cases = self.loader._data
        try:
            with random_state((*self.seed, index)):
                batch = self.loader.generate_train_batch()
            _check_finite(batch["data"])
        except _UNREADABLE as error:
            (case,) = self.cases_of(index)
            ill = _defect_in_words(cases, case, with_label=True)
            raise CaseError(ill or _fails(case, cases.source_folder, error)) from error
        (case,) = map(str, batch["keys"])
        target = batch["target"]
        targets = [scale[0] for scale in target] if isinstance(target, list) else target[0]
        return {"data": batch["data"][0], "target": targets, CASE: case}

    def cases_of(self, index: int) -> list[str]:
        """The case of item number ``index``."""
        with random_state((*self.seed, index)):
            return [str(case) for case in self.loader.get_indices()]


def _check_finite(*values: Any) -> None:
    """Look for NaN and inf in the tensors among some values; a file may have them, or what was made of it.

    Raises:
        ValueError: if there are any.
    """
    if not all(bool(value.isfinite().all()) for value in values if isinstance(value, torch.Tensor)):
        raise ValueError("what was made of its image holds NaN or inf")


def _choose_by_rule(transform: BasicTransform) -> None:
    """Let images be blurred in one way: of two that round differently nnU-Net takes the one that it finds faster."""
    if isinstance(transform, GaussianBlurTransform):
        transform.benchmark = False
    for part in (*getattr(transform, "transforms", ()), getattr(transform, "transform", None)):
        if part is not None:
            _choose_by_rule(part)


class StreamSampler(Sampler[int]):
    """Indices for a stream: from ``start`` on without end, or the first ``period`` over and over.

    Several processes (DDP) share the stream: process ``rank`` of ``world_size`` takes every ``world_size``-th index.
    """

    def __init__(self, start: int = 0, period: int | None = None, rank: int = 0, world_size: int = 1):
        self.start, self.period, self.rank, self.world_size = start, period, rank, world_size

    def __iter__(self) -> Iterator[int]:
        """Endless indices."""
        if self.period is None:
            return count(self.start + self.rank, self.world_size)
        return cycle(range(self.rank, self.period, self.world_size))


class Stream(Protocol):
    """Items by their number, each made of some cases; making one may raise a :class:`CaseError`."""

    def __getitem__(self, index: int) -> Any: ...

    def cases_of(self, index: int) -> list[str]:
        """Names of the cases that an item is made of."""


class Batches(Iterator[dict]):
    """Batches of a stream, prepared by as many processes as nnU-Net allows (``nnUNet_n_proc_DA``).

    Args:
        stream: of items.
        sampler: which of them, in their order.
        batch_size: items in a batch; None for single items as they are.
        validation: whether the batches are for validation, to which nnU-Net gives half as many processes.
        timeout: seconds after which a batch is given up, as the disk does not answer.
        pin_memory: whether batches are put where a GPU can copy them from.
    """

    def __init__(
        self,
        stream: Stream,
        sampler: Sampler[int] | Sequence[int],
        batch_size: int | None,
        *,
        validation: bool = False,
        timeout: float = 300,
        pin_memory: bool = False,
    ):
        allowed = get_allowed_n_proc_DA()
        workers = max(allowed // 2, min(allowed, 1)) if validation else allowed
        self._stream, self._timeout = stream, timeout
        self._now = torch.full((max(workers, 1), 2), -1, dtype=torch.int64).share_memory_()
        loader = DataLoader(
            _Watched(stream, self._now),
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            pin_memory=pin_memory,
            timeout=timeout if workers else 0,
            collate_fn=_item if batch_size is None else _collate,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # else making the loader would change the random state that dropout uses
        )
        self._batches = iter(loader)
        Finalize(None, end_children, exitpriority=0)  # before Python waits for them at its end

    def __next__(self) -> Any:
        """The next batch.

        Raises:
            ValueError: names the cases that could not be read, or that a process read when it died or did not answer.
        """
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            raise self.explained(error) from error
        if isinstance(batch, _Failure):
            raise CaseError(batch.said)
        return batch

    def explained(self, error: RuntimeError) -> Exception:
        """An error of the loader with the names of the cases; any other one as it is."""
        said = str(error)
        dead = _OF_WORKER.search(said)
        if dead is None and not said.startswith("DataLoader timed out"):
            return error
        pids = set(map(int, dead[1].split(","))) if dead else set(self._now[:, 0].tolist())
        if pids.isdisjoint(self._now[:, 0].tolist()):
            return error
        reading = [index for pid, index in self._now.tolist() if index >= 0 and pid in pids]
        cases = sorted({case for index in reading for case in self._stream.cases_of(index)})
        what = f"died ({said.splitlines()[0].rstrip('. ')})" if dead else f"did not answer for {self._timeout:g} s"
        reads = f" while it read case {' or '.join(cases)}" if cases else ""
        return ValueError(
            f"a process that prepares batches {what}{reads}; look at the disk, at the memory and at this case, then go "
            f"on with --c"
        )


class _Failure:
    """Travels in place of an item that could not be made."""

    def __init__(self, said: str):
        self.said = said


class _Watched(Dataset):
    """Notes which item each process is about to make, so that the case can be named if the process does not return."""

    def __init__(self, stream: Stream, now: torch.Tensor):
        self._stream, self._now = stream, now

    def __getitem__(self, index: int) -> Any:
        worker = get_worker_info()
        row = self._now[worker.id if worker else 0]
        row[0], row[1] = os.getpid(), index
        try:
            item = self._stream[index]
        except CaseError as error:
            item = _Failure(str(error))
        row[1] = -1
        return item


def _item(item: Any) -> Any:
    return item


def _collate(items: list) -> Any:
    failure = next((item for item in items if isinstance(item, _Failure)), None)
    return failure or default_collate(items)


def _outlive_signals(_: int) -> None:
    """Schedulers signal all processes of a job, and the training decides itself when its loaders may end."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end_children() -> None:
    """End the processes that prepare batches: one that waits for a disk would keep this one from ending, too."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would take their end for a failure
    for child in active_children():
        if child.daemon:
            child.kill()


@contextmanager
def random_state(seed: Sequence[int]) -> Iterator[None]:
    """Seed all generators on the CPU that augmentation uses, and put them back afterwards."""
    states = random.getstate(), np.random.get_state()
    words = np.random.SeedSequence(seed).generate_state(4)
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(int(words[0]))
            np.random.seed(words[1])
            torch.manual_seed(int(words[2]) << 32 | int(words[3]))
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def defect(cases: Cases, case: str, *, with_label: bool) -> str | bool:
    """What is wrong with a preprocessed case: True if its image holds NaN or inf, a sentence if it cannot be read.

    Args:
        cases: that it is one of.
        case: its name.
        with_label: whether its label and properties are read, too.
    """
    try:
        finite = bool(np.isfinite(np.asarray(load_image(cases, case)[:])).all())
        if with_label:
            _ = cases.load_case(case)[1][:]
    except _UNREADABLE as error:
        return _cannot_be_read(case, cases.source_folder, error)
    return not finite


def _defect_in_words(cases: Cases, case: str, *, with_label: bool) -> str:
    """See :func:`defect`; always a sentence, empty if nothing is wrong."""
    found = defect(cases, case, with_label=with_label)
    return _not_finite(case, cases.source_folder) if found is True else found or ""


def _fails(case: str, folder: str, error: Exception) -> str:
    return f"case {case} in {folder}, whose files can be read, gives no crop: {type(error).__name__}: {error}"


def _cannot_be_read(case: str, folder: str, error: Exception) -> str:
    return f"case {case} in {folder} cannot be read: {type(error).__name__}: {error}; {_MEND}"


def _not_finite(case: str, folder: str) -> str:
    return f"case {case} in {folder} now holds NaN or inf, which it did not at the start; {_MEND}"
