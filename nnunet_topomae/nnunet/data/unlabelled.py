"""Images without labels: preprocessed like labelled cases, kept beside them, and used by pre-training only."""

import multiprocessing
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from math import prod
from pathlib import Path

from tqdm import tqdm

from nnunet_topomae.files import lock
from nnunet_topomae.nnunet.data.image_files import inspect, problems_of
from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset, files_of, open_cases
from nnunet_topomae.nnunet.data.raw import name_problem
from nnunet_topomae.nnunet.data.splits import read_splits

_LEAST_FILLED = 0.1  # of a crop
_UNFINISHED = ".unfinished_"  # begins the names of the folders in which cases are preprocessed


def find_images(folder: Path, file_ending: str, num_channels: int) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """Find images named as nnU-Net names them: CASE_0000.nii.gz, one file per channel.

    Returns:
        The files of every complete case in the order of channels, and what is wrong with every other case.

    Raises:
        ValueError: if there is no image at all.
    """
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(file_ending)}")
    cases: dict[str, dict[int, Path]] = defaultdict(dict)
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if named := pattern.fullmatch(file.name):
            cases[named[1]][int(named[2])] = file
    if not cases:
        raise ValueError(
            f"{folder} holds no image named CASE_0000{file_ending}, as the dataset's dataset.json asks for"
        )
    wanted = list(range(num_channels))
    complete = {case: [files[c] for c in wanted] for case, files in cases.items() if sorted(files) == wanted}
    incomplete = {
        case: f"has channels {sorted(files)}, but the dataset has channels {wanted}"
        for case, files in cases.items()
        if case not in complete
    }
    ill = {case: problem for case in complete if (problem := name_problem(case))}
    return {case: files for case, files in complete.items() if case not in ill}, {**incomplete, **ill}


def add(
    dataset: PlannedDataset,
    images: Path,
    configurations: Sequence[str],
    num_processes: int,
    *,
    show_progress: bool,
    warn: Callable[[str], object],
) -> tuple[dict[str, int], dict[str, str]]:
    """Check, crop, normalise and resample those images of a folder that have not been added yet, in parallel.

    What calls that were killed had not finished is removed first.

    Args:
        dataset: to add to.
        images: the folder.
        configurations: for which the images are preprocessed.
        num_processes: that work at once.
        show_progress: whether there is a progress bar.
        warn: is told if the disk has no locks.

    Returns:
        How many cases were added per configuration, and what is wrong with the others.

    Raises:
        ValueError: if there is no image, the dataset's split makes no sense, or another process is adding images for
            one of the configurations.
    """
    cases, problems = find_images(images, dataset.description["file_ending"], dataset.num_channels)
    held_out = _held_out(dataset, cases)
    problems |= held_out
    jobs: list[tuple[str, str]] = []
    with ExitStack() as locks:
        for folder in dict.fromkeys(map(dataset.unlabelled_folder, configurations)):
            locks.enter_context(lock(folder.with_name(f".{folder.name}.lock"), warn))  # nnU-Net wants no file in it
            _remove_unfinished(folder)
        for name in configurations:
            labelled, present = set(dataset.labelled_cases(name)), set(dataset.unlabelled_cases(name))
            problems |= dict.fromkeys(labelled & cases.keys(), "is the name of a labelled case")
            jobs += [(name, case) for case in sorted(cases.keys() - labelled - present - held_out.keys())]
        added, failed = _add_all(dataset, jobs, cases, num_processes, show_progress=show_progress)
    return {name: added.count(name) for name in configurations}, problems | failed


def _remove_unfinished(folder: Path) -> None:
    """Delete the folders in which processes that were killed had been preprocessing cases."""
    for unfinished in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(unfinished)


def _add_all(
    dataset: PlannedDataset,
    jobs: Sequence[tuple[str, str]],
    cases: Mapping[str, list[Path]],
    num_processes: int,
    *,
    show_progress: bool,
) -> tuple[list[str], dict[str, str]]:
    """Preprocess cases in parallel; returns the configuration of every added one, and what is wrong with the others."""
    added: list[str] = []
    problems: dict[str, str] = {}
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_add_case, dataset, name, case, cases[case]): (name, case) for name, case in jobs}
        hide = None if show_progress else True
        for future in tqdm(as_completed(running), "Adding images", len(running), leave=False, disable=hide):
            name, case = running[future]
            try:
                problem = future.result()
            except BrokenProcessPool:
                problem = "stopped with a process that was killed, probably for want of memory; use a smaller -np"
            if problem:
                problems[case] = problem
            else:
                added.append(name)
    return added, problems


def _held_out(dataset: PlannedDataset, cases: Iterable[str]) -> dict[str, str]:
    """What is wrong with cases whose patients the dataset's split holds out."""
    splits = read_splits(dataset.folder)
    return {case: what for split in splits for case, what in split.clashes(cases, [*split.val, *split.test]).items()}


def _add_case(dataset: PlannedDataset, configuration: str, case: str, files: list[Path]) -> str | None:
    """Preprocess a case, in a process of its own; returns what is wrong with it, or None."""
    reader = dataset.plans.image_reader_writer_class()
    found = {Path(file.name): inspect(file, reader) for file in files}
    if problems := problems_of(found, list(found)):
        return problems[0]
    folder = dataset.unlabelled_folder(configuration)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        settings = dataset.plans.get_configuration(configuration)
        settings.preprocessor_class(verbose=False).run_case_save(
            str(temporary / case), [str(file) for file in files], None, dataset.plans, settings, dataset.description
        )
        if problem := _too_small(open_cases(temporary, [case]).load_case(case)[0].shape[1:], settings.patch_size):
            return problem
        for file in sorted(temporary.iterdir(), reverse=True):  # the image last, as a case counts once that is there
            file.replace(folder / file.name)
    except Exception as error:  # whatever a reader or resampling raises concerns this case only
        return f"cannot be preprocessed: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(temporary)
    return None


def _too_small(shape: Sequence[int], crop_size: Sequence[int]) -> str | None:
    """Localizers and the like are no images to learn from: crops of them would be padding almost everywhere."""
    filled = prod(min(size, crop) / crop for size, crop in zip(shape, crop_size, strict=True))
    if filled >= _LEAST_FILLED:
        return None
    voxels, crop = (" x ".join(map(str, sizes)) for sizes in (shape, crop_size))
    return f"has {voxels} voxels at the spacing of the plans, which fills {filled:.1%} of a crop ({crop})"


def remove(dataset: PlannedDataset, case: str, configurations: Sequence[str]) -> None:
    """Delete an unlabelled case.

    Raises:
        ValueError: if there is none of that name.
    """
    holding = [name for name in configurations if case in dataset.unlabelled_cases(name)]
    if not holding:
        folders = " or ".join(str(dataset.unlabelled_folder(name)) for name in configurations)
        raise ValueError(f"there is no unlabelled case {case} in {folders}")
    for name in holding:
        cases = open_cases(dataset.unlabelled_folder(name), [case])
        for file in files_of(cases, case, with_label=True):  # the image first, without which a case does not count
            file.unlink()
