import json

import numpy as np
import pytest
from matplotlib.image import imread

from nnunet_topomae.reporting.figures import Geometry, plane_names
from nnunet_topomae.reporting.report import CaseReport, metrics_table, save_report

GEOMETRY = Geometry((1.0, 1.0, 1.0), plane_names())


def _report(mse):
    return CaseReport({"input": np.random.rand(1, 4, 5, 6).astype(np.float32)}, {"vit": {"MSE": mse, "PSNR": None}})


def test_figures_of_all_cases_and_their_means_are_saved(tmp_path):
    summary = save_report([("a", _report(0.25)), ("b", _report(0.75))], tmp_path, GEOMETRY)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["mean"] == {"vit": {"MSE": 0.5, "PSNR": None}}
    assert [record["case"] for record in summary["metric_per_case"]] == ["a", "b"]
    assert imread(tmp_path / "reconstructions.png").std() > 0


def test_skills_are_those_of_the_mean_error_not_means_of_skills(tmp_path):
    def report(mse, inpainted):
        return CaseReport({}, {"vit": {"MSE": mse}, "inpainting": {"MSE": inpainted}})

    summary = save_report([("a", report(1.0, 2.0)), ("b", report(1.0, 0.5))], tmp_path, GEOMETRY, "inpainting")
    assert [record["metrics"]["vit"]["skill"] for record in summary["metric_per_case"]] == [0.5, -1.0]
    assert summary["mean"]["vit"]["skill"] == pytest.approx(1 - 2.0 / 2.5)
    assert summary["mean"]["inpainting"]["skill"] == 0
    assert list(summary["mean"]["vit"]) == ["skill", "MSE"]


def test_a_report_without_cases_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no case to report on"):
        save_report([], tmp_path, GEOMETRY)


def test_columns_of_the_table_align():
    means = {"vit": {"MSE": 0.5, "PSNR": 12.3456}, "unknown": {"MSE": 1234567.0, "SSIM": None}}
    assert metrics_table(means, {"vit": "ViT"}) == [
        "               MSE   PSNR  SSIM",
        "ViT            0.5  12.35     -",
        "unknown  1.235e+06      -     -",
    ]
