"""What users get for bad files, plans, checkpoints and command lines: one sentence, and nothing is left behind."""

import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_topomae.commands import cli
from workspace import DATASET

PLANS = "nnUNetTopoMAEPlans"
PLAN = ["plan_and_preprocess", "-c", "3d_fullres", "-np", "1", "-npfp", "1", "--no_pbar", "-d"]


def _files(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in sorted(folder.rglob("*")) if file.is_file()}


def _command(arguments, capsys) -> str:
    """What a command line that must fail prints on standard error."""
    try:
        status = cli.main(list(map(str, arguments)))
    except SystemExit as stop:  # argparse
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in said
    assert said.strip()
    return said


COMMAND_LINES = {
    "no such dataset": ([*PLAN, "555"], "Could not find a dataset with the ID 555"),
    "2d": (["plan_and_preprocess", "-d", "998", "-c", "2d"], "TopoMAE is made for 3D images and has no 2d"),
    "no such configuration": (["plan_and_preprocess", "-d", "998", "-c", "3d_lores"], "-c 3d_lores: there is no such"),
    "no such planner": ([*PLAN, "998", "-pl", "NoPlanner"], "-pl NoPlanner: there is no such planner in"),
    "no such preprocessor": ([*PLAN, "998", "-preprocessor_name", "No"], "there is no preprocessor No"),
    "too little memory": ([*PLAN, "998", "-gpu_memory_target", "0.1"], "no crop fits into 0.1 GB; raise -gpu_memory"),
    "no memory": ([*PLAN, "998", "-gpu_memory_target", "0"], "-gpu_memory_target: invalid positive number value: '0'"),
    "memory is no number": ([*PLAN, "998", "-gpu_memory_target", "8GB"], "invalid positive number value: '8GB'"),
    "spacing of 0": ([*PLAN, "998", "-overwrite_target_spacing", "0", "1", "1"], "invalid positive number value: '0'"),
    "no processes": ([*PLAN, "998", "-npfp", "0"], "-npfp: invalid positive whole number value: '0'"),
    "no dataset": (["plan_and_preprocess"], "the following arguments are required: -d"),
    "no command": ([], "the following arguments are required: COMMAND"),
    "unlabelled: no plans": (["add_unlabelled", "-d", 998, "-p", "No", "--list"], "No.json does not exist; plan the"),
    "unlabelled: no configuration": (["add_unlabelled", "-d", 998, "-c", "4d", "--list"], "no 3D configuration 4d"),
    "unlabelled: no folder": (["add_unlabelled", "-d", 998, "-i", "nowhere"], "nowhere holds no image named CASE_0000"),
    "unlabelled: no action": (["add_unlabelled", "-d", 998], "one of the arguments -i --list --remove is required"),
    "unlabelled: no case": (["add_unlabelled", "-d", 998, "--remove", "x"], "there is no unlabelled case x in"),
    "adapt: no checkpoint": (["adapt", "no.pth", "-d", 998, "-o", "o.pth"], "no.pth does not exist"),
    "adapt: no output": (["adapt", "no.pth", "-d", "998"], "the following arguments are required: -o"),
    "splits: letters": (["splits", "-d", "998", "-s", "most"], 'shares must be numbers of cases, such as 18/12, or'),
    "splits: too many": (["splits", "-d", "998", "-s", "18/12"], "18/12 sums to 30, but the dataset has 5 cases"),
    "demo: folder in use": (["demo", "--keep", Path(__file__).parent], "is not empty; name a new folder"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), COMMAND_LINES.values(), ids=COMMAND_LINES.keys())
def test_command_lines(workspace, pretrained, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (workspace.preprocessed / "splits_final.json").unlink(missing_ok=True)
    before = _files(workspace.folder)
    assert message in _command(arguments, capsys)
    assert _files(workspace.folder) == before
    assert not list(tmp_path.iterdir())


def _image(dataset, name="phantom_002_0000") -> Path:
    return dataset / "imagesTr" / f"{name}.nii.gz"


def _rewrite(file, voxels=None, **header):
    """Change voxels or header of a NIfTI file."""
    image = nibabel.load(file)
    new = nibabel.Nifti1Image(np.asanyarray(image.dataobj) if voxels is None else voxels, image.affine)
    for key, value in header.items():
        new.header[key][1:4] = value
    nibabel.save(new, file)


def _describe(dataset, **changes):
    """Edit dataset.json; None removes a key."""
    content = json.loads((dataset / "dataset.json").read_text())
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    (dataset / "dataset.json").write_text(json.dumps(content))


def _truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FILES = {
    "image holds NaN": (
        lambda d: _rewrite(_image(d), np.full((48, 48, 32), np.nan, np.float32)),
        "phantom_002_0000.nii.gz holds NaN or inf",
    ),
    "image is cut off": (lambda d: _truncate(_image(d)), "phantom_002_0000.nii.gz cannot be read: "),
    "image is no image": (
        lambda d: _image(d).write_bytes(gzip.compress(b"no image")),
        "phantom_002_0000.nii.gz cannot be read: ",
    ),
    "image is empty": (lambda d: _image(d).write_bytes(b""), "phantom_002_0000.nii.gz cannot be read: "),
    "spacing of 0": (lambda d: _rewrite(_image(d), pixdim=(0, 1, 1)), "phantom_002_0000.nii.gz has a spacing of (0.0"),
    "label is missing": (
        lambda d: (d / "labelsTr" / "phantom_002.nii.gz").unlink(),
        "phantom_002.nii.gz does not exist; images without labels are added with nnUNetv2_topomae add_unlabelled",
    ),
    "label is cut off": (lambda d: _truncate(d / "labelsTr" / "phantom_002.nii.gz"), "phantom_002.nii.gz cannot be re"),
    "label of another size": (
        lambda d: _rewrite(d / "labelsTr" / "phantom_002.nii.gz", np.zeros((48, 48, 30), np.uint8)),
        "phantom_002.nii.gz has (48, 48, 30) voxels, but phantom_002_0000.nii.gz has (48, 48, 32)",
    ),
    "channel too many": (
        lambda d: shutil.copy(_image(d), _image(d, "phantom_002_0001")),
        "and the other channels of its case are 2, but there should be 1",
    ),
    "no images": (lambda d: shutil.rmtree(d / "imagesTr"), "imagesTr does not exist"),
    "no image of that ending": (lambda d: _describe(d, file_ending=".nrrd"), "holds no image named CASE_0000.nrrd"),
    "no dataset.json": (lambda d: (d / "dataset.json").unlink(), "dataset.json does not exist"),
    "dataset.json is no JSON": (
        lambda d: (d / "dataset.json").write_text('{"labels": {,}'),
        "dataset.json is no valid JSON: Expecting property name",
    ),
    "dataset.json is a list": (lambda d: (d / "dataset.json").write_text("[]"), "must hold a JSON object, got list"),
    "no labels": (lambda d: _describe(d, labels=None), 'dataset.json has no "labels" (names and values of the labels)'),
    "no channels": (lambda d: _describe(d, channel_names=None), 'dataset.json has no "channel_names", such as'),
    "no ending": (lambda d: _describe(d, file_ending=None), 'dataset.json has no "file_ending" (such as ".nii.gz")'),
    "wrong number of cases": (lambda d: _describe(d, numTraining=7), 'says "numTraining": 7, but there are 5 training'),
}


@pytest.mark.parametrize(("spoil", "message"), FILES.values(), ids=FILES.keys())
def test_files(workspace, capsys, spoil, message):
    dataset = workspace.folder / "raw" / "Dataset996_Spoilt"
    preprocessed = workspace.folder / "preprocessed" / dataset.name
    shutil.copytree(workspace.folder / "raw" / DATASET, dataset)
    try:
        spoil(dataset)
        assert message in _command([*PLAN, "996"], capsys)
        assert not preprocessed.exists() or not _files(preprocessed)
    finally:
        shutil.rmtree(dataset)
        shutil.rmtree(preprocessed, ignore_errors=True)


def _network(configuration, **changes):
    configuration["architecture"]["arch_kwargs"].update(changes)


def _vit(configuration, **changes):
    configuration["architecture"]["arch_kwargs"]["vit"].update(changes)


PLANS_EDITS = {
    "misspelt argument of the network": (lambda c: _network(c, fusion_gian=1), "fusion_gian"),
    "taps out of range": (lambda c: _network(c, taps=[0, 1, 9]), "taps must be three increasing blocks"),
    "taps in disorder": (lambda c: _network(c, taps=[2, 1, 0]), "taps must be three increasing blocks"),
    "four strides": (lambda c: _network(c, strides=[[1, 1, 1]] + [[2, 2, 2]] * 3), "five strides"),
    "strides that do not divide": (lambda c: _network(c, strides=[[1, 1, 1], [5, 2, 2]] + [[1] * 3] * 3), "not divisi"),
    "heads that do not divide": (lambda c: _vit(c, num_heads=5), "ViT width 32 is not divisible by 5 heads"),
    "shallow ViT": (lambda c: _vit(c, depth=3), "a ViT needs at least 4 blocks"),
    "misspelt argument of the ViT": (lambda c: _vit(c, widht=3), "widht"),
    "one adapter too few": (lambda c: _network(c, pyramid_channels=[8, 8, 8]), "pyramid_channels"),
    "channels of UNETR++ without heads": (lambda c: _network(c, features_per_stage=[8, 8, 16, 18]), "divisible"),
    "no such network": (
        lambda c: c["architecture"].update(network_class_name="nnunet_topomae.networks.none.None"),
        "nnunet_topomae.networks.none.None",
    ),
    "crop and patch_size differ": (lambda c: c.update(patch_size=[32, 32, 32]), "must be equal"),
    "patch_size is a number": (
        lambda c: c.update(patch_size=96),
        "patch_size must be a list of whole numbers",
    ),
    "half a batch": (lambda c: c.update(batch_size=0.5), "batch_size must be"),
    "unknown key": (lambda c: c["pretraining"].update(epochs=3), "unknown key pretraining.epochs in the plans"),
    "own block missing": (lambda c: c.update(pretraining=None), "pretraining must be a block of settings, got None"),
    "datasets of text": (lambda c: c["pretraining"].update(datasets=["7"]), "must be a list of dataset IDs, got"),
}


@pytest.mark.parametrize(("edit", "message"), PLANS_EDITS.values(), ids=PLANS_EDITS.keys())
@pytest.mark.parametrize("trainer", ["TopoMAEPretrainer", "FusedFinetuneTrainer"])
def test_plans(workspace, trainer, edit, message):
    plans = workspace.write_plans("Spoilt", edit)
    before = _files(workspace.folder)
    with pytest.raises(ValueError, match='plans "Spoilt", configuration "3d_fullres": ') as error:
        workspace.trainer(trainer, plans)
    assert message in str(error.value)
    assert _files(workspace.folder) == before


def test_a_topology_grid_that_does_not_fit(workspace):
    plans = workspace.write_plans("Spoilt", lambda c: c["pretraining"]["topology"].update(grid=[99, 9, 9]))
    with pytest.raises(ValueError, match=r"topology grid \(99, 9, 9\) does not fit a crop of \(24, 32, 32\) voxels"):
        workspace.trainer("TopoMAEPretrainer", plans)


def _with(**changes):
    def edit(file):
        torch.save({**torch.load(file, weights_only=True), **changes}, file)

    return edit


def _without(key):
    def edit(file):
        content = torch.load(file, weights_only=True)
        del content[key]
        torch.save(content, file)

    return edit


class _Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


CHECKPOINTS = {
    "missing": (lambda file: file.unlink(), "does not exist"),
    "empty": (lambda file: file.write_bytes(b""), "weights.pth is "),
    "cut off": (lambda file: _truncate(file), "is damaged, truncated or no checkpoint"),
    "text": (lambda file: file.write_text("weights"), "weights.pth is "),
    "code": (
        lambda file: file.write_bytes(pickle.dumps(_Code(), protocol=2)),
        "is not loaded because it could execute",
    ),
    "a list": (lambda file: torch.save([1, 2], file), 'is no nnU-Net checkpoint: it has no "network_weights"'),
    "of another network": (_with(network_weights={"a": torch.ones(1)}), "is of another architecture than the plans"),
}


@pytest.mark.parametrize(("spoil", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
@pytest.mark.parametrize("trainer", ["TopoMAEPretrainer", "FusedFinetuneTrainer"])
def test_pretrained_weights(workspace, pretrained, tmp_path, monkeypatch, trainer, spoil, message):
    file = tmp_path / "weights.pth"
    shutil.copy(workspace.checkpoint("TopoMAEPretrainer"), file)
    spoil(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "998", "-pretrained_weights", str(file)])
    with pytest.raises(ValueError, match=r"weights\.pth") as error:
        workspace.trainer(trainer, fold=4).initialize()
    assert message in str(error.value)
    assert not (tmp_path / "executed").exists()


RESUMED = {
    "cut off": (_truncate, "is damaged, truncated or no checkpoint"),
    "of nnU-Net's trainer": (_without("random_state"), "was not written by TopoMAEPretrainer"),
    "of other plans": (_with(network_weights={"a": torch.ones(1)}), "was written with other plans than the present"),
}


@pytest.mark.parametrize(("spoil", "message"), RESUMED.values(), ids=RESUMED.keys())
def test_checkpoints_to_continue_from(workspace, pretrained, spoil, message):
    plans = workspace.write_plans("Continued", lambda configuration: None)
    file = workspace.checkpoint("TopoMAEPretrainer", plans, name="latest")
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(workspace.checkpoint("TopoMAEPretrainer"), file)
    spoil(file)
    trainer = workspace.trainer("TopoMAEPretrainer", plans, continue_training=True)
    with pytest.raises(ValueError, match=message):
        maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)


def test_folders_that_are_not_named(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    command = [sys.executable, "-m", "nnunet_topomae.cli", "plan_and_preprocess", "-d", "4"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert "nnUNet_raw" in result.stderr
    assert "Traceback" not in result.stderr
