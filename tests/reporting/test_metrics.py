import numpy as np
import pytest

from nnunet_topomae.reporting.metrics import mean_of, reconstruction_metrics, with_skills


def test_mse_and_psnr_count_hidden_voxels_only():
    crop = np.zeros((1, 8, 8, 8), np.float32)
    prediction = np.full_like(crop, 0.5)
    prediction[:, 4:] = 0.1
    hidden = np.zeros((1, 8, 8, 8), bool)
    hidden[:, 4:] = True
    metrics = reconstruction_metrics(crop, prediction, hidden)
    assert metrics["MSE"] == pytest.approx(0.01)
    assert metrics["PSNR"] == pytest.approx(20.0)


def test_perfect_reconstruction():
    crop = np.random.rand(2, 8, 8, 8).astype(np.float32)
    metrics = reconstruction_metrics(crop, crop, np.ones((1, 8, 8, 8), bool))
    assert metrics == {"MSE": 0.0, "PSNR": None, "SSIM": pytest.approx(1.0)}


def test_crops_too_thin_for_ssim_have_none():
    crop = np.random.rand(1, 2, 8, 8).astype(np.float32)
    assert reconstruction_metrics(crop, crop, np.ones((1, 2, 8, 8), bool))["SSIM"] is None


def test_means_leave_out_what_is_missing():
    assert mean_of([{"a": 1.0, "b": None}, {"a": 3.0, "b": None}]) == {"a": 2.0, "b": None}
    assert mean_of([{"a": None}, {"a": 3.0}]) == {"a": 3.0}


def test_no_skill_without_an_error_of_the_yardstick():
    assert with_skills({"vit": {"MSE": 1.0}}, "inpainting") == {"vit": {"MSE": 1.0}}
    assert with_skills({"vit": {"MSE": 1.0}, "inpainting": {"MSE": 0.0}}, "inpainting")["vit"] == {"MSE": 1.0}
    figures = {"vit": {"cosine": 0.3}, "inpainting": {"MSE": 2.0}}
    assert with_skills(figures, "inpainting")["vit"] == {"cosine": 0.3}
    assert with_skills({"vit": {"MSE": None}, "inpainting": {"MSE": 2.0}}, "inpainting")["vit"]["skill"] is None
