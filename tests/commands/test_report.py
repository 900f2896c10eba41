"""``nnUNetv2_topomae report``: the page, also in a browser, and what is refused."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

import made_up
from nnunet_topomae.commands import cli
from nnunet_topomae.files import write_json
from workspace import refused, set_folders, truncate

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WIDTHS = {"phone": 375, "desk": 1280}


class Outline(HTMLParser):
    """Texts, pictures and ids of a page."""

    def __init__(self, file: Path):
        super().__init__()
        self.ids, self.alts, self.sources, self.text = [], [], [], ""
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.ids += [named["id"]] if "id" in named else []
        if tag == "img" or named.get("role") == "img":
            self.alts.append(named.get("alt") or named.get("aria-label"))
        self.sources += [named[key] for key in ("src", "href", "xlink:href") if key in named]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """nnU-Net's folders with a study, and its page."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        set_folders(patch, folder)
        made_up.write_study(folder)
        assert cli.main(["report", str(folder / "study"), "-o", str(folder / "report.html")]) == 0
    return folder


@pytest.fixture(scope="module")
def page(site):
    return Outline(site / "report.html")


@pytest.fixture
def copied(site, tmp_path, monkeypatch):
    """The same to be changed."""
    shutil.copytree(site, tmp_path, dirs_exist_ok=True)
    set_folders(monkeypatch, tmp_path)
    (tmp_path / "report.html").unlink()
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves charts and slices undrawn, which takes most of the time; those of ``site`` are drawn."""

    def save(figure, stream, *, format, **_):
        stream.write('<svg width="1" height="1"></svg>' if format == "svg" else b"no picture")

    monkeypatch.setattr(Figure, "savefig", save)


def _refused(folder, capsys, *arguments):
    said = refused(["report", *arguments, "-o", folder / "report.html"], capsys)
    assert not (folder / "report.html").exists()
    return said


def answer(folder: Path) -> str:
    """How the sentence begins, recomputed from results.csv: with 5 labelled cases the gain is significant."""
    table = np.genfromtxt(folder / "study" / "results.csv", delimiter=",", names=True, dtype=None, encoding=None)
    table = table[table["labelled"] == 5]
    ours, scratch = (
        np.array([table["dice"][(table["row"] == row) & (table["case"] == case)].mean() for case in set(table["case"])])
        for row in ("topomae", "scratch")
    )
    assert 4 * ttest_rel(ours, scratch).pvalue < 0.05  # Holm, four comparisons
    difference = np.mean(ours - scratch)
    return (
        "With 5 labelled cases, TopoMAE is better than UNETR++ with ViT from scratch "
        f"(Dice {difference:+.3f}, 95 % interval "
    )


def test_page_has_the_answer_and_everything_that_was_measured(site, page):
    assert answer(site) in page.text
    for title, *_ in made_up.ROWS.values():
        assert title in page.text
    for part in ("UNETR++: topological", "skill of ViT", "Persistence diagrams", "Reconstructions",
                 "pretraining.mask_ratio", "NVIDIA H100", "nnunetv2 2.8.1", "Worst case"):  # fmt: skip
        assert part in page.text
    assert "ward-7" not in page.text  # names of machines are nobody's business


def test_structures_of_test_cases_have_a_legend_of_solid_lines(site):
    page = (site / "report.html").read_text()
    legend = re.search(r"Tinted: the label.*?<ul class=\"legend\"[^>]*>(.*?)</ul>", page, re.DOTALL)[1]
    assert re.findall(r"</svg>(.*?)</li>", legend) == made_up.STRUCTURES
    assert re.findall(r'stroke-dasharray="(.*?)"', legend) == [""] * len(made_up.STRUCTURES)


def test_page_needs_nothing_else_and_describes_every_picture(site, page):
    assert (site / "report.html").stat().st_size < 10_000_000
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert "<script" not in (site / "report.html").read_text()
    assert len(page.alts) > 20
    assert all(len(alt or "") > 20 for alt in page.alts)
    assert len(page.ids) == len(set(page.ids))
    links = {source[1:] for source in page.sources if source.startswith("#")}
    assert links <= set(page.ids)


def test_the_same_study_gives_the_same_page(site, tmp_path, monkeypatch):
    set_folders(monkeypatch, site)
    assert cli.main(["report", str(site / "study"), "-o", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == (site / "report.html").read_bytes()


def test_names_are_text_and_no_markup(copied):
    file = copied / "study" / "study.json"
    file.write_text(file.read_text().replace("SparK", "<b>SparK</b> & $x$", 1))
    assert cli.main(["report", str(copied / "study"), "-o", str(copied / "report.html")]) == 0
    assert "<b>" not in (copied / "report.html").read_text()
    assert "<b>SparK</b> & $x$" in Outline(copied / "report.html").text


@pytest.mark.usefixtures("undrawn")
def test_without_raw_images_cases_are_not_shown(copied):
    shutil.rmtree(copied / "raw" / made_up.DATASET)
    assert cli.main(["report", str(copied / "study"), "-o", str(copied / "report.html")]) == 0
    text = Outline(copied / "report.html").text
    assert f"nnUNet_raw is not set or has no {made_up.DATASET}" in text
    assert "Worst case" not in text


def test_runs_of_pretraining_and_finetuning(workspace, pretrained, tmp_path):
    """A real pre-training, and a fine-tuning as nnU-Net's own trainer leaves it, with numbers of NumPy."""
    folder = made_up.write_fold(
        tmp_path / "Dataset998_Phantom", "nnUNetTrainer", "nnUNetPlans", 1, made_up.finetuning_log(0)
    )
    file = folder / "checkpoint_final.pth"
    checkpoint = torch.load(file)
    checkpoint["logging"]["val_losses"] = [np.float32(value) for value in checkpoint["logging"]["val_losses"]]
    checkpoint |= {
        "_best_ema": np.float64(0.5),
        "init_args": {**checkpoint["init_args"], "device": torch.device("cpu")},
    }
    torch.save(checkpoint, file)
    case = json.loads((workspace.preprocessed / "splits_final.json").read_text())[0]["val"][0]
    (folder / "validation").mkdir()
    shutil.copy(workspace.raw / "labelsTr" / f"{case}.nii.gz", folder / "validation")
    dice = {"1": {"Dice": 0.75, "IoU": 0.6}, "2": {"Dice": float("nan"), "IoU": float("nan")}}
    record = {"prediction_file": f"/elsewhere/{case}.nii.gz", "metrics": dice}
    means = {"mean": dice, "foreground_mean": dice["1"], "metric_per_case": [record]}
    write_json(means, folder / "validation" / "summary.json")
    folds = [workspace.checkpoint("TopoMAEPretrainer").parent, folder]
    assert cli.main(["report", *map(str, folds), "-o", str(tmp_path / "report.html")]) == 0
    text = Outline(tmp_path / "report.html").text
    assert "nnUNetTrainer, nnUNetPlans, fold 1: Dice 0.75 over 1 validation cases." in text
    assert re.search(r"TopoMAEPretrainer, nnUNetTopoMAEPlans, fold 0: skill of ViT -?\d+.\d\d and UNETR\+\+", text)
    for part in ("UNETR++: topological", "Persistence diagrams", "pseudo Dice", f"Best case, {case}", "solid_organ"):
        assert part in text


@pytest.mark.usefixtures("undrawn")
def test_nothing_is_replaced_unless_asked(copied, capsys):
    file = copied / "report.html"
    file.write_text("mine")
    said = refused(["report", copied / "study", "-o", file], capsys)
    assert said == f"Error: {file} exists; add --overwrite to replace it\n"
    assert file.read_text() == "mine"
    assert cli.main(["report", str(copied / "study"), "-o", str(file), "--overwrite"]) == 0
    assert answer(copied) in Outline(file).text


def test_folders_that_are_neither_are_refused(copied, capsys):
    assert f"{copied / 'raw'} holds neither study.json nor a checkpoint" in _refused(copied, capsys, copied / "raw")
    assert f"{copied / 'no'} does not exist" in _refused(copied, capsys, copied / "no")


def test_folds_without_a_checkpoint_are_left_out_and_named(copied, capsys):
    model = copied / "results" / made_up.DATASET / "FusedFinetuneTrainer__study_spark_seed0__3d_fullres"
    empty = model / "fold_9"
    empty.mkdir()
    for named in ([model], [model / "fold_0", empty]):
        command = ["report", *map(str, named), "-o", str(copied / "model.html"), "--overwrite"]
        assert cli.main(command) == 0
        assert f"WARNING: {empty} is left out, as it holds no checkpoint\n" in capsys.readouterr().out
        assert "FusedFinetuneTrainer, study_spark_seed0, fold 0: " in Outline(copied / "model.html").text
    assert f"{empty} holds neither study.json nor a checkpoint" in _refused(copied, capsys, empty)


def test_a_page_in_no_folder_is_refused(copied, capsys):
    said = refused(["report", copied / "study", "-o", copied / "no" / "report.html"], capsys)
    assert said == f"Error: {copied / 'no'} does not exist; make it first\n"


def test_results_of_another_dataset_are_refused(copied, capsys):
    for name in ("results.csv", "study.json"):
        file = copied / "study" / name
        file.write_text(file.read_text().replace("phantom_004", "liver_004"))
    assert "results.csv has case liver_004, which" in _refused(copied, capsys, copied / "study")
    for name in ("results.csv", "study.json"):
        file = copied / "study" / name
        file.write_text(file.read_text().replace("liver_004", "phantom_004").replace("tube", "aorta"))
    said = _refused(copied, capsys, copied / "study")
    assert f"results.csv has structure aorta, which {made_up.DATASET} has not" in said


def test_checkpoints_of_another_dataset_are_refused(copied, capsys):
    fold = copied / "results" / made_up.DATASET / "FusedFinetuneTrainer__study_spark_seed0__3d_fullres" / "fold_0"
    checkpoint = torch.load(fold / "checkpoint_final.pth")
    checkpoint["init_args"]["plans"]["dataset_name"] = "Dataset001_Other"
    torch.save(checkpoint, fold / "checkpoint_final.pth")
    said = _refused(copied, capsys, copied / "study")
    assert said == (
        f"Error: {fold} is of Dataset001_Other, but {copied / 'study' / 'study.json'} is about {made_up.DATASET}\n"
    )


def test_broken_checkpoints_and_summaries_are_refused(copied, capsys):
    fold = copied / "results" / made_up.DATASET / "TopoMAEPretrainer__study_topomae_seed0__3d_fullres" / "fold_0"
    summary = fold / "validation" / "summary.json"
    summary.write_text('{"mean": 3}')
    assert f"{summary} is broken" in _refused(copied, capsys, fold)
    truncate(fold / "checkpoint_final.pth")
    assert "checkpoint_final.pth is damaged" in _refused(copied, capsys, fold)


@pytest.mark.usefixtures("undrawn")
def test_study_report_writes_into_the_folder_of_the_study(copied, capsys):
    folder = copied / "study"
    lines = (folder / "results.csv").read_text().splitlines()
    (folder / "results.csv").write_text("\n".join(line for line in lines if "phantom" not in line or "_003" in line))
    assert cli.main(["study", "report", str(folder)]) == 0
    page = Outline(folder / "report.html")
    assert "No gain of " in page.text
    assert "no p-value, 1 test cases" in page.text
    assert f"Written: {folder / 'report.html'}" in capsys.readouterr().out


def test_a_study_that_has_not_been_measured_has_no_answer_yet(copied):
    _without_the_rest(copied)
    assert cli.main(["report", str(copied / "study"), "-o", str(copied / "report.html")]) == 0
    text = Outline(copied / "report.html").text
    assert "No row has been measured beside its baseline yet, so there is no answer." in text
    assert "Worst case" not in text
    assert "UNETR++: topological" in text


def _add_row(folder: Path) -> None:
    """A row of one's own whose plans have the same pre-training as those of TopoMAE."""
    study = folder / "study" / "study.json"
    content = json.loads(study.read_text())
    own = json.loads(json.dumps(content["rows"][-1]).replace("study_topomae", "study_own"))
    content["rows"].append({**own, "name": "own", "title": "Ours with another recipe"})
    write_json(content, study)
    for run in own["runs"]:
        plans = made_up.planned(made_up.DATASET, run["plans"], {"recipe": "nnssl"}, seed=run["seed"])
        write_json(plans, folder / "preprocessed" / made_up.DATASET / f"{run['plans']}.json")


def test_a_pretraining_that_rows_share_is_named_after_all_of_them(copied):
    """Also after TopoMAE, though its own plans were never pre-trained with."""
    _add_row(copied)
    study = copied / "study" / "study.json"
    content = json.loads(study.read_text())
    content["rows"].insert(0, content["rows"].pop())
    write_json(content, study)
    results = copied / "results" / made_up.DATASET
    for seed in made_up.SEEDS:
        made = results / f"TopoMAEPretrainer__study_topomae_seed{seed}__3d_fullres"
        made.rename(results / f"TopoMAEPretrainer__study_own_seed{seed}__3d_fullres")
    _without_the_rest(copied)
    assert cli.main(["report", str(copied / "study"), "-o", str(copied / "report.html")]) == 0
    text = Outline(copied / "report.html").text
    for seed in made_up.SEEDS:
        assert f"Ours with another recipe, TopoMAE: pre-training, seed {seed}" in text
    assert "UNETR++: topological" in text


def _without_the_rest(folder: Path) -> None:
    """Leave pre-trainings only, as pages without charts of anything else are made quickly."""
    (folder / "study" / "results.csv").unlink()
    for finetuning in (folder / "results" / made_up.DATASET).glob("Fused*"):
        shutil.rmtree(finetuning)


@pytest.mark.usefixtures("undrawn")
def test_without_plans_pretrainings_are_not_shown(copied):
    shutil.rmtree(copied / "preprocessed")
    (copied / "study" / "results.csv").unlink()
    assert cli.main(["report", str(copied / "study"), "-o", str(copied / "report.html")]) == 0
    text = Outline(copied / "report.html").text
    assert "Pre-trainings are left out, because nnUNet_preprocessed is not set or lacks plans of the study." in text
    assert "Losses with 5 labelled cases" in text


@pytest.mark.usefixtures("undrawn")
def test_an_optimizer_that_differs_is_shown(tmp_path, monkeypatch):
    set_folders(monkeypatch, tmp_path)
    folds = [
        made_up.write_fold(
            tmp_path / "results" / made_up.DATASET, "PretrainedFinetuneTrainer", f"plans_{name}", 0,
            made_up.finetuning_log(0), {"optimizer": name},
        )
        for name in ("sgd", "adamw")
    ]  # fmt: skip
    assert cli.main(["report", *map(str, folds), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert '<th scope="row">finetuning.optimizer</th><td>sgd</td><td>adamw</td>' in page


@pytest.mark.usefixtures("undrawn")
def test_without_predictions_cases_are_not_shown(copied):
    shutil.rmtree(copied / "study" / "predictions" / "topomae_5_seed0")
    assert cli.main(["report", str(copied / "study"), "-o", str(copied / "report.html")]) == 0
    text = Outline(copied / "report.html").text
    assert re.search(r"left out, because predictions/topomae_5_seed0/phantom_\d+.nii.gz does not exist; ", text)
    assert "Worst case" not in text
    assert answer(copied) in text


@pytest.mark.usefixtures("undrawn")
def test_of_an_unfinished_study_a_seed_is_shown_that_all_rows_have(copied):
    """Seed 0 of the row from scratch is yet to be trained."""
    file = copied / "study" / "results.csv"
    kept = [line for line in file.read_text().splitlines() if not line.startswith("scratch,5,0,")]
    file.write_text("\n".join(kept))
    shutil.rmtree(copied / "study" / "predictions" / "scratch_5_seed0")
    assert cli.main(["report", str(copied / "study"), "-o", str(copied / "report.html")]) == 0
    text = Outline(copied / "report.html").text
    assert "the predictions are of seed 1" in text
    assert "Worst case" in text


@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and DRIVER):
        assert "CI" not in os.environ, "chromium and chromium-driver must be installed, see .ci/run"
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_page_opens_without_errors_fits_and_can_be_read(site, browser, width, scheme):
    emulation = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", emulation)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get((site / "report.html").as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    unloaded = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.execute_script("return document.images.length") > 10
    assert browser.execute_script(unloaded) == 0
    flat = (
        "return [...document.querySelectorAll('.chart svg')].filter(s => s.getBoundingClientRect().height < 100).length"
    )
    assert browser.execute_script(flat) == 0
    paper, ink, axis = browser.execute_script(
        "const of = (e, p) => getComputedStyle(e)[p];"
        "return [of(document.body, 'backgroundColor'), of(document.body, 'color'),"
        " of(document.querySelector('.chart svg text'), 'fill')]"
    )
    assert axis == ink  # text of charts has the colour of the page
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (paper, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")
    assert abs(brightness[0] - brightness[1]) > 500
