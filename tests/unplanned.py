"""A dataset that can be planned though it has no image: fingerprint and file names."""

import json

import numpy as np
import pytest

from nnunet_topomae.nnunet.planning import planner as planner_module
from nnunet_topomae.nnunet.planning.memory import GIB
from nnunet_topomae.nnunet.planning.planner import PretrainingPlanner

DATASET = "Dataset777_Planned"


def trace_quickly(patch: pytest.MonkeyPatch, pretraining: float = 1) -> None:
    """About what traces give, in place of real ones, which tests/nnunet/planning/test_memory.py has.

    Args:
        patch: undoes it.
        pretraining: how many times as much as fine-tuning a crop of pre-training takes.
    """

    def trace(sizes, factor=1.0):
        return 1.5 * GIB + 1100 * factor * sizes.batch_size * np.prod(sizes.crop_size)

    patch.setattr(planner_module, "trace_pretraining", lambda task_class, sizes: trace(sizes, pretraining))
    patch.setattr(planner_module, "trace_finetuning", trace)


def make_planner(
    tmp_path,
    monkeypatch,
    shape=(96, 128, 128),
    spacing=(1.5, 1.0, 1.0),
    channels=("CT",),
    *,
    planner_class: type[PretrainingPlanner],
    num_labels=1,
    num_cases=30,
    **kwargs,
) -> PretrainingPlanner:
    """A dataset that has a fingerprint and file names, but no image."""
    raw, preprocessed = tmp_path / "raw", tmp_path / "preprocessed"
    images, labels = raw / DATASET / "imagesTr", raw / DATASET / "labelsTr"
    for folder in (images, labels, preprocessed / DATASET):
        folder.mkdir(parents=True, exist_ok=True)
    for case in range(num_cases):
        for channel in range(len(channels)):
            (images / f"c{case:03d}_{channel:04d}.nii.gz").touch()
        (labels / f"c{case:03d}.nii.gz").touch()
    dataset = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, **{f"organ {i}": i for i in range(1, num_labels + 1)}},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
    }
    (raw / DATASET / "dataset.json").write_text(json.dumps(dataset))
    intensities = {"percentile_00_5": -175.0, "percentile_99_5": 250.0, "mean": 40.0, "std": 70.0}
    fingerprint = {
        "spacings": [list(spacing)] * num_cases,
        "shapes_after_crop": [list(shape)] * num_cases,
        "foreground_intensity_properties_per_channel": {str(i): dict(intensities) for i in range(len(channels))},
        "median_relative_size_after_cropping": 1.0,
    }
    (preprocessed / DATASET / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    monkeypatch.setenv("nnUNet_raw", str(raw))
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    return planner_class(777, **kwargs)
