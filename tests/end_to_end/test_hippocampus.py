"""The README's commands on real MRI, where it is there."""

import json
import os
import shutil
from pathlib import Path

import pytest

from console import PLANS, Site

DATASET = "Dataset004_Hippocampus"
DATA = Path(os.environ.get("NNUNET_TOPOMAE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "hippocampus"
NUM_CASES = 5

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real images at {DATA}; set NNUNET_TOPOMAE_TEST_DATA")


def test_plan_pretrain_finetune_predict(tmp_path):
    site = Site(tmp_path)
    raw = site.folder / "raw" / DATASET
    for kind in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / kind).mkdir(parents=True)
    files = sorted((DATA / "imagesTr").iterdir())
    for file in files[:NUM_CASES]:
        shutil.copy(file, raw / "imagesTr")
        shutil.copy(DATA / "labelsTr" / file.name.replace("_0000", ""), raw / "labelsTr")
    shutil.copy(files[NUM_CASES], raw / "imagesTs")
    description = json.loads((DATA / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": NUM_CASES}))

    site.run("nnUNetv2_topomae", "plan_and_preprocess", "-d", 4, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    plans = json.loads((site.folder / "preprocessed" / DATASET / f"{PLANS}.json").read_text())
    assert plans["configurations"]["3d_fullres"]["patch_size"] == [40, 56, 40]
    site.shrink_plans(DATASET, [40, 56, 40])  # larger than some cases, which are padded
    site.environment["nnUNet_n_proc_DA"] = "0"  # test_phantom.py has processes that prepare batches
    site.train(4, "TopoMAEPretrainer", fold="all")
    output = site.train(4, "FusedFinetuneTrainer")
    assert "fold all, which has seen the images" in output
    summary = (
        site.folder / "results" / DATASET / f"FusedFinetuneTrainer__{PLANS}__3d_fullres/fold_0/validation/summary.json"
    )
    assert 0 <= json.loads(summary.read_text())["foreground_mean"]["Dice"] <= 1
    assert len(list(site.predict(4, raw / "imagesTs", "predicted").glob("*.nii.gz"))) == 1
