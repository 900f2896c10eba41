"""Reading what training runs have left in nnU-Net's folder of results, and the test cases that they were tried on."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_raw

from nnunet_topomae import trainers
from nnunet_topomae.files import read_json
from nnunet_topomae.nnunet.data.raw import IGNORED, read_dataset, structures
from nnunet_topomae.nnunet.planning.plans import FINETUNING, PRETRAINING
from nnunet_topomae.nnunet.training.checkpointing import CHECKPOINTS, checkpoints_in
from nnunet_topomae.nnunet.training.pretraining import external_folders, find_pretrainer
from nnunet_topomae.nnunet.weights.checkpoints import (
    FINETUNED_BY,
    UNTRAINED,
    VERSIONS,
    most_trained_first,
    read_record,
)
from nnunet_topomae.reporting.figures import Geometry, plane_names
from nnunet_topomae.reporting.runs import Run
from nnunet_topomae.settings import FinetuningConfig, PretrainingConfig, flatten

_INTERNAL = "architecture._kw_requires_import"  # how nnU-Net reads the arguments of a network
_KEYS = ("logging", "init_args", "trainer_name")


def read_run(folder: Path, title: str = "") -> Run:
    """What a run has left in the folder of its fold.

    Args:
        folder: ``.../TRAINER__PLANS__CONFIGURATION/fold_X``.
        title: what it is called; as its folders are, if left out.

    Raises:
        ValueError: if there is no checkpoint, or a file is broken.
    """
    files = most_trained_first(checkpoints_in(folder))
    if not files:
        raise ValueError(f"{folder} holds no checkpoint ({', '.join(CHECKPOINTS)})")
    file = files[0]
    record = read_record(file)
    try:
        log, arguments, trainer = (record[key] for key in _KEYS)
        trainer = record.get(FINETUNED_BY, trainer)
        plans, configuration = arguments["plans"], arguments["configuration"]
        settings = flatten(plans["configurations"][configuration])
        description = arguments["dataset_json"]
        labels = {_key(value): name for name, value in description["labels"].items()}
        file_ending = description["file_ending"]
        names = plans["dataset_name"], plans["plans_name"], configuration, str(arguments["fold"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no checkpoint of nnU-Net: {_in_words(error)}") from error
    settings.pop(_INTERNAL, None)
    pretrainer = find_pretrainer(trainer, [trainers.FOLDER, *external_folders()])
    headings = dict(pretrainer.task_class.headings) if pretrainer else labels
    called = title or f"{trainer}, {names[1]}, fold {names[3]}"
    file = folder / "validation" / "summary.json"
    summary = read_json(file) if file.is_file() else {}
    made_with, seed = _made_with(record, folder), _seed(record, settings)
    run = Run(folder, called, trainer, *names, log, settings, summary, headings, made_with, file_ending, seed)
    try:
        run.outcome(), run.figures()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is broken: {_in_words(error)}; validate again with --val") from error
    return run


def _key(label: int | Sequence[int]) -> str:
    """The key of a label or region in nnU-Net's summary.json."""
    return str(tuple(label) if isinstance(label, Sequence) else label)


def _in_words(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _seed(record: Mapping[str, Any], settings: Mapping[str, Any]) -> int | None:
    """The seed of a run, by default that of its block; None for nnU-Net's own trainers, which take none."""
    if UNTRAINED in record:
        return settings.get(f"{PRETRAINING}.seed", PretrainingConfig.seed)
    if FINETUNED_BY in record:
        return settings.get(f"{FINETUNING}.seed", FinetuningConfig.seed)
    return None


def _made_with(record: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Versions from the checkpoint, the device from nnU-Net's debug.json."""
    file = folder / "debug.json"
    debug = read_json(file) if file.is_file() else {}
    known = dict(record.get(VERSIONS) or ({"torch": debug["torch_version"]} if "torch_version" in debug else {}))
    if "device" in debug:
        known["device"] = debug.get("gpu_name", debug["device"])
    return known


class Case(NamedTuple):
    """A case and its segmentation, as arrays (D, H, W) of one geometry; of several channels the first."""

    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.integer]
    prediction: npt.NDArray[np.integer]
    geometry: Geometry


class RawCases:
    """The cases of a raw dataset, read as nnU-Net reads them.

    Args:
        dataset: its name, such as ``Dataset004_Hippocampus``.

    Raises:
        FileNotFoundError, ValueError: if the raw dataset is not there; see
            :func:`nnunet_topomae.nnunet.data.raw.read_dataset`.
    """

    def __init__(self, dataset: str):
        self.folder = Path(nnUNet_raw) / dataset
        self.description, self._files = read_dataset(self.folder)
        first = next(iter(self._files.values()))["images"][0]
        self._reader = determine_reader_writer_from_dataset_json(self.description, first, verbose=False)()

    @staticmethod
    def are_there(dataset: str) -> bool:
        """Whether ``nnUNet_raw`` is set and has this dataset."""
        return nnUNet_raw.is_set() and (Path(nnUNet_raw) / dataset / "dataset.json").is_file()

    def __contains__(self, case: str) -> bool:
        return case in self._files

    @cached_property
    def structures(self) -> dict[int, str]:
        """Names of structures by their values in segmentations; a value in several regions has the names of all."""
        names: dict[int, list[str]] = {}
        for name, values in structures(self.description).items():
            for value in values:
                names.setdefault(value, []).append(name)
        return {value: ", ".join(each) for value, each in sorted(names.items())}

    @property
    def file_ending(self) -> str:
        """Of images and segmentations."""
        return self.description["file_ending"]

    def read(self, case: str, prediction: Path) -> Case:
        """Image and label of a case, and a segmentation of it; voxels that the label ignores count as background.

        Raises:
            FileNotFoundError: if the segmentation is not there.
            ValueError: if it has another shape than the image, so it is of another case or dataset.
        """
        if not prediction.is_file():
            raise FileNotFoundError(f"{prediction} does not exist; predict the test cases again")
        files = self._files[case]
        image, properties = self._reader.read_images(files["images"][:1])
        label, segmentation = (self._reader.read_seg(str(file))[0][0] for file in (files["label"], prediction))
        if segmentation.shape != image.shape[1:]:
            raise ValueError(
                f"{prediction} has {segmentation.shape} voxels, but {files['images'][0]} has {image.shape[1:]}; it is "
                "of another case or dataset"
            )
        ignored = self.description["labels"].get(IGNORED, 0)
        label = np.where(label == ignored, 0, label)
        return Case(image[0], label, segmentation, Geometry(properties["spacing"], plane_names()))
