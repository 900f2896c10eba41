"""``splits_final.json``: the cases to train, to validate and to test on, and those whose images alone are used."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

from nnunet_topomae.files import read_json, write_json
from nnunet_topomae.nnunet.data.preprocessed import cases_in
from nnunet_topomae.nnunet.data.raw import dataset_name, read_dataset

SPLITS = "splits_final.json"  # nnU-Net's
_PARTS = ("train", "val", "test", "unlabelled")
_TRIES = 1000  # to draw other cases than before


@dataclass(frozen=True)
class Split:
    """A fold of ``splits_final.json``, of which nnU-Net reads ``train`` and ``val`` only.

    Attributes:
        train: cases to train on.
        val: cases to validate on.
        test: cases that no training touches.
        unlabelled: cases whose images pre-training draws from, and whose labels no training touches.
        patient: a regular expression; cases in whose names it finds the same text are of the same patient. None: every
            case is of another patient.
    """

    train: Sequence[str] = ()
    val: Sequence[str] = ()
    test: Sequence[str] = ()
    unlabelled: Sequence[str] = ()
    patient: str | None = None

    @property
    def images(self) -> set[str]:
        """The cases whose images pre-training draws from."""
        return {*self.train, *self.unlabelled}

    def __str__(self) -> str:
        sizes = {part: len(getattr(self, part)) for part in _PARTS}
        return ", ".join(f"{size} {part}" for part, size in sizes.items() if size)

    def patient_of(self, case: str) -> str:
        """What names the patient; the name of the case if ``patient`` finds nothing in it."""
        found = re.search(self.patient, case) if self.patient else None
        return found[0] if found else case

    def clashes(self, drawn: Iterable[str], held_out: Iterable[str]) -> dict[str, str]:
        """What is wrong with cases that are drawn from: they are held out as well, or their patient is.

        Args:
            drawn: cases that a training draws from.
            held_out: cases to validate or to test on.

        Returns:
            A phrase by the name of the case, for the ill ones only.
        """
        patients = {self.patient_of(case): case for case in held_out}
        others = {case: patients.get(self.patient_of(case)) for case in drawn}
        return {
            case: "is held out, too" if other == case else f"is of the same patient as {other}, which is held out"
            for case, other in others.items()
            if other
        }

    def check(self) -> None:
        """See that no case, and no patient, is both drawn from and held out.

        Where patients are not named, a case that is in ``train`` and ``val`` is left to nnU-Net, which warns.

        Raises:
            ValueError: names such a case.
        """
        held_out = [*self.val, *self.test]
        problems = self.clashes(self.unlabelled, held_out)
        problems |= self.clashes(self.train, held_out if self.patient else self.test)
        problems |= dict.fromkeys(set(self.train).intersection(self.unlabelled), "is in unlabelled, too")
        if problems:
            case = min(problems)
            raise ValueError(f"{case} is in {'train' if case in self.train else 'unlabelled'}, but {problems[case]}")

    def check_added(self, added: Iterable[str]) -> None:
        """See that no image that was added without its label is of a patient to validate or to test on.

        Raises:
            ValueError: names such an image.
        """
        if problems := self.clashes(added, [*self.val, *self.test]):
            case = min(problems)
            raise ValueError(
                f"the added image {case} {problems[case]}; remove it with nnUNetv2_topomae add_unlabelled --remove "
                f"{case}, or hold out other cases"
            )


def read_splits(folder: Path) -> list[Split]:
    """The folds of a preprocessed dataset; none before nnU-Net or ``nnUNetv2_topomae splits`` has written them.

    Raises:
        ValueError: if the file cannot be read, or a fold of it makes no sense.
    """
    file = folder / SPLITS
    if not file.exists():
        return []
    entries = read_json(file, list)
    if not entries:
        raise ValueError(f"{file} holds no fold; write it anew with nnUNetv2_topomae splits, or delete it")
    return [_read_split(entry, f"{file}, fold {fold}") for fold, entry in enumerate(entries)]


def _read_split(entry: Any, where: str) -> Split:
    if not isinstance(entry, Mapping) or not {"train", "val"} <= entry.keys():
        raise ValueError(f"{where} must be an object with the lists train and val, got {entry!r}")
    lists: dict[str, Any] = {part: entry.get(part, []) for part in _PARTS}
    for part, cases in lists.items():
        if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
            raise ValueError(f"{where}: {part} must be a list of names of cases, got {cases!r}")
    try:
        split = Split(**lists, patient=check_pattern(entry.get("patient")))
        split.check()
    except ValueError as error:
        raise ValueError(
            f"{where}: {error}; correct the file, or write it anew with nnUNetv2_topomae splits"
        ) from error
    return split


def read_fold(folder: Path, fold: int | str) -> Split:
    """What the split of a preprocessed dataset says about a fold.

    Where it says nothing and nnU-Net chooses the cases, all parts are empty: if there is no split yet, and for fold
    ``all`` and numbers beyond the folds of the split.

    Raises:
        ValueError: see :func:`read_splits`; for a number below 0; or if nnU-Net would choose from test or unlabelled
            cases.
    """
    if fold != "all" and int(fold) < 0:
        raise ValueError(f"there is no fold {fold}: folds are numbered from 0")
    splits = read_splits(folder)
    if fold != "all" and int(fold) < len(splits):
        return splits[int(fold)]
    for split in splits:
        if kept := [*split.test, *split.unlabelled]:
            raise ValueError(
                f"fold {fold} would train on cases that {folder / SPLITS} keeps as test or unlabelled cases, such as "
                f"{kept[0]}; use fold {' or '.join(map(str, range(len(splits))))}, or move the file away to train on "
                f"all cases"
            )
    return Split()


def check_pattern(pattern: Any) -> str | None:
    """The pattern, if it can name patients.

    Raises:
        ValueError: if it is no regular expression.
    """
    if pattern is None:
        return None
    try:
        return re.compile(pattern).pattern
    except (TypeError, re.error) as error:
        raise ValueError(f"the patient must be a regular expression, got {pattern!r}: {error}") from error


def check_patients(pattern: Any, cases: Iterable[str]) -> str | None:
    """The pattern, if it finds a patient in the name of every case.

    Raises:
        ValueError: names a case without a patient; or see :func:`check_pattern`.
    """
    pattern = check_pattern(pattern)
    if pattern and (without := [case for case in cases if not re.search(pattern, case)]):
        raise ValueError(
            f'the pattern of patients "{pattern}" finds none in the name of case {without[0]}; give one that finds the '
            f"patient in every name"
        )
    return pattern


def write_split(dataset_id: int, shares: str, seed: int, *, overwrite: bool) -> tuple[Path, list[Split]]:
    """Write one split into ``splits_final.json``, which nnU-Net reads. nnU-Net leaves the test cases in it alone.

    Args:
        dataset_id: ID of a raw dataset that has a preprocessed folder.
        shares: see :func:`part_sizes`.
        seed: cases are shuffled by it.
        overwrite: whether an existing file is replaced.

    Returns:
        The file and its split.

    Raises:
        ValueError: if there is a file already, or the shares do not fit the dataset.
        FileNotFoundError: if the dataset has no preprocessed folder.
    """
    file, cases = _open(dataset_id, overwrite=overwrite)
    sizes = part_sizes(shares, len(cases))
    shuffled = np.random.default_rng(seed).permutation(cases).tolist()
    ends = np.cumsum(sizes).tolist()
    parts: dict[str, Any] = {
        part: sorted(shuffled[end - size : end]) for part, size, end in zip(_PARTS, sizes, ends, strict=False)
    }
    return file, _write(file, [Split(**parts)])


def write_label_counts(
    dataset_id: int,
    counts: Iterable[int],
    num_val: int,
    num_test: int,
    seed: int,
    patient: str | None = None,
    *,
    overwrite: bool,
) -> tuple[Path, list[Split]]:
    """Write a fold for every number of labelled cases into ``splits_final.json``; see :func:`label_counts`.

    Args:
        dataset_id: ID of a raw dataset that has a preprocessed folder.
        counts, num_val, num_test, seed, patient: see :func:`label_counts`.
        overwrite: whether an existing file is replaced.

    Returns:
        The file and its folds.

    Raises:
        ValueError: if there is a file already, the numbers do not fit the dataset, or an image that has been added
            without its label is of a patient to validate or to test on.
        FileNotFoundError: if the dataset has no preprocessed folder.
    """
    file, cases = _open(dataset_id, overwrite=overwrite)
    splits = label_counts(cases, counts, num_val, num_test, seed, patient)
    check_all_added(file.parent, splits[0])
    return file, _write(file, splits)


def check_all_added(folder: Path, split: Split) -> None:
    """See that no image that was added to a preprocessed dataset, for any plans, is of a patient who is held out.

    Raises:
        ValueError: names such an image.
    """
    for added in sorted(folder.glob("*_unlabelled")):
        split.check_added(cases_in(added))


def _open(dataset_id: int, *, overwrite: bool) -> tuple[Path, list[str]]:
    """The file to write, and the sorted names of the cases to split."""
    name = dataset_name(dataset_id)
    folder = Path(nnUNet_preprocessed) / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; plan the dataset first")
    file = folder / SPLITS
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists already, and trainings may rest on it; add --overwrite to replace it")
    return file, sorted(read_dataset(Path(nnUNet_raw) / name)[1])


def _write(file: Path, splits: list[Split]) -> list[Split]:
    write_json(as_entries(splits), file)
    return splits


def as_entries(splits: Iterable[Split]) -> list[dict[str, Any]]:
    """Folds as they are written into ``splits_final.json``."""
    return [{key: value for key, value in asdict(split).items() if value or key in _PARTS} for split in splits]


def label_counts(
    cases: Sequence[str],
    counts: Iterable[int],
    num_val: int,
    num_test: int,
    seed: int,
    patient: str | None = None,
    num_draws: int = 1,
) -> list[Split]:
    """Folds that differ in which cases are labelled, and in nothing else.

    Validation and test cases are the same in all of them. Every other case is labelled or unlabelled. Folds of one draw
    are nested: what is labelled in a fold is labelled in the following ones, too.

    Args:
        cases: names of all cases.
        counts: numbers of labelled training cases; a fold for each, from the smallest on.
        num_val, num_test: numbers of validation and test cases.
        seed: cases are shuffled by it.
        patient: see :class:`Split`; validation and test cases are then whole patients.
        num_draws: how often the labelled cases are drawn; all folds of the first draw come first. No two draws label
            the same cases, unless there are too few cases for that.

    Raises:
        ValueError: if there are fewer cases, a name has no patient, or patients cannot be kept whole.

    Example:
        >>> folds = label_counts(list("abcdefgh"), [1, 4], num_val=1, num_test=2, seed=0)
        >>> [(len(fold.train), len(fold.val), len(fold.test), len(fold.unlabelled)) for fold in folds]
        [(1, 1, 2, 4), (4, 1, 2, 1)]
    """
    counts = sorted(set(counts))
    left = len(cases) - num_val - num_test
    if counts[-1] > left:
        raise ValueError(
            f"{counts[-1]} labelled cases, {num_val} validation and {num_test} test cases are more than the dataset's "
            f"{len(cases)} cases"
        )
    generator = np.random.default_rng(seed)
    groups = _by_patient(generator.permutation(cases).tolist(), patient)
    test = _take(groups, num_test, "--test")
    val = _take(groups, num_val, "--val")
    draws = [[case for group in groups for case in group]]
    while len(draws) < num_draws:
        known = [{*cases[: counts[0]]} for cases in draws]
        tries = (_shuffled(groups, generator) for _ in range(_TRIES))
        draws.append(next((cases for cases in tries if {*cases[: counts[0]]} not in known), draws[0]))
    return [Split(sorted(rest[:n]), val, test, sorted(rest[n:]), patient) for rest in draws for n in counts]


def _shuffled(groups: Sequence[Sequence[str]], generator: np.random.Generator) -> list[str]:
    """All cases: the groups in a random order, and the cases within each of them, too."""
    order = generator.permutation(len(groups))
    return [case for index in order for case in generator.permutation(groups[index]).tolist()]


def existing_label_counts(folder: Path, cases: Iterable[str]) -> list[Split]:
    """The folds of a preprocessed dataset, if they are such as :func:`label_counts` makes.

    A fold with no more labelled cases than the fold before it begins another draw.

    Args:
        folder: of the preprocessed dataset.
        cases: names of all its cases; some may be in no fold.

    Raises:
        FileNotFoundError: if there is no split.
        ValueError: if a fold lacks cases of some kind, names a case twice or one that there is not, folds differ in
            more than which cases are labelled, are not nested, or draws differ in their numbers of labelled cases.
    """
    file, splits, known = folder / SPLITS, read_splits(folder), set(cases)
    if not splits:
        raise FileNotFoundError(f"{file} does not exist; write it, or let the cases be drawn")
    try:
        for fold, split in enumerate(splits):
            _check_names(fold, split, known)
        for fold, (smaller, split) in enumerate(pairwise(splits), 1):
            _check_nested(fold, smaller, split)
        _check_draws(splits)
        check_patients(splits[0].patient, sorted({*splits[0].images, *splits[0].val, *splits[0].test}))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return splits


def _check_names(fold: int, split: Split, known: set[str]) -> None:
    """See that a fold has cases for every use, all of them known, and each for one use only."""
    named = [case for part in _PARTS for case in getattr(split, part)]
    if empty := [part for part in ("train", "val", "test") if not getattr(split, part)]:
        raise ValueError(f"{empty[0]} of fold {fold} has no cases; add some")
    if unknown := set(named) - known:
        raise ValueError(f"{min(unknown)} in fold {fold} is no case of the dataset; correct its name")
    if repeated := [case for case, uses in Counter(named).items() if uses > 1]:
        raise ValueError(f"{min(repeated)} is in fold {fold} twice; let every case have one use")


def _check_nested(fold: int, before: Split, split: Split) -> None:
    """See that a fold differs from the one before in which cases are labelled only, and labels those and more."""
    alike = [({*each.test}, {*each.val}, each.images, each.patient) for each in (before, split)]
    if alike[0] != alike[1]:
        raise ValueError(
            f"fold {fold} must have the test, the val and all other cases of fold {fold - 1}; folds may differ only in "
            f"which of the other cases are in train and which in unlabelled"
        )
    if len(before.train) < len(split.train) and not {*before.train} < {*split.train}:
        raise ValueError(f"train of fold {fold} must hold train of fold {fold - 1} and more cases")


def _check_draws(splits: Sequence[Split]) -> None:
    """See that all draws have the same numbers of labelled cases, and each labels other ones."""
    sizes = [len(split.train) for split in splits]
    counts = sizes[: next((fold for fold in range(1, len(sizes)) if sizes[fold] <= sizes[fold - 1]), None)]
    if sizes != counts * (len(sizes) // len(counts)):
        raise ValueError(
            f"folds have {', '.join(map(str, sizes))} labelled cases; let each draw have the numbers of the first, "
            f"{', '.join(map(str, counts))}, rising"
        )
    drawn = [{*split.train} for split in splits[:: len(counts)]]
    if repeated := [number for number, cases in enumerate(drawn) if cases in drawn[:number]]:
        raise ValueError(
            f"fold {repeated[0] * len(counts)} has the labelled cases of an earlier draw; label others in it, or "
            f"remove the folds of this draw"
        )


def _by_patient(cases: Sequence[str], patient: str | None) -> list[list[str]]:
    """Cases grouped by patient, in the order in which each patient comes first."""
    split = Split(patient=check_patients(patient, cases))
    groups: dict[str, list[str]] = {}
    for case in cases:
        groups.setdefault(split.patient_of(case), []).append(case)
    return list(groups.values())


def _take(groups: list[list[str]], size: int, option: str) -> list[str]:
    """Move whole groups out of the list, the first that fit."""
    taken: list[str] = []
    for group in list(groups):
        if len(taken) + len(group) <= size:
            taken += group
            groups.remove(group)
    if len(taken) < size:
        raise ValueError(f"{option} {size} would divide a patient; {len(taken)} does not, or try another --seed")
    return sorted(taken)


def part_sizes(shares: str, num_cases: int) -> list[int]:
    """Number of cases in each part.

    Args:
        shares: numbers of cases, "18/12" or "70/10/20", or percentages, "80:20" or "80:15:5"; for training and
            validation, and test if there are three.
        num_cases: number of cases in the dataset.

    Raises:
        ValueError: if the shares have another form, have another sum, or leave training or validation without a case.
    """
    separator = ":" if ":" in shares else "/"
    if not re.fullmatch(rf"\d+({separator}\d+){{1,2}}", shares):
        raise ValueError(
            f'shares must be numbers of cases, such as 18/12, or percentages, such as 80:15:5, got "{shares}"'
        )
    numbers = [int(number) for number in shares.split(separator)]
    total = num_cases if separator == "/" else 100
    if sum(numbers) != total:
        raise ValueError(
            f"{shares} sums to {sum(numbers)}, but "
            f"{f'the dataset has {num_cases} cases' if separator == '/' else 'percentages sum to 100'}"
        )
    ends = [round(sum(numbers[: n + 1]) / total * num_cases) for n in range(len(numbers))]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if min(sizes[:2]) < 1:
        raise ValueError(f"{shares} of {num_cases} cases leaves {sizes[0]} to train and {sizes[1]} to validate on")
    return sizes
