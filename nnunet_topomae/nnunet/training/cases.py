"""The cases of a run: all are there, and none of them holds NaN or inf."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from nnunet_topomae.nnunet.data.checking import CheckedFiles, check_finite
from nnunet_topomae.nnunet.data.preprocessed import Cases, cases_in
from nnunet_topomae.nnunet.data.splits import SPLITS
from nnunet_topomae.nnunet.training.distribution import rank, world_size


def present(cases: Sequence[str], folder: Path, *, goes_on: bool, log: Callable[[str], None]) -> list[str]:
    """Those of some cases that are in a preprocessed folder.

    A run that goes on does without the others: so it can after a case that cannot be read was deleted.

    Args:
        cases: of the split.
        folder: of the preprocessed cases of a configuration.
        goes_on: whether the run goes on.
        log: prints a sentence.

    Raises:
        ValueError: if one is missing at the start of a run.
    """
    missing = sorted(set(cases).difference(cases_in(folder)))
    if missing:
        said = f"{missing[0]} is in {folder.parent / SPLITS}, but not in {folder}"
        if not goes_on:
            raise ValueError(f"{said}; preprocess the dataset again, or correct the split")
        log(f"WARNING: {said}; going on without {', '.join(missing)}")
    return [case for case in cases if case not in missing]


def check_together(
    cases: Cases, folder: Path, timeout: float, *, with_labels: bool, log: Callable[[str], None]
) -> None:
    """Make sure that no case holds NaN or inf; each process reads its share of those that were not read before.

    Args:
        cases: to check.
        folder: of the preprocessed dataset, where it is remembered which files were checked.
        timeout: seconds after which a case is given up.
        with_labels: whether labels are read.
        log: prints a sentence.

    Raises:
        ValueError: names the cases that hold NaN or inf, or one that cannot be read.
    """
    checked = CheckedFiles(folder, with_labels=with_labels)
    names = checked.unknown(cases)
    share = names[rank() :: world_size()]
    check_finite(cases, share, with_labels=with_labels, timeout=timeout, show_progress=rank() == 0)
    if world_size() > 1:
        dist.barrier()
    if rank() == 0:
        try:
            checked.add(cases, names)
        except OSError as error:
            log(f"WARNING: cases are checked again at the next start: {error}")
