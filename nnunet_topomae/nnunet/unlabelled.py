"""Images without labels: preprocessed like nnU-Net's cases, kept beside them, used by pre-training alone."""

import multiprocessing
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunet_topomae.nnunet.images import defect_of


def unlabelled_folder(dataset_folder: Path, configuration: ConfigurationManager) -> Path:
    """Beside the folder of labelled cases, out of sight of nnU-Net's own trainers."""
    return dataset_folder / f"{configuration.data_identifier}_unlabelled"


def unlabelled_cases(folder: Path) -> list[str]:
    """Cases in a folder of unlabelled images, sorted; none if there is no such folder."""
    if not folder.is_dir() or not any(folder.glob("*.pkl")):
        return []
    return sorted(infer_dataset_class(str(folder)).get_identifiers(str(folder)))


@dataclass(frozen=True)
class Target:
    """A planned dataset that takes unlabelled images.

    Attributes:
        folder: of the preprocessed dataset.
        plans: read from it.
        plans_name: file name without ending.
        description: its dataset.json.
    """

    folder: Path
    plans: PlansManager
    plans_name: str
    description: dict

    @classmethod
    def of(cls, dataset_id: int, plans_name: str) -> "Target":
        """Find plans, dataset.json and fingerprint.

        Raises:
            FileNotFoundError: if one is missing.
        """
        folder = Path(nnUNet_preprocessed) / convert_id_to_dataset_name(dataset_id)
        for file in (folder / f"{plans_name}.json", folder / "dataset.json", folder / "dataset_fingerprint.json"):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} does not exist; plan the dataset with nnUNetv2_topomae plan_and_preprocess "
                    f"-d {dataset_id}, or bring plans from another one with nnUNetv2_move_plans_between_datasets and "
                    "copy dataset.json and dataset_fingerprint.json from it"
                )
        plans = PlansManager(load_json(str(folder / f"{plans_name}.json")))
        return cls(folder, plans, plans_name, load_json(str(folder / "dataset.json")))

    def configurations(self, names: Sequence[str] | None) -> list[str]:
        """The 3D configurations asked for, by default all of the plans.

        Raises:
            ValueError: for one that the plans do not have.
        """
        available = [name for name in self.plans.available_configurations if not name.startswith("2d")]
        unknown = [name for name in names or () if name not in available]
        if unknown:
            raise ValueError(f"{self.plans_name} has no 3D configuration {unknown[0]}; it has {', '.join(available)}")
        return list(names or available)

    def folder_of(self, configuration: str) -> Path:
        """Of the unlabelled cases of a configuration."""
        return unlabelled_folder(self.folder, self.plans.get_configuration(configuration))

    def labelled_cases(self, configuration: str) -> set[str]:
        """Cases that nnU-Net preprocessed."""
        folder = self.folder / self.plans.get_configuration(configuration).data_identifier
        if not folder.is_dir() or not any(folder.glob("*.pkl")):
            return set()
        return set(infer_dataset_class(str(folder)).get_identifiers(str(folder)))


def find_images(folder: Path, file_ending: str, num_channels: int) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """Images named as nnU-Net names them, CASE_0000.nii.gz with one file a channel.

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
    return complete, incomplete


def add(
    target: Target, images: Path, configurations: Sequence[str], num_processes: int, show_progress: bool
) -> tuple[dict[str, int], dict[str, str]]:
    """Check, crop, normalise and resample images that are not there yet, in parallel.

    Returns:
        How many cases were added per configuration, and what is wrong with the others.

    Raises:
        ValueError: if there is no image.
    """
    description = target.description
    cases, problems = find_images(images, description["file_ending"], len(description["channel_names"]))
    added = dict.fromkeys(configurations, 0)
    jobs = []
    for name in configurations:
        labelled, present = target.labelled_cases(name), set(unlabelled_cases(target.folder_of(name)))
        problems |= dict.fromkeys(labelled & cases.keys(), "is the name of a labelled case")
        jobs += [(name, case) for case in sorted(cases.keys() - labelled - present)]
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        running = {
            pool.submit(_add_case, target.folder / f"{target.plans_name}.json", description, name, case, cases[case]): (
                name,
                case,
            )
            for name, case in jobs
        }
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
                added[name] += 1
    return added, problems


def _add_case(plans_file: Path, description: dict, configuration: str, case: str, files: list[Path]) -> str | None:
    """Preprocess a case, in a process of its own; what is wrong with it, or None."""
    plans = PlansManager(load_json(str(plans_file)))
    settings = plans.get_configuration(configuration)
    reader = plans.image_reader_writer_class()
    for file in files:
        if defect := defect_of(file, reader):
            return f"{file.name} {defect}"
    folder = unlabelled_folder(plans_file.parent, settings)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", dir=folder))
    try:
        preprocessor = settings.preprocessor_class(verbose=False)
        preprocessor.run_case_save(
            str(temporary / case), [str(file) for file in files], None, plans, settings, description
        )
        for file in sorted(temporary.iterdir(), reverse=True):  # last the image, by which a case is found
            file.replace(folder / file.name)
    except Exception as error:  # any error of a reader or of resampling belongs to this case, the others go on
        return f"cannot be preprocessed: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(temporary)
    return None


def remove(target: Target, case: str, configurations: Sequence[str]) -> None:
    """Delete an unlabelled case.

    Raises:
        ValueError: if there is none of that name.
    """
    folders = [target.folder_of(name) for name in configurations]
    holding = [folder for folder in folders if case in unlabelled_cases(folder)]
    if not holding:
        raise ValueError(f"there is no unlabelled case {case} in {' or '.join(map(str, folders))}")
    for folder in holding:
        for file in (folder / f"{case}.pkl", *folder.glob(f"{case}.*"), *folder.glob(f"{case}_seg.*")):
            file.unlink(missing_ok=True)
