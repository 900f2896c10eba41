"""What is read of a fold; the rest of its folder is read in tests/commands/test_report.py."""

import os

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key
from nnunetv2.utilities.label_handling.label_handling import LabelManager

import made_up
from nnunet_topomae.files import write_json
from nnunet_topomae.nnunet.results import RawCases, read_run


def _fold(folder, edit, trainer=made_up.FINETUNER):
    """The fold of a run whose checkpoint was edited by ``edit(checkpoint)``."""
    log = made_up.finetuning_log(0) if trainer == made_up.FINETUNER else made_up.pretraining_log()
    fold = made_up.write_fold(folder, trainer, "plans", 0, log)
    file = fold / "checkpoint_final.pth"
    checkpoint = torch.load(file)
    edit(checkpoint)
    torch.save(checkpoint, file)
    return fold


def test_a_run_is_shown_as_its_most_trained_checkpoint_has_it(tmp_path):
    fold = _fold(tmp_path, lambda c: c.update(current_epoch=1))
    latest = (fold / "checkpoint_final.pth").rename(fold / "checkpoint_latest.pth")
    checkpoint = torch.load(latest)
    _plan("finetuning", seed=7)(checkpoint)
    torch.save({**checkpoint, "current_epoch": 2}, fold / "checkpoint_best.pth")
    os.utime(fold / "checkpoint_best.pth", (1, 1))
    assert read_run(fold).seed == 7


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"background": 0, "vessel": 2, "organ": 1, "ignore": 3}, {1: "organ", 2: "vessel"}),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3]}, {1: "whole", 2: "whole, core", 3: "whole, core"}),
    ],
)
def test_structures_are_named_by_value_and_regions_share_them(labels, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_topomae.nnunet.results.nnUNet_raw", str(tmp_path))
    _scribbles(tmp_path, labels)
    assert list(RawCases("Dataset997_Scribbles").structures.items()) == list(expected.items())


def test_ignored_voxels_are_no_structure_in_pictures(tmp_path, monkeypatch):
    """Else slices would be chosen for the ignored voxels."""
    monkeypatch.setattr("nnunet_topomae.nnunet.results.nnUNet_raw", str(tmp_path))
    label, predicted = _scribbles(tmp_path, {"background": 0, "organ": 1, "vessel": 2, "ignore": 3})
    shown = RawCases("Dataset997_Scribbles").read("a", predicted).label
    assert np.array_equal(shown, np.where(label == 3, 0, label))


def _scribbles(raw, labels):
    """A dataset of one case; its label, and a file in which nothing is predicted."""
    folder = raw / "Dataset997_Scribbles"
    files = {name: folder / name for name in ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "predicted.nii.gz")}
    label = np.zeros((4, 5, 6), np.uint8)
    label[1], label[2] = 1, 3
    for name, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(label if "labels" in name else label * 0), str(file))
    description = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    description["regions_class_order"] = list(range(1, len(labels)))
    write_json(description, folder / "dataset.json")
    return label, files["predicted.nii.gz"]


def _validated(fold, means, cases=()):
    """The fold with a summary as nnU-Net writes it."""
    (fold / "validation").mkdir()
    summary = {"mean": means, "foreground_mean": {"Dice": 0.5}, "metric_per_case": list(cases)}
    write_json(summary, fold / "validation" / "summary.json")
    return fold


def test_names_of_cases_end_where_the_file_ending_of_the_dataset_begins(tmp_path):
    fold = _fold(tmp_path, lambda c: c["init_args"]["dataset_json"].update(file_ending=".ct.nrrd"))
    case = {"prediction_file": "/elsewhere/1.2.840.ct.nrrd", "metrics": {"1": {"Dice": 0.5}}}
    assert read_run(_validated(fold, {}, [case])).dice == {"1.2.840": 0.5}


def test_regions_are_called_by_their_names(tmp_path):
    """The keys are made by nnU-Net's own functions, as when it validates."""
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3], "vessel": 4}
    fold = _fold(tmp_path, lambda c: c["init_args"]["dataset_json"].update(labels=labels))
    regions = LabelManager(labels, [1, 2, 3, 4]).foreground_regions
    means = {label_or_region_to_key(region): {"Dice": 0.5} for region in regions}
    shown = [name for name, _ in read_run(_validated(fold, means)).figures().rows]
    assert shown == ["whole", "core", "enhancing", "vessel", "all"]


def _plan(block, **seed):
    def edit(checkpoint):
        checkpoint["init_args"]["plans"]["configurations"]["3d_fullres"][block] = {"num_epochs": 3, **seed}

    return edit


def _of_stock_trainer(checkpoint):
    del checkpoint["finetuned_by"]
    _plan("finetuning", seed=3)(checkpoint)


@pytest.mark.parametrize(
    ("trainer", "edit", "seed"),
    [
        (made_up.FINETUNER, _plan("finetuning", seed=3), 3),
        (made_up.FINETUNER, _plan("finetuning"), 12345),
        ("TopoMAEPretrainer", _plan("pretraining", seed=0), 0),
        ("TopoMAEPretrainer", _plan("pretraining"), 12345),
        (made_up.FINETUNER, _of_stock_trainer, None),
    ],
)
def test_seeds_are_those_of_the_block_and_nnunets_own_trainers_have_none(tmp_path, trainer, edit, seed):
    assert read_run(_fold(tmp_path, edit, trainer)).seed == seed


def test_a_checkpoint_without_a_file_ending_is_refused(tmp_path):
    fold = _fold(tmp_path, lambda c: c["init_args"]["dataset_json"].pop("file_ending"))
    with pytest.raises(ValueError, match=r"checkpoint_final.pth is no checkpoint of nnU-Net: it lacks 'file_ending'"):
        read_run(fold)
