"""The ablations of MiM and Alice on phantoms, by a study with nnU-Net's own commands."""

import csv
import html
import json
import re

import pytest

from console import Site
from nnunet_topomae.commands.demo import shrink_configuration
from nnunet_topomae.commands.phantom import LABELS, write_dataset
from tiny import PLANNED_CROP, PLANNED_NETWORK, TINY_HYBRID

DATASET = "Dataset995_Phantom"
_TWO, _THREE = ["level_1_mse", "level_2_mse"], ["level_1_mse", "level_2_mse", "level_3_mse"]
_FIRST, _BOTH = ["alignment_1_2"], ["alignment_1_2", "alignment_2_3"]
TERMS = {  # what the log of a pre-training names
    "mimr1": ["level_1_mse"],
    "mimr2": _TWO,
    "mimr3": _THREE,
    "mimc12": [*_THREE, *_BOTH],
    "mimtwolevels": [*_TWO, *_FIRST],
    **{row: [*_THREE, *_BOTH] for row in ("mimvisible", "mimbyol", "mimcoarse", "mimfine", "mim")},
    "alice": ["l_r", "l_dv", "l_st", "cls_std", "pairs_accepted", "pairs_similarity", "pairs_cycle_mm"],
    "aliceposition": ["l_r", "l_dv", "l_st", "cls_std"],
    "aliceonevolume": ["l_r", "l_st", "cls_std"],
    "alicewithoutcasa": ["l_r", "l_dv", "l_st", "cls_std", "pairs_accepted", "pairs_similarity", "pairs_cycle_mm"],
}
SCRATCH = ["hybrid", "unetr"]
PATIENCE = 4 * 3600  # seconds; a quarter of an hour on a machine that does nothing else
NUM_TEST = 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"))
    site.environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "nnUNet_n_proc_DA": "0"}
    write_dataset(site.folder / "raw" / DATASET, num_training=8, num_test=0)
    cube, one, short = [[2, 2, 2]] * 3, [1, 1, 1], {"num_val_iterations_per_epoch": 1}
    hybrid = {**TINY_HYBRID, "strides": [one, *cube, one, one]}
    unetr = {"strides": [one, *cube], "vit": PLANNED_NETWORK["vit"], "taps": [0, 1], "features": 4}
    landmarks = {"iterations": 2, "batch_size": 1, "spacing": 4.0, "min_similarity": -1.0}
    for name, network, settings in (
        ("TopoMAEHybrid", hybrid, {"gamma": 2, "beta": 2, "projection_width": 16}),
        ("TopoMAEUNETR", unetr, {"landmarks": landmarks}),
    ):
        site.run(
            "nnUNetv2_topomae", "plan_and_preprocess", "-d", 995, "-c", "3d_fullres", "-np", 1, "-npfp", 1,
            "-pl", f"{name}Planner",
        )  # fmt: skip
        file = site.folder / "preprocessed" / DATASET / f"nnUNet{name}Plans.json"
        plans = json.loads(file.read_text())
        blocks = {"pretraining": {**short, **settings}, "finetuning": short}
        shrink_configuration(plans["configurations"]["3d_fullres"], PLANNED_CROP, network, blocks)
        file.write_text(json.dumps(plans))
    return site


@pytest.fixture(scope="module")
def study(site):
    """The folder of a study of all rows, which has come to its end."""
    folder = site.folder / "ablations"
    site.run(
        "nnUNetv2_topomae", "study", "new", folder, "-d", 995, "-p", "nnUNetTopoMAEHybridPlans", "--preset", "mim",
        "--rows", "unetr", *(row for row in TERMS if row.startswith("alice")), "--labelled", 4, "--val", 1,
        "--test", NUM_TEST, "--seeds", 1, "--iterations", 2, "--pretraining_iterations", 2, "--batch", 1,
    )  # fmt: skip
    site.run("nnUNetv2_topomae", "study", "run", folder, "--device", "cpu", "--processes", 1, patience=PATIENCE)
    return folder


@pytest.mark.parametrize("row", TERMS)
def test_each_row_is_pre_trained_by_its_own_terms(study, row):
    log = (study / "logs" / f"{row}_seed0_pretraining.log").read_text(errors="replace")
    epochs = re.findall(r"train: losses (\S+)(.*)", log)
    assert len(epochs) == 2
    for loss, terms in epochs:
        assert re.findall(r"([a-z]\w+) ", f"{terms} ") == TERMS[row]
        assert float(loss) > 0


def test_every_row_is_measured_and_compared_with_its_network_from_scratch(study):
    lines = list(csv.DictReader((study / "results.csv").open()))
    structures = len(LABELS) - 1
    for row in (*SCRATCH, *TERMS):
        assert sum(line["row"] == row for line in lines) == NUM_TEST * structures
    comparisons = json.loads((study / "answer.json").read_text())["comparisons"]
    assert {each["row"]: each["baseline"] for each in comparisons} == {
        row: "hybrid" if row.startswith("mim") else "unetr" for row in TERMS
    }


def test_the_page_shows_every_row(site, study):
    site.run("nnUNetv2_topomae", "study", "report", study)
    page = html.unescape((study / "report.html").read_text())
    rows = json.loads((study / "study.json").read_text())["rows"]
    assert len(rows) == len(TERMS) + len(SCRATCH)
    for row in rows:
        assert f">{row['title']}</th>" in page
