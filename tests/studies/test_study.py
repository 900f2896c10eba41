"""Studies on the phantom dataset; commands of nnU-Net are replaced by a script that writes what they would write."""

import csv
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_topomae.commands import cli
from nnunet_topomae.files import write_json
from nnunet_topomae.nnunet.data.preprocessed import PlannedDataset
from nnunet_topomae.nnunet.data.splits import read_splits
from nnunet_topomae.studies import running
from nnunet_topomae.studies.definition import read_study
from nnunet_topomae.studies.new import differences, schedule
from nnunet_topomae.studies.results import read_results
from nnunet_topomae.studies.steps import Steps
from workspace import DATASET, refused, says, snapshot

STAND_IN = '''#!{python} -S
"""Stands in for nnUNetv2_train and nnUNetv2_predict: writes their files; predictions are labels, shifted by a row."""
import os, shutil, sys, time
from pathlib import Path

words = sys.argv[1:]
option = dict(zip(words, words[1:]))
if Path("{marks}/fail").exists() and Path("{marks}/fail").read_text() in " ".join(words):
    print("out of memory")
    sys.exit(3)
with open("{marks}/commands", "a") as log:
    log.write(Path(sys.argv[0]).name + " " + " ".join(words) + "\\n")
time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
if Path(sys.argv[0]).name == "nnUNetv2_train":
    dataset, configuration, fold = words[:3]
    output = Path(os.environ["nnUNet_results"], dataset, f"{{option['-tr']}}__{{option['-p']}}__{{configuration}}")
    weights = option.get("-pretrained_weights")
    assert weights is None or Path(weights).is_file(), weights
    (output / f"fold_{{fold}}" / "validation").mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(os.environ["nnUNet_preprocessed"], dataset, option["-p"] + ".json"), output / "plans.json")
    (output / f"fold_{{fold}}" / "checkpoint_final.pth").touch()
    (output / f"fold_{{fold}}" / "validation" / "summary.json").write_text("{{}}")
else:
    target = Path(option["-o"])
    target.mkdir()
    for image in Path(option["-i"]).iterdir():
        case = image.name.replace("_0000", "")
        labels = image.resolve().parents[1] / "labelsTr" if "topomae" in option["-p"] else Path("{shifted}")
        shutil.copy(labels / case, target / case)
'''


@pytest.fixture(scope="module")
def shifted(workspace, tmp_path_factory):
    """All labels, shifted by a row: made once, as stand-ins that import nothing start at once."""
    folder = tmp_path_factory.mktemp("shifted")
    for file in (workspace.raw / "labelsTr").iterdir():
        labels = sitk.ReadImage(str(file))
        moved = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(labels), 1, axis=1))
        moved.CopyInformation(labels)
        sitk.WriteImage(moved, str(folder / file.name))
    return folder


@pytest.fixture
def marks(shifted, tmp_path, monkeypatch):
    """A folder with the stand-ins, what they have been called with, and which of them is to fail."""
    for name in ("nnUNetv2_train", "nnUNetv2_predict"):
        script = tmp_path / name
        script.write_text(STAND_IN.format(python=sys.executable, marks=tmp_path, shifted=shifted))
        script.chmod(0o755)
    monkeypatch.setattr(running, "executable", lambda command: str(tmp_path / command))
    return tmp_path


@pytest.fixture
def new(workspace, no_split, tmp_path, monkeypatch):
    """Makes a study by the command; what it has written is removed afterwards."""
    before = set(workspace.preprocessed.iterdir()) | {no_split}

    def make(*arguments, name="study") -> Path:
        folder = tmp_path / "studies" / name
        folder.parent.mkdir(exist_ok=True)
        usual = ["--val", "1", "--test", "1", "--seeds", "1", "--iterations", "4", "--pretraining_iterations", "3"]
        assert cli.main(["study", "new", str(folder), "-d", "998", *usual, *arguments]) == 0
        return folder

    yield make
    for file in set(workspace.preprocessed.iterdir()) - before:
        file.unlink()
    for folder in workspace.results.glob("*__study*"):
        shutil.rmtree(folder)


@pytest.fixture
def study(new):
    return new("--preset", "labels", "--labelled", "1", "3")


def commands(marks) -> list[str]:
    """What has been run, in short."""
    file = marks / "commands"
    return [" ".join(line.split()[:4]) for line in file.read_text().splitlines()] if file.exists() else []


def run(folder, *arguments) -> int:
    return cli.main(["study", "run", str(folder), "--device", "cpu", *arguments])


def test_rows_differ_in_nothing_but_what_they_compare(workspace, new):
    folder = new("--preset", "table6", "--labelled", "2", "--seeds", "2", "--recipe", "anatomask")
    study = read_study(folder)
    assert [row.name for row in study.rows] == ["unetrpp", "vit", "spatial", "topology", "copretrained"]
    first = workspace.plans("study_unetrpp_seed0")["configurations"]["3d_fullres"]
    for row in study.rows:
        for run_ in row.runs:
            plans = workspace.plans(run_.plans)
            assert plans["plans_name"] == run_.plans
            configuration = plans["configurations"]["3d_fullres"]
            for key in ("patch_size", "batch_size", "data_identifier", "spacing"):
                assert configuration[key] == first[key]
            assert configuration["pretraining"]["seed"] == configuration["finetuning"]["seed"] == 12345 + run_.seed
            same = {**configuration["finetuning"], "seed": 12345, "from_scratch": True}
            assert same == first["finetuning"]
            assert same["recipe"] == "anatomask"
            assert same["num_epochs"] * same["num_iterations_per_epoch"] == 4
    differs = {row.name: row.differs for row in study.rows}
    assert differs["vit"] == {
        "network": "FusedViTUNETRPP",
        "pretraining.branches": ["vit"],
        "pretraining.spatial.enabled": False,
        "pretraining.topology.enabled": False,
    }
    assert differs["unetrpp"] == {"network": "UNETRPP"}


def test_all_rows_of_the_methods_can_be_planned(workspace, new):
    rows = ["nnunet", "resenc", "spark", "anatomask", "scratch", "topomae"]  # UNETR: see the end-to-end tests
    study = read_study(new("--rows", *rows, "--labelled", "2"))
    assert {row.name: row.compared_with for row in study.rows} == {
        "nnunet": None, "resenc": None, "spark": "resenc", "anatomask": "resenc", "scratch": None, "topomae": "scratch",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["3d_lowres", "3d_fullres_bs4"])
def test_the_plans_of_a_run_name_no_configuration_that_they_do_not_have(workspace, new, name):
    plans = workspace.plans() | {"plans_name": "study_others"}
    of_fullres = plans["configurations"]["3d_fullres"]
    plans["configurations"] |= {
        "3d_lowres": {**of_fullres, "next_stage": "3d_cascade_fullres"},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        "3d_fullres_bs4": {"inherits_from": "3d_fullres", "batch_size": 4},
    }
    write_json(plans, workspace.preprocessed / "study_others.json")
    new("--rows", "scratch", "-p", "study_others", "-c", name)
    resolved = PlansManager(workspace.plans("study_scratch_seed0")).get_configuration(name)
    assert resolved.next_stage_names is None
    assert resolved.spacing == of_fullres["spacing"]
    assert resolved.batch_size == (4 if name == "3d_fullres_bs4" else of_fullres["batch_size"])


def test_other_keys_of_a_rows_plans_are_kept(workspace, new):
    own = {"base_lr": 0.05, "warmup_epochs": 7, "freeze_epochs": 9, "num_epochs": 700, "recipe": "nnssl"}
    workspace.write_plans("study_own", lambda configuration: configuration.update(finetuning=own))
    folder = new("--rows", "scratch", "own=study_own:FusedFinetuneTrainer")
    used = workspace.plans("study_own_seed0")["configurations"]["3d_fullres"]["finetuning"]
    assert used == {
        **workspace.plans("study_scratch_seed0")["configurations"]["3d_fullres"]["finetuning"], "base_lr": 0.05,
    }  # fmt: skip
    assert {row.name: row.differs for row in read_study(folder).rows} == {
        "scratch": {"finetuning.base_lr": 0.1},
        "own": {"finetuning.base_lr": 0.05},
    }


@pytest.mark.parametrize(
    ("usual", "counts"), [((1, 2, 40), [1, 2]), ((1, 3), [1, 3]), ((4, 40), [3])], ids=["some", "all", "none"]
)
def test_the_usual_numbers_of_labels_that_there_are_cases_for(new, monkeypatch, usual, counts):
    """Three cases are left to train on; all of them are labelled only where fewer would be too few."""
    monkeypatch.setattr("nnunet_topomae.studies.new.LABEL_COUNTS", usual)
    assert read_study(new("--preset", "labels")).label_counts == counts


def test_the_pattern_of_patients_is_kept_and_used(new, marks):
    folder = new("--rows", "scratch", "topomae", "--labelled", "1", "--test", "2", "--patient", r"phantom_\d+")
    assert read_study(folder).patient == r"phantom_\d+"
    content = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps({**content, "patient": "phantom"}))  # as if both were of one patient
    assert run(folder) == 0
    (compared,) = json.loads((folder / "answer.json").read_text())["comparisons"]
    assert (compared["cases"], compared["unit"], compared["t_p"]) == (1, "patients", None)


def test_the_main_row_is_kept_and_answered(new, marks):
    folder = new("--rows", "scratch", "topomae", "spatial", "--labelled", "1", "--test", "2", "--main", "topomae")
    assert read_study(folder).main == "topomae"
    assert run(folder) == 0
    found = json.loads((folder / "answer.json").read_text())
    assert found["main"] == "topomae"
    assert "TopoMAE" in found["sentence"]
    assert "spatial task" not in found["sentence"]
    (main,) = (each for each in found["comparisons"] if each["row"] == "topomae")
    assert main["holm_p"] == main["t_p"]


def test_rows_can_be_pretrained_on_other_datasets(workspace, other_dataset, new):
    """Which have the plans that the row starts from, and not those of the study."""
    plans = workspace.write_plans("StudyBoth", lambda c: c["pretraining"].update(datasets=[997]))
    shutil.copy(workspace.preprocessed / f"{plans}.json", other_dataset)
    new("--rows", "scratch", f"own={plans}:FusedFinetuneTrainer:TopoMAEPretrainer", "--labelled", "2")
    training, validation = workspace.trainer("TopoMAEPretrainer", "study_own_seed0").get_tr_and_val_datasets()
    assert sum(case.startswith("Dataset997_Other/") for case in training.identifiers) == 5
    assert not any("/" in case for case in validation.identifiers)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (None, "{other}/StudyBoth.json does not exist; plan the dataset with <what the library says>"),
        (
            lambda c: c.update(spacing=[3, 1, 1]),
            "Dataset997_Other was not preprocessed like Dataset998_Phantom: spacing is <what the library says>",
        ),
    ],
    ids=["not there", "otherwise"],
)
def test_other_datasets_that_cannot_take_part_are_refused(
    workspace, other_dataset, no_split, tmp_path, capsys, edit, sentence
):
    plans = workspace.write_plans("StudyBoth", lambda c: c["pretraining"].update(datasets=[997]))
    file = other_dataset / f"{plans}.json"
    file.unlink(missing_ok=True)
    if edit:
        shutil.copy(workspace.preprocessed / file.name, file)
        _edit(file, lambda content: edit(content["configurations"]["3d_fullres"]))
    own = ["--rows", f"own={plans}:FusedFinetuneTrainer:TopoMAEPretrainer"]
    before = snapshot(workspace.folder)
    said = refused(["study", "new", tmp_path / "study", "-d", 998, "--val", 1, "--test", 1, *own], capsys)
    assert says(said, f"Error: {sentence.format(other=other_dataset)}\n"), said
    assert snapshot(workspace.folder) == before
    assert not (tmp_path / "study").exists()


def test_rows_that_were_preprocessed_otherwise_are_named(workspace, new, capsys):
    workspace.write_plans("StudyOtherSpacing", lambda configuration: configuration.update(spacing=[4.0, 2.0, 2.0]))
    own = "own=StudyOtherSpacing:FusedFinetuneTrainer:TopoMAEPretrainer"
    folder = new("--rows", "scratch", "topomae", own, "--labelled", "2")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert warnings == [
        "WARNING: own is compared with scratch, whose images were preprocessed otherwise: spacing is [4.0, 2.0, 2.0] "
        "and [2.0, 2.0, 2.0]. The rows may differ for that reason."
    ]
    differs = {row.name: row.differs for row in read_study(folder).rows}
    assert differs["topomae"]["preprocessing.spacing"] == [2.0, 2.0, 2.0]
    assert differs["own"] == {"preprocessing.spacing": [4.0, 2.0, 2.0]}


def test_added_images_that_not_all_rows_have_are_shown(workspace, new, monkeypatch):
    """As if images had been added to the plans of TopoMAE only."""
    unlabelled = PlannedDataset.unlabelled_cases
    monkeypatch.setattr(
        PlannedDataset,
        "unlabelled_cases",
        lambda self, name: ["a", "b"] if self.plans.plans_name == "nnUNetTopoMAEPlans" else unlabelled(self, name),
    )
    study = read_study(new("--rows", "spark", "topomae", "--labelled", "2"))
    assert [row.differs["pretraining.added_images"] for row in study.rows] == [0, 2]


def test_test_images_are_those_of_the_test_cases(study, marks, workspace):
    """Links that are left of an edited study are removed, and ones that lead elsewhere are mended."""
    folder, (case,) = study / "test_images", read_study(study).test_cases
    images = {file.name: file for file in (workspace.raw / "imagesTr").iterdir()}
    other = next(name for name in sorted(images) if not name.startswith(case))
    folder.mkdir()
    (folder / other).symlink_to(images[other])
    (folder / f"{case}_0000.nii.gz").symlink_to(images[other])
    Steps(read_study(study)).link_test_images()
    assert {link.name: link.resolve() for link in folder.iterdir()} == {
        f"{case}_0000.nii.gz": images[f"{case}_0000.nii.gz"].resolve()
    }


def test_a_study_is_run_to_its_end(study, marks, capsys):
    assert run(study) == 0
    trained = f"nnUNetv2_train {DATASET} 3d_fullres"
    predicted = f"nnUNetv2_predict -d {DATASET} -c"
    assert commands(marks) == [
        f"{trained} 0", predicted,  # from scratch, one label
        f"{trained} 0", f"{trained} 0", predicted,  # pre-training, fine-tuning
        f"{trained} 1", predicted,  # from scratch, three labels
        f"{trained} 1", predicted,  # fine-tuning from the same pre-training
    ]  # fmt: skip
    lines = list(csv.DictReader((study / "results.csv").open()))
    assert len(lines) == 2 * 2 * 4  # rows, label counts, structures; one test case
    assert all(line["dice"] == "1" for line in lines if line["row"] == "topomae")
    answer = json.loads((study / "answer.json").read_text())
    assert [each["labelled"] for each in answer["comparisons"]] == [1, 3]
    assert answer["sentence"] in capsys.readouterr().out
    before = snapshot(study)
    assert run(study) == 0
    assert len(commands(marks)) == 9
    assert {file for file, time_ in snapshot(study).items() if before[file] != time_} == {
        study / "results.csv", study / "answer.json",
    }  # fmt: skip


def test_the_table_can_be_recomputed_from_the_predictions(study, marks, workspace):
    assert run(study) == 0
    (case,) = read_study(study).test_cases
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(workspace.raw / "labelsTr" / f"{case}.nii.gz")))
    predicted = sitk.GetArrayFromImage(
        sitk.ReadImage(str(study / "predictions" / "scratch_1_seed0" / f"{case}.nii.gz"))
    )
    found = {
        line["structure"]: float(line["dice"])
        for line in csv.DictReader((study / "results.csv").open())
        if (line["row"], line["labelled"]) == ("scratch", "1")
    }
    for value, name in enumerate(["solid_organ", "hollow_organ", "tube", "tree"], start=1):
        overlap = (
            2 * np.sum((label == value) & (predicted == value)) / np.sum((label == value) * 1 + (predicted == value))
        )
        assert found[name] == pytest.approx(overlap, abs=1e-6)


def test_a_failed_command_stops_its_row_only(study, marks, capsys):
    (marks / "fail").write_text("TopoMAEPretrainer")
    assert run(study) == 2
    said = capsys.readouterr()
    assert "topomae_seed0_pretraining failed with exit status 3" in said.out
    assert "    out of memory" in said.out
    assert "1 rows have failed" in said.err
    assert str(study / "logs" / "topomae_seed0_pretraining.log") in said.err
    assert len(commands(marks)) == 4  # both runs from scratch
    (marks / "fail").unlink()
    assert run(study) == 0
    assert len(commands(marks)) == 9


def test_rows_with_the_same_pretraining_share_it(new, marks):
    own = ["a=nnUNetTopoMAEPlans:FusedFinetuneTrainer:TopoMAEPretrainer", "scratch"]
    folder = new("--rows", *own, "topomae", "--labelled", "2")
    assert run(folder) == 0
    lines = (marks / "commands").read_text().splitlines()
    assert sum("TopoMAEPretrainer " in line for line in lines) == 1
    assert (
        sum("TopoMAEPretrainer__study_a_seed0__3d_fullres/fold_0/checkpoint_final.pth" in line for line in lines) == 2
    )


def test_interrupted_trainings_are_continued(study, workspace):
    steps = Steps(read_study(study))
    row, run_ = next(steps.study.runs())
    fold = workspace.results / f"{row.finetuner}__{run_.plans}__3d_fullres" / "fold_0"
    (fold / "validation").mkdir(parents=True)

    def finetuning():
        step = next(iter(steps.of_run(row, run_)))
        return step.words[-1], step.is_done

    assert finetuning() == ("cuda", False)
    (fold / "checkpoint_best.pth").touch()
    assert finetuning() == ("--c", False)
    (fold / "checkpoint_final.pth").touch()  # killed before its validation
    assert finetuning() == ("--val", False)
    (fold / "validation" / "summary.json").touch()
    assert finetuning()[1]


def test_the_time_limit_stops_the_command_that_runs(study, marks, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN_SECONDS", "60")
    started = time.monotonic()
    assert run(study, "--hours", str(3 / 3600)) == 0
    assert time.monotonic() - started < 30
    assert "Stopped: the time is up; the same command goes on from here" in capsys.readouterr().out
    monkeypatch.setenv("STAND_IN_SECONDS", "0")
    assert run(study) == 0
    assert len(commands(marks)) == 9 + 1  # the first of them twice


def _in_its_own_process(folder, marks, seconds) -> subprocess.Popen:
    code = (
        "import sys; from nnunet_topomae.studies import running; from nnunet_topomae.commands import cli\n"
        f"running.executable = lambda command: '{marks}/' + command\n"
        f"sys.exit(cli.main(['study', 'run', '{folder}', '--device', 'cpu']))"
    )
    environment = {**os.environ, "STAND_IN_SECONDS": str(seconds)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.DEVNULL,
        cwd=marks,  # in the checkout, Python would import the checkout instead of the installed package
    )


def _wait_for_commands(marks, count) -> None:
    for _ in range(600):
        if len(commands(marks)) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(commands(marks))


def test_a_killed_study_goes_on(study, marks, capsys):
    """SIGTERM stops its command, too; after SIGKILL the next run waits for the command that is left, and uses it."""
    first = _in_its_own_process(study, marks, 60)
    _wait_for_commands(marks, 1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(40) == 0
    second = _in_its_own_process(study, marks, 6)
    _wait_for_commands(marks, 2)
    second.kill()
    second.wait()
    assert run(study) == 0
    assert "Waiting for a command that another study run has started" in capsys.readouterr().out
    assert len(commands(marks)) == 9 + 1
    assert len(list(csv.DictReader((study / "results.csv").open()))) == 16


def test_a_study_is_run_on_a_disk_without_locks(study, marks, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert run(study) == 0
    assert f"WARNING: {study} is on a disk without locks (Function not implemented)" in capsys.readouterr().out
    assert len(commands(marks)) == 9


def _edit(file, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def _change_plans(workspace, _):
    _edit(
        workspace.preprocessed / "study_scratch_seed0.json",
        lambda plans: plans["configurations"]["3d_fullres"]["finetuning"].update(base_lr=0.5),
    )


def _add_prediction(_, study):
    shutil.copy(
        next((study / "predictions" / "scratch_1_seed0").glob("*.nii.gz")),
        study / "predictions/scratch_1_seed0/x.nii.gz",
    )


SENTENCES = {  # what is wrong, and what the command says after "Error: "
    "version": (
        lambda _, study: _edit(study / "study.json", lambda s: s.update(version=2)),
        "{study}/study.json is of version 2, but this nnunet_topomae reads version 1; use the nnunet_topomae that "
        "wrote it, or make a new study",
    ),
    "no JSON": (
        lambda _, study: (study / "study.json").write_text("{"),
        "{study}/study.json is no valid JSON: <what the library says>",
    ),
    "a key is missing": (
        lambda _, study: _edit(study / "study.json", lambda s: s["rows"][0].pop("title")),
        "{study}/study.json: rows[0].title is missing",
    ),
    "no configuration": (
        lambda space, _: _edit(
            space.preprocessed / "study_scratch_seed0.json", lambda plans: plans.update(configurations={})
        ),
        "{preprocessed}/study_scratch_seed0.json has no configuration 3d_fullres, which {study}/study.json is about",
    ),
    "tolerance": (
        lambda _, study: _edit(study / "study.json", lambda s: s.update(nsd_tolerance=0)),
        "{study}/study.json: nsd_tolerance must be a number above 0, got 0",
    ),
    "another split": (
        lambda space, _: _edit(space.preprocessed / "splits_final.json", lambda s: s.pop()),
        "{preprocessed}/splits_final.json is not the split of this study any more; copy {study}/splits.json there, or "
        "make a new study",
    ),
    "plans have changed": (
        _change_plans,
        "{preprocessed}/study_scratch_seed0.json has changed since scratch was trained with it "
        "(configurations.3d_fullres.finetuning.base_lr was None, is 0.5); restore it from "
        "{results}/FusedFinetuneTrainer__study_scratch_seed0__3d_fullres/plans.json, or add the changed plans to a new "
        "study",
    ),
    "a prediction of another dataset": (
        _add_prediction,
        "{study}/predictions/scratch_1_seed0 holds x, which is no test case of this study; move the folder away, and "
        "it is predicted again",
    ),
    "results of another study": (
        lambda _, study: (study / "results.csv").write_text(
            (study / "results.csv").read_text().replace("scratch,1,", "other,1,")
        ),
        "{study}/results.csv holds solid_organ of {case} in row other, 1 labelled, seed 0, which is not in "
        "{study}/study.json; move the file away, and measure again",
    ),
    "results that are broken": (
        lambda _, study: (study / "results.csv").write_text("nothing"),
        "{study}/results.csv must have the columns <what the library says>; move it away, and measure again",
    ),
    "a broken answer": (
        lambda _, study: (study / "answer.json").write_text("["),
        "{study}/answer.json is no valid JSON: <what the library says>",
    ),
    "a broken prediction": (
        lambda _, study: next((study / "predictions" / "scratch_1_seed0").glob("*.nii.gz")).write_text("no image"),
        "{study}/predictions/scratch_1_seed0/{case}.nii.gz cannot be read: <what the library says>",
    ),
}


@pytest.mark.parametrize(("spoil", "sentence"), SENTENCES.values(), ids=SENTENCES.keys())
def test_what_does_not_fit_is_one_sentence_and_nothing_is_overwritten(workspace, study, marks, capsys, spoil, sentence):
    assert run(study) == 0
    (case,) = read_study(study).test_cases
    spoil(workspace, study)
    before, results = snapshot(study), snapshot(workspace.results)
    expected = sentence.replace("{study}", str(study)).replace("{case}", case)
    expected = expected.replace("{preprocessed}", str(workspace.preprocessed)).replace(
        "{results}", str(workspace.results)
    )
    capsys.readouterr()
    for command in ("run", "measure"):
        said = refused(["study", command, study], capsys)
        assert says(said, f"Error: {expected}\n"), said
    assert (snapshot(study), snapshot(workspace.results)) == (before, results)
    assert len(commands(marks)) == 9


REFUSED = {  # arguments of study new, and what it says
    "no rows": (
        [],
        "a study needs --rows or --preset table6, methods, mim, alice, labels; there are the rows "
        "<what the library says>",
    ),
    "a main row that there is not": (
        ["--rows", "scratch", "topomae", "--main", "spark"],
        'main must name a row that is compared with one from scratch, got "spark"; such rows are topomae',
    ),
    "too many labels": (
        ["--preset", "labels", "--labelled", "4"],
        "4 labelled cases, 1 validation and 1 test cases are more than the dataset's 5 cases",
    ),
    "nothing to train on": (
        ["--preset", "labels", "--test", "4"],
        "1 validation and 4 test cases leave none of 5 to train on",
    ),
    "no plans": (
        ["--rows", "a=Nothing:FusedFinetuneTrainer"],
        "{preprocessed}/Nothing.json does not exist; plan dataset 998 with nnUNetv2_topomae plan_and_preprocess, or "
        "nnUNetv2_plan_experiment and nnUNetv2_preprocess",
    ),
    "no trainer": (
        ["--rows", "a=nnUNetTopoMAEPlans:NoTrainer"],
        "there is no trainer NoTrainer, neither in <what the library says> nor in nnUNet_extTrainer",
    ),
    "no pre-training trainer": (
        ["--rows", "a=nnUNetTopoMAEPlans:FusedFinetuneTrainer:FusedFinetuneTrainer"],
        "there is no pre-training trainer FusedFinetuneTrainer, neither in <what the library says> nor in "
        "nnUNet_extTrainer",
    ),
    "no configuration": (
        ["--preset", "labels", "-c", "3d_lowres"],
        "nnUNetTopoMAEPlans has no 3D configuration 3d_lowres; it has 3d_fullres",
    ),
}


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_studies_that_cannot_be_made(workspace, no_split, tmp_path, capsys, arguments, sentence):
    before = snapshot(workspace.folder)
    command = ["study", "new", tmp_path / "study", "-d", 998, "--val", 1, "--test", 1, *arguments]
    said = refused(command, capsys)
    assert says(said, f"Error: {sentence.replace('{preprocessed}', str(workspace.preprocessed))}\n"), said
    assert snapshot(workspace.folder) == before
    assert not list(tmp_path.iterdir())


def _folds(space, *folds):
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (space.raw / "labelsTr").iterdir())
    return [{part: [cases[number] for number in numbers] for part, numbers in fold.items()} for fold in folds]


ONE = {"train": [0], "val": [3], "test": [4], "unlabelled": [1, 2]}
TWO = {**ONE, "train": [0, 2], "unlabelled": [1]}
EXISTING = ["--rows", "scratch", "--seeds", "1", "--existing_split"]


def test_cases_can_be_those_of_the_existing_split(workspace, no_split, tmp_path, new, marks):
    folds = _folds(workspace, ONE, TWO)
    no_split.write_text(json.dumps(folds))
    folder = tmp_path / "study"
    assert cli.main(["study", "new", str(folder), "-d", "998", *EXISTING, "--disable_tta"]) == 0
    study = read_study(folder)
    assert (study.label_counts, study.test_cases) == ([1, 2], folds[0]["test"])
    assert [(each.labelled, each.fold) for each in study.rows[0].runs] == [(1, 0), (2, 1)]
    assert json.loads(no_split.read_text()) == folds
    assert run(folder) == 0
    lines = (marks / "commands").read_text().splitlines()
    assert [line.endswith(" --disable_tta") for line in lines] == ["predict" in line for line in lines]


def test_every_seed_has_its_own_labelled_cases(workspace, no_split, new):
    study = read_study(new("--rows", "scratch", "--labelled", "1", "2", "--seeds", "5", "--split_seed", "1"))
    splits = read_splits(workspace.preprocessed)
    runs = [(run_.seed, run_.labelled, run_.fold) for run_ in study.rows[0].runs]
    assert runs == [(seed, labelled, 2 * seed + labelled - 1) for seed in range(5) for labelled in (1, 2)]
    assert len({tuple(splits[fold].train) for _, labelled, fold in runs if labelled == 1}) > 1
    Steps(study).check()


@pytest.mark.parametrize("numbers", [(1, 3), (3, 1)], ids=["more seeds", "fewer seeds"])
def test_studies_with_other_numbers_of_seeds_share_the_split(workspace, no_split, new, numbers):
    first, second = (
        read_study(new("--rows", "scratch", "--labelled", "1", "--seeds", str(number), name=f"study{number}"))
        for number in numbers
    )
    assert len(read_splits(workspace.preprocessed)) == 3
    for study in (first, second):
        Steps(study).check()


def test_a_split_that_could_not_be_extended_stays(workspace, no_split, new, tmp_path, monkeypatch):
    new("--rows", "scratch", "--labelled", "1")
    before = snapshot(workspace.preprocessed)

    def fail(content, file):
        if file == no_split:
            raise OSError("disk full")
        write_json(content, file)

    monkeypatch.setattr("nnunet_topomae.studies.new.write_json", fail)
    arguments = ["study", "new", str(tmp_path / "study2"), "-d", "998", "--val", "1", "--test", "1"]
    assert cli.main([*arguments, "--labelled", "1", "--rows", "scratch", "--seeds", "2"]) != 0
    assert snapshot(workspace.preprocessed) == before
    assert not list((tmp_path / "study2").iterdir())


def test_runs_use_folds_of_the_study_only(workspace, no_split, new):
    folder = new("--rows", "scratch", "--labelled", "1")
    new("--rows", "scratch", "--labelled", "1", "--seeds", "2", name="study2")
    _edit(folder / "study.json", lambda content: content["rows"][0]["runs"][0].update(fold=1))
    with pytest.raises(ValueError, match="scratch: fold 1 has not 1 labelled cases"):
        Steps(read_study(folder)).check()


def test_any_two_rows_can_be_compared(new, marks, capsys):
    folder = new("--rows", "scratch", "topomae", "spatial", "--labelled", "1", "--test", "2")
    said = refused(["study", "compare", folder, "topomae", "spatial"], capsys)
    assert said == f"Error: {folder}/results.csv has nothing about topomae yet; run the study first\n"
    assert run(folder) == 0
    capsys.readouterr()
    assert cli.main(["study", "compare", str(folder), "topomae", "spatial"]) == 0
    title, _, heading, *lines = capsys.readouterr().out.splitlines()
    assert title == "topomae - spatial"
    assert " ".join(heading.split()) == (
        "measure labelled difference 95 % interval p, t-test p, Wilcoxon cases by seed"
    )
    table = read_results(read_study(folder))
    dice = {
        row: np.mean([record.measures.dice for record in table if record.row == row]) for row in ("topomae", "spatial")
    }
    assert lines[0].split()[:3] == ["Dice", "1", f"{dice['topomae'] - dice['spatial']:+.3f}"]
    said = refused(["study", "compare", folder, "topomae", "nobody"], capsys)
    assert said == f"Error: there is no row nobody in {folder}; there are scratch, topomae, spatial\n"


def test_labelled_cases_are_drawn_once_where_all_are_labelled(workspace, no_split, new):
    study = read_study(new("--rows", "scratch", "--seeds", "2"))
    assert [(run_.seed, run_.fold) for run_ in study.rows[0].runs] == [(0, 0), (1, 0)]
    assert len(read_splits(workspace.preprocessed)) == 1


def test_an_existing_split_can_have_a_draw_for_every_seed(workspace, no_split, new, tmp_path, capsys):
    other = [{**ONE, "train": [1], "unlabelled": [0, 2]}, {**ONE, "train": [0, 1], "unlabelled": [2]}]
    no_split.write_text(json.dumps(_folds(workspace, ONE, TWO, *other)))
    study = read_study(_existing(tmp_path / "study", 2))
    assert study.label_counts == [1, 2]
    assert [(run_.seed, run_.fold) for run_ in study.rows[0].runs] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert [run_.fold for run_ in read_study(_existing(tmp_path / "study1", 1)).rows[0].runs] == [0, 1]
    said = refused(["study", "new", tmp_path / "study3", "-d", 998, *EXISTING[:2], "--existing_split"], capsys)
    assert said == (
        f"Error: {no_split} draws labelled cases 2 times, but the study has 3 seeds; make it with --seeds 2, or add "
        f"draws to the file\n"
    )


def test_a_study_can_take_some_numbers_of_labels_of_an_existing_split(workspace, no_split, new, tmp_path):
    other = [{**ONE, "train": [1], "unlabelled": [0, 2]}, {**ONE, "train": [0, 1], "unlabelled": [2]}]
    no_split.write_text(json.dumps(_folds(workspace, ONE, TWO, *other)))
    study = read_study(_existing(tmp_path / "study", 2, "--labelled", "2"))
    assert study.label_counts == [2]
    assert [(each.labelled, each.seed, each.fold) for each in study.rows[0].runs] == [(2, 0, 1), (2, 1, 3)]
    Steps(study).check()


def test_an_existing_split_with_one_draw_serves_all_seeds(workspace, no_split, new, tmp_path):
    no_split.write_text(json.dumps(_folds(workspace, ONE, TWO)))
    study = read_study(_existing(tmp_path / "study", 2))
    assert [(run_.seed, run_.fold) for run_ in study.rows[0].runs] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def _existing(folder: Path, num_seeds: int, *more: str) -> Path:
    arguments = ["--rows", "scratch", "--seeds", str(num_seeds), "--existing_split", *more]
    assert cli.main(["study", "new", str(folder), "-d", "998", *arguments]) == 0
    return folder


@pytest.mark.parametrize(
    ("folds", "arguments", "sentence"),
    [
        ([], [], "{file} does not exist; write it, or let the cases be drawn"),
        (
            [ONE, TWO],
            ["--labelled", "1", "3"],
            "{file} has no fold with 3 labelled cases; give --labelled some of 1 2, or leave it out",
        ),
        ([ONE], ["--split_seed", "0"], "--existing_split says which cases are held out; leave --split_seed out"),
        *(
            ([{**ONE, part: []}], [], f"{{file}}: {part} of fold 0 has no cases; add some")
            for part in ("train", "val", "test")
        ),
        ([{**ONE, "test": [3]}], [], "{file}: {cases[3]} is in fold 0 twice; let every case have one use"),
        ([{**ONE, "train": [0, 0]}], [], "{file}: {cases[0]} is in fold 0 twice; let every case have one use"),
        (
            [ONE, {**TWO, "train": [1, 2], "unlabelled": [0]}],
            [],
            "{file}: train of fold 1 must hold train of fold 0 and more cases",
        ),
        *(
            (
                folds,
                [],
                f"{{file}}: folds have {sizes} labelled cases; let each draw have the numbers of the first, {first}, "
                f"rising",
            )
            for folds, sizes, first in (
                ([TWO, ONE], "2, 1", "2"),
                ([ONE, TWO, ONE], "1, 2, 1", "1, 2"),
                ([ONE, TWO, TWO, ONE], "1, 2, 2, 1", "1, 2"),
            )
        ),
        (
            [ONE, TWO, ONE, TWO],
            [],
            "{file}: fold 2 has the labelled cases of an earlier draw; label others in it, or remove the folds of this "
            "draw",
        ),
        *(
            (
                [ONE, {**TWO, **change}],
                [],
                "{file}: fold 1 must have the test, the val and all other cases of fold 0; folds may differ only in "
                "which of the other cases are in train and which in unlabelled",
            )
            for change in ({"unlabelled": []}, {"test": [3], "val": [4]}, {"val": [1], "unlabelled": [3]})
        ),
    ],
)
def test_an_existing_split_must_be_one_of_label_counts(
    workspace, no_split, tmp_path, capsys, folds, arguments, sentence
):
    if folds:
        no_split.write_text(json.dumps(_folds(workspace, *folds)))
    said = refused(["study", "new", tmp_path / "study", "-d", 998, *EXISTING, *arguments], capsys)
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (workspace.raw / "labelsTr").iterdir())
    assert said == f"Error: {sentence.format(file=no_split, cases=cases)}\n"
    assert not (tmp_path / "study").exists()


@pytest.fixture
def added(workspace):
    """Another image of every patient, added without its label; the names of the patients."""
    folder = workspace.preprocessed / "nnUNetTopoMAEPlans_3d_fullres_unlabelled"
    patients = sorted(file.name.removesuffix(".nii.gz") for file in (workspace.raw / "labelsTr").iterdir())
    folder.mkdir()
    for patient in patients:
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (folder / f"{patient}_later{ending}").touch()
    yield patients
    shutil.rmtree(folder)


@pytest.mark.parametrize("existing", [True, False], ids=["existing split", "drawn split"])
def test_images_of_held_out_patients_are_refused(workspace, no_split, added, tmp_path, capsys, existing):
    arguments = ["--rows", "scratch", "--val", "1", "--test", "1", "--patient", r"phantom_\d+"]
    if existing:
        no_split.write_text(json.dumps([{**_folds(workspace, ONE)[0], "patient": r"phantom_\d+"}]))
        arguments = EXISTING
    before = snapshot(workspace.folder)
    said = refused(["study", "new", tmp_path / "study", "-d", 998, *arguments], capsys)
    patient = said.removeprefix("Error: the added image ").partition("_later")[0]
    assert said == (
        f"Error: the added image {patient}_later is of the same patient as {patient}, which is held out; remove it "
        f"with nnUNetv2_topomae add_unlabelled --remove {patient}_later, or hold out other cases\n"
    )
    assert patient == added[3] if existing else patient in added
    assert snapshot(workspace.folder) == before
    assert not (tmp_path / "study").exists()


def test_an_existing_split_names_cases_of_the_dataset_only(workspace, no_split, tmp_path, capsys):
    no_split.write_text(json.dumps([{**_folds(workspace, ONE)[0], "test": ["nobody"]}]))
    said = refused(["study", "new", tmp_path / "study", "-d", 998, *EXISTING], capsys)
    assert said == f"Error: {no_split}: nobody in fold 0 is no case of the dataset; correct its name\n"


def test_what_is_there_already_is_kept(workspace, study, tmp_path, capsys):
    again = ["study", "new", study, "-d", 998, "--val", 1, "--test", 1, "--preset", "labels", "--labelled", 1, 3]
    again += ["--seeds", 1]
    before = snapshot(workspace.folder)
    assert "is there already, and is not empty; name a new folder" in refused(again, capsys)
    elsewhere = [*again[:2], tmp_path / study.name, *again[3:]]
    assert f"{workspace.preprocessed}/study_scratch_seed0.json is there already" in refused(elsewhere, capsys)
    other_split = [*again[:2], tmp_path / "study2", *again[3:], "--split_seed", 1]
    assert "splits_final.json is there already with other cases" in refused(other_split, capsys)
    assert snapshot(workspace.folder) == before


def _with_stand_ins(marks) -> dict[str, str]:
    """An environment in which the stand-ins are found first."""
    return {**os.environ, "PATH": f"{marks}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_commands_do_what_run_does(study, marks, capsys, workspace):
    capsys.readouterr()
    assert cli.main(["study", "commands", str(study), "--device", "cpu"]) == 0
    script = capsys.readouterr().out
    environment = _with_stand_ins(marks)
    subprocess.run(["bash", "-c", script], check=True, env=environment, stdout=subprocess.DEVNULL)
    assert len(commands(marks)) == 9
    assert (study / "answer.json").is_file()
    assert run(study) == 0
    assert len(commands(marks)) == 9  # nothing was missing


@pytest.fixture
def task(study, marks, capsys):
    """Runs a task of one of the job arrays that a script for SLURM has submitted."""
    capsys.readouterr()
    assert cli.main(["study", "commands", str(study), "--device", "cpu", "--slurm=--gres=gpu:1"]) == 0
    script = capsys.readouterr().out
    sbatch = marks / "sbatch"  # keeps what is submitted
    sbatch.write_text(
        f'#!/usr/bin/env bash\necho "$*" >> {marks}/submitted\nn=$(wc -l < {marks}/submitted)\n'
        f'[[ "$*" == *--wrap* ]] || cat > {marks}/job$n\necho $n\n'
    )
    sbatch.chmod(0o755)
    environment = _with_stand_ins(marks)
    subprocess.run(["bash", "-c", script], check=True, env=environment, stdout=subprocess.DEVNULL)

    def run_task(job: int, number: int) -> None:
        of_task = {**environment, "SLURM_ARRAY_TASK_ID": str(number)}
        subprocess.run(["bash", str(marks / f"job{job}")], check=True, env=of_task, stdout=subprocess.DEVNULL)

    return run_task


def test_slurm_arrays_wait_for_pretrainings(task, marks):
    submitted = (marks / "submitted").read_text().splitlines()
    assert submitted[:3] == [
        "--parsable --job-name=pretrainings --array=0-0 --gres=gpu:1",
        "--parsable --job-name=waiting --array=0-1 --dependency=afterany:1 --gres=gpu:1",
        "--parsable --job-name=others --array=0-1 --gres=gpu:1",
    ]
    assert submitted[3].startswith("--dependency=afterany:2:3 --job-name=measure --wrap nnUNetv2_topomae study measure")
    task(1, 0)
    task(2, 1)
    assert [each.split()[-1] for each in commands(marks)] == ["0", "1", "-c"]


def test_a_task_that_slurm_starts_again_goes_on(task, study, marks, workspace):
    """The script was printed when nothing had been trained yet."""

    def last_words() -> list[str]:
        return [line.split()[-1] for line in (marks / "commands").read_text().splitlines()]

    fold = workspace.results / "TopoMAEPretrainer__study_topomae_seed0__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_best.pth").touch()
    task(1, 0)
    assert last_words() == ["--c"]
    shutil.rmtree(fold / "validation")
    task(1, 0)
    assert last_words() == ["--c", "--val"]
    task(1, 0)  # is complete
    task(2, 0)
    task(2, 0)  # fine-tuned and predicted
    assert last_words() == ["--c", "--val", str(fold / "checkpoint_final.pth"), "3"]  # the last: -nps
    assert [file.name for file in (study / "predictions").iterdir()] == ["topomae_1_seed0"]


def test_a_new_tolerance_measures_again(study, marks):
    assert run(study) == 0
    before = (study / "results.csv").read_text()
    _edit(study / "study.json", lambda content: content.update(nsd_tolerance=4.0))
    assert cli.main(["study", "measure", str(study)]) == 0
    after = (study / "results.csv").read_text()
    assert after != before
    assert all(line["nsd"] == "1" for line in csv.DictReader(after.splitlines()))  # the shift is 2 mm


def test_what_cannot_be_measured_again_is_not_lost(study, marks, capsys):
    assert run(study) == 0
    shutil.rmtree(study / "predictions" / "scratch_1_seed0")
    before = (study / "results.csv").read_bytes()
    assert cli.main(["study", "measure", str(study)]) == 0
    assert (study / "results.csv").read_bytes() == before
    _edit(study / "study.json", lambda content: content.update(nsd_tolerance=4.0))
    capsys.readouterr()
    assert refused(["study", "measure", study], capsys) == (
        f"Error: {study}/predictions/scratch_1_seed0 is gone, so it cannot be measured again, though nsd_tolerance or "
        f"test_cases have changed; restore it or these, or move {study}/results.csv away\n"
    )
    assert (study / "results.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("iterations", "num_epochs", "per_epoch"),
    [
        (1, 1, 1),
        (6, 6, 1),
        (99, 11, 9),
        (100, 10, 10),
        (600, 10, 60),
        (1500, 10, 150),
        (2600, 13, 200),
        (5000, 20, 250),
        (250_000, 1000, 250),
        (101, 10, 10),  # primes: as near as whole epochs come
        (2503, 10, 250),
    ],
)
def test_schedules(iterations, num_epochs, per_epoch):
    found = schedule(iterations)
    assert (found["num_epochs"], found["num_iterations_per_epoch"]) == (num_epochs, per_epoch)


def test_folds_and_steps_are_said(new, capsys, workspace):
    new("--rows", "scratch", "--labelled", "1", "2", "--iterations", "101", "--pretraining_iterations", "2600")
    said = capsys.readouterr().out
    assert f"\n  cases of folds 0, 1 of {workspace.preprocessed}/splits_final.json\n" in said
    assert "\n  100 steps of every fine-tuning, 2600 of every pre-training\n" in said


def test_differences_are_of_what_can_be_compared():
    rows = {
        "one": {"network": "A", "architecture.width": 4, "finetuning.trainer": "T"},
        "two": {"network": "A", "architecture.width": 8, "finetuning.trainer": "T", "pretraining.ratio": 0.5},
        "three": {"network": "B", "architecture.width": 9, "finetuning.trainer": "T", "pretraining.ratio": 0.5},
    }
    assert differences(rows) == {
        "one": {"network": "A", "architecture.width": 4},
        "two": {"network": "A", "architecture.width": 8},
        "three": {"network": "B"},
    }
