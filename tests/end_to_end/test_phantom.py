"""The README's commands on a phantom dataset, each in a fresh process."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from console import PLANS, Site
from nnunet_topomae.commands.phantom import write_dataset

DATASET = "Dataset997_Phantom"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"))
    write_dataset(site.folder / "raw" / DATASET, num_training=5, num_test=1)
    return site


def _arrays(folder):
    return {file.name: sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in sorted(folder.glob("*.nii.gz"))}


@pytest.fixture(scope="module")
def planning(site):
    """What planning prints; the site is planned with a tiny network afterwards."""
    output = site.run("nnUNetv2_topomae", "plan_and_preprocess", "-d", 997, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    site.shrink_plans(DATASET, [24, 32, 32])
    return output


@pytest.fixture(scope="module")
def pretraining(site, planning):
    """What pre-training prints."""
    return site.train(997, "TopoMAEPretrainer")


@pytest.fixture(scope="module")
def finetuning(site, pretraining):
    """What fine-tuning prints."""
    return site.train(997, "FusedFinetuneTrainer", "--npz")


def test_plan_and_preprocess_ends_with_the_next_commands(planning):
    for command in (
        'export nnUNet_extTrainer="$(nnUNetv2_topomae trainers)"',
        f"nnUNetv2_train 997 3d_fullres 0 -p {PLANS} -tr TopoMAEPretrainer",
        f"nnUNetv2_train 997 3d_fullres 0 -p {PLANS} -tr FusedFinetuneTrainer",
    ):
        assert command in planning


def test_fine_tuning_without_pretraining_is_refused(site, planning):
    output = site.train(997, "FusedFinetuneTrainer", fold=1, status=2)  # of which there is no pre-training
    assert f"nnUNetv2_train {DATASET} 3d_fullres 1 -p {PLANS} -tr TopoMAEPretrainer" in output


def test_pretraining_shows_no_progress_bar_in_a_log(site, pretraining):
    assert "Training done." in pretraining
    assert "it/s" not in pretraining
    fold = site.folder / "results" / DATASET / f"TopoMAEPretrainer__{PLANS}__3d_fullres" / "fold_0"
    assert (fold / "validation" / "summary.json").is_file()


def test_fine_tuning(finetuning):
    assert "Pre-trained weights:" in finetuning
    assert "Mean Validation Dice" in finetuning


def test_prediction_needs_no_variable_of_ours_and_survives_export(site, finetuning, monkeypatch):
    images = site.folder / "raw" / DATASET / "imagesTs"
    monkeypatch.delitem(site.environment, "nnUNet_extTrainer")
    here = _arrays(site.predict(997, images, "predicted"))
    assert len(here) == 1
    archive = site.folder / "model.zip"
    model = ("-d", 997, "-c", "3d_fullres", "-f", 0, "-p", PLANS, "-tr", "FusedFinetuneTrainer")
    site.run("nnUNetv2_export_model_to_zip", *model, "-o", archive)
    elsewhere = {"nnUNet_results": str(site.folder / "elsewhere")}
    (site.folder / "elsewhere").mkdir()
    site.run("nnUNetv2_install_pretrained_model_from_zip", archive, **elsewhere)
    there = _arrays(site.predict(997, images, "predicted_elsewhere", **elsewhere))
    assert all(np.array_equal(here[name], there[name]) for name in here)


def test_find_best_configuration(site, finetuning):
    site.run(
        "nnUNetv2_find_best_configuration", 997, "-p", PLANS, "-tr", "FusedFinetuneTrainer", "-c", "3d_fullres",
        "-f", 0, "-np", 1,
    )  # fmt: skip
    information = json.loads((site.folder / "results" / DATASET / "inference_information.json").read_text())
    assert information["best_model_or_ensemble"]["selected_model_or_models"][0]["trainer"] == "FusedFinetuneTrainer"


@pytest.fixture
def broken_trainers(site, monkeypatch):
    """An installation of our trainers that cannot be imported."""
    broken = site.folder / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "topomae_pretrainer.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.setitem(site.environment, "nnUNet_extTrainer", str(broken))


def test_stock_trainers_are_found_even_if_ours_are_broken(site, planning, broken_trainers):
    output = site.train(997, "nnUNetTrainer_5epochs", "--val", status=1)
    assert "Cannot run validation because the training is not finished yet!" in output  # so it was found and made


@pytest.mark.slow
def test_stock_trainer_starts_from_our_checkpoint(site, pretraining, broken_trainers):
    """nnUNetTrainer_1epoch is one of nnU-Net's own; it runs 250 steps."""
    weights = site.folder / "results" / DATASET / f"TopoMAEPretrainer__{PLANS}__3d_fullres/fold_0/checkpoint_final.pth"
    output = site.train(997, "nnUNetTrainer_1epoch", "-pretrained_weights", weights, "--disable_checkpointing")
    assert "vit.blocks.0.attn.qkv.weight shape" in output
    assert "Mean Validation Dice" in output


def test_case_with_nan_is_named_and_no_plans_written(site):
    dataset = site.folder / "raw" / "Dataset996_NaN"
    shutil.copytree(site.folder / "raw" / DATASET, dataset)
    file = dataset / "imagesTr" / "phantom_002_0000.nii.gz"
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(file))).astype(np.float32)
    image[5, 5, 5] = np.inf
    sitk.WriteImage(sitk.GetImageFromArray(image), str(file))
    output = site.run("nnUNetv2_topomae", "plan_and_preprocess", "-d", 996, "-npfp", 1, "--no_pbar", status=2)
    assert "Error: " in output
    assert f"{file} holds NaN or inf" in output
    assert "Traceback" not in output
    assert not list((site.folder / "preprocessed" / "Dataset996_NaN").glob("*.json"))
