from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from nnunet_topomae.reporting.charts import styles
from nnunet_topomae.reporting.runs import (
    Drawn,
    Run,
    course_charts,
    loss_charts,
    pictures,
    runs_table,
    settings_table,
    validation_boxes,
)

NAN = float("nan")
TIMES = {"epoch_start_timestamps": [100.0, 1900.0, 3700.0], "epoch_end_timestamps": [1900.0, 3700.0]}  # two are over
BRANCHES = {"vit": "ViT", "unetrpp": "UNETR++"}


def _pretraining(folder, title="pre-training", **changes):
    log = {
        "train_losses": [2.0, 1.0],
        "val_losses": [2.5, 1.5],
        "train_vit_mse": [0.5, 0.25],
        "val_vit_mse": [0.75, 0.5],
        "skill_vit": [-9.0, 0.5],
        "lrs": [0.01, 0.001],
        **TIMES,
    }
    means = {"vit": {"skill": 0.5, "MSE": 0.125}, "unetrpp": {"skill": None, "MSE": NAN}, "inpainting": {"MSE": 0.25}}
    summary = {"mean": means, "metric_per_case": [{}, {}, {}]}
    parts = {"log": log, "summary": summary, "settings": {}, "seed": 7, "headings": BRANCHES, **changes}
    return Run(folder, title, "TopoMAEPretrainer", "Dataset001_A", "plans", "3d_fullres", "0", **parts)


def _finetuning(folder, title="fine-tuning", dice=((0.5, 0.75), (1.0, NAN), (NAN, NAN)), **changes):
    log = {"train_losses": [0.5, -0.5], "val_losses": [0.75, -0.25], "mean_fg_dice": [0.1, 0.6], **TIMES}
    cases = [
        {"prediction_file": f"/elsewhere/case_{n}.nii.gz", "metrics": {"1": {"Dice": a, "TP": 5}, "2": {"Dice": b}}}
        for n, (a, b) in enumerate(dice)
    ]
    means = {"mean": {"1": {"Dice": 0.75, "IoU": 0.5, "TP": 5}, "2": {"Dice": 0.75}}, "foreground_mean": {"Dice": 0.8}}
    summary = {**means, "metric_per_case": cases}
    labels = {"1": "organ", "2": "tube"}
    parts = {"log": log, "summary": summary, "settings": {}, "seed": 3, "headings": labels, **changes}
    return Run(folder, title, "FusedFinetuneTrainer", "Dataset001_A", "plans", "3d_fullres", "0", **parts)


def _drawn(*runs):
    return [Drawn(run, style) for run, style in zip(runs, styles([run.title for run in runs]).values(), strict=True)]


def test_epochs_that_are_over_count(tmp_path):
    run = _pretraining(tmp_path)
    assert run.seconds == [1800, 1800]
    assert run.hours == 1


def test_dice_of_a_case_is_the_mean_of_its_defined_structures(tmp_path):
    assert _finetuning(tmp_path).dice == {"case_0": 0.625, "case_1": 1.0}


@pytest.mark.parametrize(
    ("files", "file_ending", "cases"),
    [
        (("1.2.840.1.nii.gz", "1.2.840.2.nii.gz"), ".nii.gz", {"1.2.840.1", "1.2.840.2"}),
        (("a.b.nrrd", "a.c.nrrd"), ".nrrd", {"a.b", "a.c"}),
    ],
)
def test_cases_with_dots_in_their_names_stay_distinct(tmp_path, files, file_ending, cases):
    listed = [{"prediction_file": f"/elsewhere/{file}", "metrics": {"1": {"Dice": 0.5}}} for file in files]
    run = _finetuning(tmp_path, summary={"metric_per_case": listed}, file_ending=file_ending)
    assert run.dice == dict.fromkeys(cases, 0.5)


@pytest.mark.parametrize(
    ("make", "changes", "expected"),
    [
        (_pretraining, {}, "pre-training: skill of ViT 0.50 (0: has learned nothing, 1: perfect)."),
        (_pretraining, {"summary": {}}, "pre-training: not validated yet, 2 epochs so far."),
        (_pretraining, {"summary": {"mean": {}}}, "pre-training: finished."),
        (_finetuning, {}, "fine-tuning: Dice 0.8125 over 2 validation cases."),
        (_finetuning, {"dice": [(NAN, NAN)]}, "fine-tuning: Dice – over 0 validation cases."),
        (_finetuning, {"summary": {}}, "fine-tuning: not validated yet, 2 epochs so far."),
    ],
)
def test_what_a_run_has_come_to(tmp_path, make, changes, expected):
    assert make(tmp_path, **changes).outcome() == expected


def test_figures_of_validation(tmp_path):
    table = _pretraining(tmp_path).figures()
    assert table.header == ["network", "skill", "MSE"]
    assert table.rows == [["ViT", "0.5", "0.125"], ["UNETR++", "–", "–"], ["inpainting", "–", "0.25"]]
    assert table.note == "Validation cases: 3. The figures are means."
    table = _finetuning(tmp_path).figures()
    assert table.header == ["structure", "Dice", "IoU"]  # numbers of voxels are left out
    assert table.rows == [["organ", "0.75", "0.5"], ["tube", "0.75", "–"], ["all", "0.8", "–"]]
    assert _finetuning(tmp_path, summary={}).figures() is None


def test_every_term_of_the_loss_has_a_chart(tmp_path):
    found = loss_charts("Losses", _drawn(_pretraining(tmp_path)))
    assert [chart.alt for chart in found.charts] == [
        "total loss by epoch. training: 2 to 1 in 2 epochs; validation: 2.5 to 1.5 in 2 epochs",
        "ViT: mse by epoch. training: 0.5 to 0.25 in 2 epochs; validation: 0.75 to 0.5 in 2 epochs",
    ]
    assert [style.label for style in found.legend] == ["training", "validation"]
    several = loss_charts("Losses", _drawn(_pretraining(tmp_path, "one"), _pretraining(tmp_path, "two")))
    assert several.charts[0].alt.count(" to ") == 4
    assert "two, validation: 2.5 to 1.5 in 2 epochs" in several.charts[0].alt
    assert [style.label for style in several.legend] == ["one", "two"]


def test_course_of_a_run(tmp_path):
    found = course_charts("Course", _drawn(_pretraining(tmp_path)))
    assert [chart.alt for chart in found.charts] == [
        "skill of ViT by epoch. pre-training: -9 to 0.5 in 2 epochs",
        "learning rate by epoch. pre-training: 0.01 to 0.001 in 2 epochs",
        "seconds per epoch by epoch. pre-training: 1.8e+03 to 1.8e+03 in 2 epochs",
    ]
    assert found.note.startswith("Skill: 0 is as good as inpainting that learns nothing")
    found = course_charts("Course", _drawn(_finetuning(tmp_path)))
    assert found.charts[0].alt == "pseudo Dice in validation by epoch. fine-tuning: 0.1 to 0.6 in 2 epochs"
    assert found.note == ""


def test_boxes_of_validation_cases(tmp_path):
    empty = _finetuning(tmp_path, "empty", dice=[(NAN, NAN)])
    (chart,) = validation_boxes(_drawn(_finetuning(tmp_path), empty)).charts
    assert chart.alt.endswith("fine-tuning: median 0.812, 0.625 to 1")
    assert validation_boxes(_drawn(empty)).charts == []


def test_what_runs_have_in_common_is_said_once(tmp_path):
    made_with = {"torch": "2.9.0", "device": "NVIDIA H100"}
    first = _pretraining(tmp_path, made_with=made_with)
    second = _finetuning(tmp_path, made_with={**made_with, "torch": "2.8.0"})
    table = runs_table([first, second])
    assert table.header == ["run", "trainer", "seed", "hours", "torch"]
    assert table.rows == [
        ["pre-training", "TopoMAEPretrainer", "7", "1.00", "2.9.0"],
        ["fine-tuning", "FusedFinetuneTrainer", "3", "1.00", "2.8.0"],
    ]
    assert table.note == (
        "2.00 hours in all. All runs: dataset Dataset001_A, plans plans, configuration 3d_fullres, fold 0, epochs 2, "
        "device NVIDIA H100."
    )


def test_a_trainer_without_a_seed_has_a_dash(tmp_path):
    runs = _finetuning(tmp_path, "one", seed=0), _finetuning(tmp_path, "two", seed=None)
    table = runs_table(runs)
    assert table.header[:2] == ["run", "seed"]
    assert [row[:2] for row in table.rows] == [["one", "0"], ["two", "–"]]


def test_settings_that_differ(tmp_path):
    first = _finetuning(tmp_path, "one", settings={"patch_size": [8, 8], "finetuning.base_lr": 0.1, "batch_size": 2})
    second = _finetuning(tmp_path, "two", settings={"patch_size": [8, 16], "batch_size": 2})
    table = settings_table([first, second])
    assert table.header == ["setting", "one", "two"]
    assert table.rows == [["patch_size", "8, 8", "8, 16"], ["finetuning.base_lr", "0.1", "–"]]
    assert settings_table([first, first]) is None


def test_pictures_of_a_pretraining_keep_their_colours(tmp_path):
    (tmp_path / "validation").mkdir()
    pixels = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (50, 1, 3))
    pixels[20:30, 50:100] = (0, 120, 255)
    Image.fromarray(pixels).save(tmp_path / "validation" / "reconstructions.png")
    (found,) = pictures(_pretraining(tmp_path))
    assert found.title == "Reconstructions of validation cases: pre-training"
    (picture,) = found.pictures
    shown = np.asarray(Image.open(BytesIO(picture.png)).convert("RGB")).astype(int)
    assert np.abs(shown - pixels).max() <= 8
    assert "what the networks saw of it" in picture.alt
