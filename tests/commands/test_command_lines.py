"""Command lines that cannot be run: one sentence, exit status 2, and nothing is written."""

import os
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest

from nnunet_topomae import planners
from unplanned import trace_quickly
from workspace import ANYTHING, PLAN, refused, says, snapshot

HERE = Path(__file__).parent
SENTENCES = {  # after "Error: "; ours
    "2d": (
        ["plan_and_preprocess", "-d", "998", "-c", "2d"],
        "-c 2d: these plans are for 3D images and have no 2d configuration; use 3d_fullres",
    ),
    "no such dataset": (
        [*PLAN, "555"],
        "there is no dataset 555: neither $folder/raw nor $folder/preprocessed has a folder Dataset555_NAME; correct "
        "the number, or these folders, which are nnUNet_raw and nnUNet_preprocessed",
    ),
    "no such configuration": (
        ["plan_and_preprocess", "-d", "998", "-c", "3d_lores"],
        "-c 3d_lores: there is no such configuration; use 3d_fullres or 3d_lowres",
    ),
    "as many numbers of processes as nnU-Net's default has": (
        ["plan_and_preprocess", "-d", "998", "-c", "3d_fullres", "-np", "8", "4", "8"],
        "-np 8 4 8: give one number for all configurations, or one for each of 3d_fullres",
    ),
    "no such planner": (
        [*PLAN, "998", "-pl", "NoPlanner"],
        "-pl NoPlanner: there is no such planner in $planners; for nnU-Net's own planners use nnUNetv2_plan_experiment",
    ),
    "another dataset than the paper's": (
        [*PLAN, "998", "-pl", "TopoMAEPlannerSynapse", "--clean"],
        "Dataset998_Phantom: TopoMAEPlannerSynapse is made for one CT channel and 9 labels (with the background), but "
        "this dataset has CT and 5 labels; use TopoMAEPlanner",
    ),
    "no such preprocessor": (
        [*PLAN, "998", "-preprocessor_name", "No"],
        "-preprocessor_name No: there is no preprocessor No in nnU-Net",
    ),
    "too little memory": (
        [*PLAN, "998", "-gpu_memory_target", "0.1"],
        "Dataset998_Phantom: no crop fits into 0.1 GB; raise -gpu_memory_target",
    ),
    "unlabelled: no plans": (
        ["add_unlabelled", "-d", 998, "-p", "No", "--list"],
        "$preprocessed/No.json does not exist; plan the dataset with nnUNetv2_topomae plan_and_preprocess -d 998, or "
        "bring plans from another one with nnUNetv2_move_plans_between_datasets and copy dataset.json and "
        "dataset_fingerprint.json from it",
    ),
    "unlabelled: no configuration": (
        ["add_unlabelled", "-d", 998, "-c", "4d", "--list"],
        "nnUNetTopoMAEPlans has no 3D configuration 4d; it has 3d_fullres",
    ),
    "unlabelled: no folder": (
        ["add_unlabelled", "-d", 998, "-i", "nowhere"],
        "nowhere holds no image named CASE_0000.nii.gz, as the dataset's dataset.json asks for",
    ),
    "unlabelled: no case": (
        ["add_unlabelled", "-d", 998, "--remove", "x"],
        "there is no unlabelled case x in $preprocessed/nnUNetTopoMAEPlans_3d_fullres_unlabelled",
    ),
    "adapt: no checkpoint": (["adapt", "no.pth", "-d", 998, "-o", "o.pth"], "no.pth does not exist"),
    "splits: letters": (
        ["splits", "-d", "998", "-s", "most"],
        'shares must be numbers of cases, such as 18/12, or percentages, such as 80:15:5, got "most"',
    ),
    "splits: too many": (
        ["splits", "-d", "998", "-s", "18/12"],
        "18/12 sums to 30, but the dataset has 5 cases",
    ),
    "splits: nothing asked for": (
        ["splits", "-d", "998"],
        "splits takes either -s SHARES, or --labelled N or --nested N N ..., and only with these --val, --test and "
        "--patient",
    ),
    "splits: two forms": (
        ["splits", "-d", "998", "-s", "4/1", "--test", "1"],
        "splits takes either -s SHARES, or --labelled N or --nested N N ..., and only with these --val, --test and "
        "--patient",
    ),
    "splits: more labelled cases than there are": (
        ["splits", "-d", "998", "--nested", "1", "4", "--val", "1", "--test", "1"],
        "4 labelled cases, 1 validation and 1 test cases are more than the dataset's 5 cases",
    ),
    "splits: no pattern": (
        ["splits", "-d", "998", "--labelled", "1", "--val", "1", "--patient", "("],
        f"the patient must be a regular expression, got '(': {ANYTHING}",
    ),
    "splits: a name without a patient": (
        ["splits", "-d", "998", "--labelled", "1", "--val", "1", "--patient", "phantom_00[1-4]"],
        'the pattern of patients "phantom_00[1-4]" finds none in the name of case phantom_000; give one that '
        "finds the patient in every name",
    ),
    "splits: patients that cannot be kept whole": (
        ["splits", "-d", "998", "--labelled", "1", "--val", "1", "--patient", "phantom"],
        "--val 1 would divide a patient; 0 does not, or try another --seed",
    ),
    "demo: folder in use": (["demo", "--keep", HERE], f"{HERE} is not empty; name a new folder"),
}
USAGES = {  # the last line, after a usage message; by argparse
    "no memory": (
        [*PLAN, "998", "-gpu_memory_target", "0"],
        "plan_and_preprocess: error: argument -gpu_memory_target: invalid positive number value: '0'",
    ),
    "memory is no number": (
        [*PLAN, "998", "-gpu_memory_target", "8GB"],
        "plan_and_preprocess: error: argument -gpu_memory_target: invalid positive number value: '8GB'",
    ),
    "spacing of 0": (
        [*PLAN, "998", "-overwrite_target_spacing", "0", "1", "1"],
        "plan_and_preprocess: error: argument -overwrite_target_spacing: invalid positive number value: '0'",
    ),
    "no processes": (
        [*PLAN, "998", "-npfp", "0"],
        "plan_and_preprocess: error: argument -npfp: invalid positive whole number value: '0'",
    ),
    "no dataset": (
        ["plan_and_preprocess"],
        "plan_and_preprocess: error: the following arguments are required: -d",
    ),
    "unlabelled: no action": (
        ["add_unlabelled", "-d", 998],
        "add_unlabelled: error: one of the arguments -i --list --remove is required",
    ),
    "splits: no labelled case": (
        ["splits", "-d", "998", "--nested", "0", "1"],
        "splits: error: argument --nested: invalid positive whole number value: '0'",
    ),
    "adapt: no output": (
        ["adapt", "no.pth", "-d", "998"],
        "adapt: error: the following arguments are required: -o",
    ),
}


@pytest.fixture
def unchanged(workspace, monkeypatch, tmp_path):
    """Runs a test in an empty folder, and makes sure that it writes nothing there or into nnU-Net's folders."""
    monkeypatch.chdir(tmp_path)
    before = snapshot(workspace.folder)
    yield
    assert snapshot(workspace.folder) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "sentence"), SENTENCES.values(), ids=SENTENCES.keys())
def test_what_cannot_be_done_is_one_sentence(workspace, no_split, unchanged, monkeypatch, capsys, arguments, sentence):
    trace_quickly(monkeypatch)
    folders = {"preprocessed": workspace.preprocessed, "folder": workspace.folder, "planners": planners.__path__[0]}
    expected = Template(sentence).substitute(folders)
    said = refused(arguments, capsys)
    assert says(said, f"Error: {expected}\n"), said


@pytest.mark.parametrize(("arguments", "line"), USAGES.values(), ids=USAGES.keys())
def test_options_that_are_wrong_are_named_below_the_usage(workspace, unchanged, capsys, arguments, line):
    said = refused(arguments, capsys)
    assert said.startswith(f"usage: nnUNetv2_topomae {arguments[0]} ")
    assert said.splitlines()[-1] == f"nnUNetv2_topomae {line}"


def test_a_command_must_be_named(capsys):
    assert refused([], capsys).splitlines()[-1] == (
        "nnUNetv2_topomae: error: the following arguments are required: COMMAND"
    )


def test_folders_that_are_not_named(tmp_path):
    """The message is nnU-Net's."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    command = [sys.executable, "-m", "nnunet_topomae.commands.cli", "plan_and_preprocess", "-d", "4"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert "nnUNet_raw" in result.stderr
    assert "Traceback" not in result.stderr
