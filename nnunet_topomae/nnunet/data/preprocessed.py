"""Planned and preprocessed datasets: where their cases lie, and how those of several datasets are used as one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import blosc2
import numpy as np
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_topomae.files import read_json
from nnunet_topomae.nnunet.data.raw import channel_names, dataset_name

_PREPROCESSING = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
)
_IMAGE_ENDINGS, _LABEL_ENDINGS = (".b2nd", ".npy", ".npz"), ("_seg.b2nd", "_seg.npy")


class JoinedCases:
    """Preprocessed cases of several folders, to be used like those of one.

    Args:
        parts: the cases of each folder; one that is in several folders is taken from the last of them.
    """

    def __init__(self, *parts: "Cases"):
        self._part = {case: part for part in parts for case in part.identifiers}
        self.identifiers: list[str] = sorted(self._part)
        self.source_folder: str = " and ".join(sorted({str(part.source_folder) for part in parts}))

    def load_case(self, case: str) -> tuple:
        """What ``load_case`` of nnU-Net's dataset returns for that case."""
        return self._part[case].load_case(case)

    def load_image(self, case: str) -> Any:
        """See :func:`load_image`."""
        return load_image(self._part[case], case)

    def files_of(self, case: str, *, with_label: bool) -> list[Path]:
        """See :func:`files_of`."""
        return files_of(self._part[case], case, with_label=with_label)


class PrefixedCases:
    """Preprocessed cases of one folder under longer names, so that cases of several datasets stay distinct."""

    def __init__(self, cases: nnUNetBaseDataset, prefix: str):
        self._cases, self._prefix = cases, prefix
        self.identifiers = [prefix + case for case in cases.identifiers]
        self.source_folder = cases.source_folder

    def load_case(self, case: str) -> tuple:
        """What ``load_case`` of nnU-Net's dataset returns for that case."""
        return self._cases.load_case(case.removeprefix(self._prefix))

    def load_image(self, case: str) -> Any:
        """See :func:`load_image`."""
        return load_image(self._cases, case.removeprefix(self._prefix))

    def files_of(self, case: str, *, with_label: bool) -> list[Path]:
        """See :func:`files_of`."""
        return files_of(self._cases, case.removeprefix(self._prefix), with_label=with_label)


Cases: TypeAlias = nnUNetBaseDataset | JoinedCases | PrefixedCases


def load_image(cases: Cases, case: str) -> Any:
    """The image of a preprocessed case, an array (C, D, H, W) of which only what is sliced is read.

    nnU-Net's ``load_case`` would also unpickle the properties of the case, which can run code.
    """
    if isinstance(cases, nnUNetBaseDataset):
        return _open_image(Path(cases.source_folder), case)
    return cases.load_image(case)


def files_of(cases: Cases, case: str, *, with_label: bool) -> list[Path]:
    """Those files of a preprocessed case that exist: of its image, and with ``with_label`` of label and properties."""
    if not isinstance(cases, nnUNetBaseDataset):
        return cases.files_of(case, with_label=with_label)
    endings = [*_IMAGE_ENDINGS, *((*_LABEL_ENDINGS, ".pkl") if with_label else ())]
    return [file for file in (Path(cases.source_folder) / f"{case}{ending}" for ending in endings) if file.is_file()]


def _open_image(folder: Path, case: str) -> Any:
    if (file := folder / f"{case}.b2nd").is_file():
        return blosc2.open(urlpath=str(file), mode="r", dparams={"nthreads": 1}, mmap_mode="r")
    if (file := folder / f"{case}.npy").is_file():
        return np.load(file, mmap_mode="r")
    if (file := folder / f"{case}.npz").is_file():
        return np.load(file)["data"]
    raise FileNotFoundError(f"there is no image of it in {folder}")


@dataclass(frozen=True)
class PlannedDataset:
    """A dataset with plans, in nnU-Net's folder of preprocessed data.

    Attributes:
        folder: the folder of the preprocessed dataset.
        plans: its plans.
        description: the content of its dataset.json.
    """

    folder: Path
    plans: PlansManager
    description: dict

    @classmethod
    def of(cls, dataset_id: int, plans_name: str) -> "PlannedDataset":
        """Find plans, dataset.json and fingerprint.

        Raises:
            FileNotFoundError: if one is missing, or the dataset.
            ValueError: if several datasets have that ID.
        """
        folder = Path(nnUNet_preprocessed) / dataset_name(dataset_id)
        for file in (folder / f"{plans_name}.json", folder / "dataset.json", folder / "dataset_fingerprint.json"):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} does not exist; plan the dataset with nnUNetv2_topomae plan_and_preprocess "
                    f"-d {dataset_id}, or bring plans from another one with nnUNetv2_move_plans_between_datasets and "
                    "copy dataset.json and dataset_fingerprint.json from it"
                )
        plans = PlansManager(read_json(folder / f"{plans_name}.json"))
        return cls(folder, plans, read_json(folder / "dataset.json"))

    @property
    def num_channels(self) -> int:
        """Number of channels of its images."""
        return len(channel_names(self.description))

    def configurations(self, names: Sequence[str] | None) -> list[str]:
        """The 3D configurations asked for; by default all that can be pre-trained, which the cascade cannot.

        Raises:
            ValueError: names a configuration that the plans do not have.
        """
        available = [
            name
            for name in self.plans.available_configurations
            if not name.startswith("2d") and self.plans.get_configuration(name).previous_stage_name is None
        ]
        unknown = [name for name in names or () if name not in available]
        if unknown:
            raise ValueError(
                f"{self.plans.plans_name} has no 3D configuration {unknown[0]}; it has {', '.join(available)}"
            )
        return list(names or available)

    def labelled_folder(self, configuration: str) -> Path:
        """Folder of the cases that nnU-Net preprocessed."""
        return self.folder / self.plans.get_configuration(configuration).data_identifier

    def unlabelled_folder(self, configuration: str) -> Path:
        """Folder of the cases without labels, beside that of labelled cases; nnU-Net's own trainers do not see it."""
        folder = self.labelled_folder(configuration)
        return folder.with_name(f"{folder.name}_unlabelled")

    def cache_folder(self, configuration: str) -> Path:
        """Folder of what methods compute from these images and use again, beside that of labelled cases."""
        folder = self.labelled_folder(configuration)
        return folder.with_name(f"{folder.name}_cache")

    def labelled_cases(self, configuration: str) -> list[str]:
        """Names of the labelled cases, sorted."""
        return cases_in(self.labelled_folder(configuration))

    def unlabelled_cases(self, configuration: str) -> list[str]:
        """Names of the cases without labels, sorted."""
        return cases_in(self.unlabelled_folder(configuration))

    def open_all(self, configuration: str) -> list[Cases]:
        """Labelled and unlabelled cases under the names ``DatasetXXX_Name/CASE``.

        Raises:
            ValueError: if there is none.
        """
        folders = {
            self.labelled_folder(configuration): self.labelled_cases(configuration),
            self.unlabelled_folder(configuration): self.unlabelled_cases(configuration),
        }
        if not any(folders.values()):
            raise ValueError(
                f"{self.folder.name}, which pretraining.datasets names, has no preprocessed case of {configuration}; "
                f"preprocess it with nnUNetv2_preprocess -d {self.folder.name} -plans_name {self.plans.plans_name} "
                f"-c {configuration}"
            )
        prefix = f"{self.folder.name}/"
        return [PrefixedCases(open_cases(folder, cases), prefix) for folder, cases in folders.items() if cases]

    def open_others(self, numbers: Iterable[int], plans: str | None, configuration: str) -> list[Cases]:
        """All cases of other datasets, preprocessed like this one, under the names ``DatasetXXX_Name/CASE``.

        Args:
            numbers: their IDs; that of this dataset is left out.
            plans: name of their plans; None: that of the plans of this dataset.
            configuration: of these plans.

        Raises:
            FileNotFoundError: if a dataset has no such plans.
            ValueError: if one has no preprocessed case, or was preprocessed differently.
        """
        found: list[Cases] = []
        for number in numbers:
            other = PlannedDataset.of(number, plans or self.plans.plans_name)
            if other.folder != self.folder:
                self.check_same_preprocessing(other, configuration)
                found += other.open_all(configuration)
        return found

    def preprocessing(self, configuration: str) -> dict[str, Any]:
        """Everything in the plans that decides what preprocessed images look like, by the names that nnU-Net has."""
        settings = self.plans.get_configuration(configuration).configuration
        described = {key: settings[key] for key in _PREPROCESSING}
        described["transpose_forward"] = self.plans.transpose_forward
        if CTNormalization.__name__ in settings["normalization_schemes"]:
            key = "foreground_intensity_properties_per_channel"
            described[key] = getattr(self.plans, key)
        return described

    def check_same_preprocessing(self, other: "PlannedDataset", configuration: str) -> None:
        """Make sure that images of both datasets were preprocessed alike.

        Raises:
            ValueError: names the first difference and what to do.
        """
        if difference := self.preprocessing_difference(other, configuration):
            raise ValueError(
                f"{other.folder.name} was not preprocessed like {self.folder.name}: {difference}; bring the plans "
                f"there with nnUNetv2_move_plans_between_datasets -s {self.folder.name} -t {other.folder.name} "
                f"-sp {other.plans.plans_name}, preprocess it with nnUNetv2_preprocess, or leave it out of "
                f"pretraining.datasets"
            )

    def preprocessing_difference(self, other: "PlannedDataset", configuration: str) -> str:
        """What differs first between the preprocessing of two plans, in words; empty if nothing does."""
        own, others = ({**d.preprocessing(configuration), "channels": d.num_channels} for d in (self, other))
        different = (
            f"{key} is {others[key]} there, {value} here" for key, value in own.items() if others[key] != value
        )
        return next(different, "")


def cases_in(folder: Path) -> list[str]:
    """Names of the cases in a preprocessed folder; none if there is no such folder."""
    if not folder.is_dir() or not any(folder.glob("*.pkl")):
        return []
    return sorted(infer_dataset_class(str(folder)).get_identifiers(str(folder)))


def open_cases(folder: Path, cases: Sequence[str]) -> nnUNetBaseDataset:
    """nnU-Net's access to some cases of a preprocessed folder."""
    return infer_dataset_class(str(folder))(str(folder), cases)
