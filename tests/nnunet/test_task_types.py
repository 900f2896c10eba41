"""Planning, pre-training, fine-tuning and prediction of every kind of dataset that nnU-Net knows."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_topomae.commands import cli
from nnunet_topomae.commands.demo import shrink_configuration
from nnunet_topomae.nnunet.planning.geometry import choose_patch_size
from nnunet_topomae.planners.topomae_planner import TopoMAEPlanner
from tiny import PLANNED_NETWORK, SHORT_SCHEDULE
from unplanned import trace_quickly
from workspace import Workspace

NUM_CASES = 5


@dataclass(frozen=True)
class Task:
    """A made-up dataset: nested boxes of rising intensity, in noise or in emptiness."""

    dataset_id: int
    channels: tuple[str, ...]
    labels: dict
    shape: tuple[int, int, int] = (28, 40, 40)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    crop: tuple[int, int, int] = (16, 32, 32)
    empty_outside: bool = False
    scribbles: bool = False
    expect: dict = field(default_factory=dict)  # keys of the configuration
    description: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"Dataset{self.dataset_id}_Task"

    def write(self, folder) -> None:
        for index in range(NUM_CASES):
            rng = np.random.default_rng(index)
            labels = np.zeros(self.shape, np.uint8)
            highest = max(v if isinstance(v, int) else max(v) for k, v in self.labels.items() if k != "ignore")
            for label in range(1, highest + 1):
                margin = [int(size * (0.12 + 0.1 * label)) for size in self.shape]
                labels[tuple(slice(m, size - m) for m, size in zip(margin, self.shape, strict=True))] = label
            for channel in range(len(self.channels)):
                image = (100.0 * (channel + 1) * labels + rng.normal(0, 10, self.shape)).astype(np.float32)
                if self.empty_outside:
                    image[labels == 0] = 0
                self._save(image, folder / "imagesTr" / f"case_{index}_{channel:04d}.nii.gz")
            if self.scribbles:
                labels[rng.random(self.shape) < 0.9] = self.labels["ignore"]
            self._save(labels, folder / "labelsTr" / f"case_{index}.nii.gz")
        description = {
            "channel_names": {str(n): name for n, name in enumerate(self.channels)},
            "labels": self.labels,
            "numTraining": NUM_CASES,
            "file_ending": ".nii.gz",
            **self.description,
        }
        (folder / "dataset.json").write_text(json.dumps(description))

    def _save(self, array, file) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(self.spacing[::-1])
        sitk.WriteImage(image, str(file))


TASKS = {
    "four sequences, regions, empty around the head": Task(
        961,
        ("T1", "T1ce", "T2", "FLAIR"),
        {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3},
        shape=(40, 48, 48),
        empty_outside=True,
        expect={"normalization_schemes": ["ZScoreNormalization"] * 4, "use_mask_for_norm": [True] * 4},
        description={"regions_class_order": [1, 2, 3]},
    ),
    "CT and PET, thick slices": Task(
        962,
        ("CT", "PET"),
        {"background": 0, "organ": 1},
        shape=(12, 80, 80),
        spacing=(6.0, 0.5, 0.5),
        crop=(12, 64, 64),
        expect={"normalization_schemes": ["CTNormalization", "ZScoreNormalization"]},
    ),
    "scribbles": Task(963, ("MRI",), {"background": 0, "organ": 1, "lesion": 2, "ignore": 3}, scribbles=True),
    "thinner than a patch": Task(
        964, ("MRI",), {"background": 0, "organ": 1}, shape=(7, 48, 48), spacing=(5.0, 1.0, 1.0), crop=(8, 32, 32)
    ),
}


def _shrink(task: Task, configuration: dict) -> None:
    patch = choose_patch_size(task.crop, task.spacing)
    network = {**PLANNED_NETWORK, "vit": {**PLANNED_NETWORK["vit"], "patch_size": list(patch)}}
    settings = {"pretraining": {**SHORT_SCHEDULE, "topology": {"grid": None}}, "finetuning": SHORT_SCHEDULE}
    shrink_configuration(configuration, list(task.crop), network, settings)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_from_planning_to_prediction(workspace, tmp_path, monkeypatch, task):
    trace_quickly(monkeypatch)  # the planned network is replaced by a tiny one
    raw = workspace.folder / "raw" / task.name
    task.write(raw)
    arguments = ["-d", str(task.dataset_id), "-c", "3d_fullres", "-np", "1", "-npfp", "1", "--no_pbar"]
    assert cli.main(["plan_and_preprocess", *arguments]) == 0
    space = Workspace(workspace.folder, task.name)
    plans = space.plans()
    configuration = plans["configurations"]["3d_fullres"]
    for key, value in task.expect.items():
        assert configuration[key] == value
    _shrink(task, configuration)
    (space.preprocessed / f"{TopoMAEPlanner.default_plans_name}.json").write_text(json.dumps(plans))

    pretrainer = space.trainer("TopoMAEPretrainer")
    pretrainer.run_training()
    crop = pretrainer.stream(pretrainer.get_tr_and_val_datasets()[0], 0, mirror=True)[0]["crop"]
    assert tuple(crop.shape) == (len(task.channels), *task.crop)
    assert crop.min() < 0 < crop.max()
    finetuner = space.trainer("FusedFinetuneTrainer")
    finetuner.run_training()
    assert np.isfinite(finetuner.logger.get_value("train_losses", step=-1))

    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, perform_everything_on_device=False)
    model = space.checkpoint("FusedFinetuneTrainer").parents[1]
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    images = [str(raw / "imagesTr" / f"case_0_{channel:04d}.nii.gz") for channel in range(len(task.channels))]
    predictor.predict_from_files_sequential([images], [str(tmp_path / "case_0.nii.gz")])
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "case_0.nii.gz")))
    assert predicted.shape == task.shape
    assert set(np.unique(predicted)) <= {0, 1, 2, 3}
    assert task.labels.get("ignore") not in np.unique(predicted)
