"""The preset table6 on phantoms with nnU-Net's own commands, killed three times; the table by other tools, too."""

import csv
import html
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import SimpleITK as sitk
import surface_distance

from console import Site
from nnunet_topomae.commands.phantom import LABELS, SPACING, write_dataset
from workspace import snapshot

DATASET = "Dataset995_Phantom"
ROWS = ["unetrpp", "vit", "spatial", "topology", "copretrained"]
NUM_TEST, PATIENCE = 3, 7200  # seconds; minutes on a machine that does nothing else
NUM_STEPS = 2 + 4 * 3  # fine-tuning and prediction from scratch; of the others pre-training, too

pytestmark = pytest.mark.slow


class Running:
    """``study run`` in a session of its own, as under a scheduler."""

    def __init__(self, site: Site, study: Path):
        self.study = study
        self.output = (site.folder / "output.txt").open("a+")
        command = Path(sys.executable).parent / "nnUNetv2_topomae"
        self.process = subprocess.Popen(
            [str(command), "study", "run", str(study), "--device", "cpu", "--processes", "1"],
            env=site.environment, stdout=self.output, stderr=self.output, start_new_session=True,
        )  # fmt: skip

    def wait_for(self, log: str, text: str) -> None:
        """Until the log of a step says something."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.log(log):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, f"{log} never said {text}:\n{self.log(log)}"
            time.sleep(0.2)

    def log(self, name: str) -> str:
        file = self.study / "logs" / f"{name}.log"
        return file.read_text(errors="replace") if file.is_file() else ""

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def descendants(self) -> list[int]:
        """The process and all that it has started, whatever their sessions."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (entry / "stat").is_file():
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"))
    site.environment |= {"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1", "nnUNet_n_proc_DA": "0"}
    write_dataset(site.folder / "raw" / DATASET, num_training=9, num_test=0)
    site.run("nnUNetv2_topomae", "plan_and_preprocess", "-d", 995, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    site.shrink_plans(DATASET, [24, 32, 32])
    return site


@pytest.fixture(scope="module")
def study(site):
    """The folder of a study that was killed three times and has come to its end."""
    folder = site.folder / "table6"
    site.run(
        "nnUNetv2_topomae", "study", "new", folder, "-d", 995, "--preset", "table6", "--labelled", 4, "--val", 1,
        "--test", NUM_TEST, "--seeds", 1, "--iterations", 3, "--pretraining_iterations", 2, "--batch", 1,
    )  # fmt: skip

    stopped = Running(site, folder)
    stopped.wait_for("vit_seed0_pretraining", "Epoch 0")
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.process.wait(PATIENCE) == 0, stopped.said()
    assert "Stopped: interrupted; the same command goes on from here" in stopped.said()

    alone = Running(site, folder)  # its command lives on, and the next run waits for it
    alone.wait_for("spatial_4_seed0_finetuning", "Epoch 0")
    alone.process.kill()
    alone.process.wait()

    lost = Running(site, folder)
    lost.wait_for("topology_4_seed0_prediction", "$ nnUNetv2_predict")
    for pid in lost.descendants():
        os.kill(pid, signal.SIGKILL)
    lost.process.wait()
    assert not (folder / "predictions" / "topology_4_seed0").exists()

    last = Running(site, folder)
    assert last.process.wait(PATIENCE) == 0, last.said()
    return folder


@pytest.fixture(scope="module")
def lines(study):
    return list(csv.DictReader((study / "results.csv").open()))


def test_everything_was_run_once_but_what_was_killed(site, study):
    run = [
        line
        for file in sorted((study / "logs").iterdir())
        for line in file.read_text(errors="replace").splitlines()
        if line.startswith("$ ")
    ]
    assert len(run) == NUM_STEPS + 2  # the pre-training that was stopped, the prediction that was killed
    before = snapshot(study)
    site.run("nnUNetv2_topomae", "study", "run", study, "--device", "cpu")
    changed = {file.name for file, written in snapshot(study).items() if before.get(file) != written}
    assert changed == {"results.csv", "answer.json"}


def _read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def _image(mask: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(np.pad(mask, 1).astype(np.uint8))
    image.SetSpacing(SPACING[::-1])
    return image


def _hd95(first: np.ndarray, second: np.ndarray) -> float:
    """By SimpleITK: distances of border voxels to the other border, the larger percentile of both directions."""

    def directed(one: np.ndarray, other: np.ndarray) -> float:
        borders = [sitk.BinaryContour(_image(mask), fullyConnected=False) for mask in (one, other)]
        distance = sitk.SignedMaurerDistanceMap(borders[1], squaredDistance=False, useImageSpacing=True)
        outside = np.maximum(sitk.GetArrayFromImage(distance), 0)
        return float(np.percentile(outside[sitk.GetArrayFromImage(borders[0]) > 0], 95))

    return max(directed(first, second), directed(second, first))


def _components(mask: np.ndarray) -> int:
    components = sitk.ConnectedComponent(_image(mask), True)  # 26 neighbours
    return int(sitk.GetArrayFromImage(components).max())


def test_the_table_is_that_of_the_raw_predictions(site, study, lines):
    structures = {name: value for name, value in LABELS.items() if value}
    cases = json.loads((study / "study.json").read_text())["test_cases"]
    assert len(cases) == NUM_TEST
    found = {(line["row"], line["case"], line["structure"]): line for line in lines}
    assert len(found) == len(lines) == len(ROWS) * NUM_TEST * len(structures)
    compared = 0
    for (row, case, structure), line in found.items():
        predicted, labelled = (
            _read(folder / f"{case}.nii.gz") == structures[structure]
            for folder in (study / "predictions" / f"{row}_4_seed0", site.folder / "raw" / DATASET / "labelsTr")
        )
        assert float(line["betti0_error"]) == abs(_components(predicted) - _components(labelled))
        if not predicted.any():
            assert (line["dice"], line["hd95"], line["nsd"]) == ("0", "", "0")
            continue
        compared += 1
        overlap = sitk.LabelOverlapMeasuresImageFilter()
        overlap.Execute(_image(labelled), _image(predicted))
        assert float(line["dice"]) == pytest.approx(overlap.GetDiceCoefficient(1), abs=1e-6)
        assert float(line["hd95"]) == pytest.approx(_hd95(predicted, labelled), abs=1e-4)
        distances = surface_distance.compute_surface_distances(labelled, predicted, SPACING)
        nsd = surface_distance.compute_surface_dice_at_tolerance(distances, 1.0)
        assert float(line["nsd"]) == pytest.approx(nsd, abs=1e-5)
    assert compared > len(found) / 4  # though networks have hardly learned anything


def test_p_values_are_those_of_scipy(study, lines):
    def by_case(row):
        values = {}
        for line in lines:
            if line["row"] == row:
                values.setdefault(line["case"], []).append(float(line["dice"]))
        return np.array([np.mean(values[case]) for case in sorted(values)])

    answer = json.loads((study / "answer.json").read_text())
    assert [each["row"] for each in answer["comparisons"]] == ROWS[1:]
    scratch, p_values = by_case("unetrpp"), []
    for each in answer["comparisons"]:
        row = by_case(each["row"])
        assert (each["baseline"], each["labelled"], each["cases"]) == ("unetrpp", 4, NUM_TEST)
        assert each["difference"] == pytest.approx(np.mean(row - scratch), abs=1e-6)
        p_values.append(scipy.stats.ttest_rel(row, scratch).pvalue)
        assert each["t_p"] == pytest.approx(p_values[-1], rel=1e-3)
        assert each["wilcoxon_p"] == pytest.approx(scipy.stats.wilcoxon(row - scratch).pvalue)
        resampled = scipy.stats.bootstrap((row - scratch,), np.mean, method="percentile", rng=0).confidence_interval
        width = resampled.high - resampled.low
        assert (each["low"], each["high"]) == pytest.approx((resampled.low, resampled.high), abs=0.2 * width + 1e-9)
    order, largest = np.argsort(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        assert answer["comparisons"][index]["holm_p"] == pytest.approx(largest, rel=1e-3)


def test_the_page_shows_the_answer_and_every_row(site, study):
    site.run("nnUNetv2_topomae", "study", "report", study)
    page = (study / "report.html").read_text()
    answer = json.loads((study / "answer.json").read_text())["sentence"]
    assert answer in html.unescape(page)
    for row in json.loads((study / "study.json").read_text())["rows"]:
        assert f">{row['title']}</th>" in page
    assert "Worst case" in page
    assert "ViT pre-trained: pre-training, seed 0" in page
