"""What is wrong with the files of a raw dataset is said in one sentence, before anything is written."""

import gzip
import json
import shutil
from pathlib import Path
from string import Template

import nibabel
import numpy as np
import pytest

from workspace import ANYTHING, PLAN, refused, says, snapshot, truncate


def _image(dataset, name="phantom_002_0000") -> Path:
    return dataset / "imagesTr" / f"{name}.nii.gz"


def _label(dataset) -> Path:
    return dataset / "labelsTr" / "phantom_002.nii.gz"


def _rewrite(file, voxels=None, **header):
    """Change voxels or header of a NIfTI file."""
    image = nibabel.load(file)
    new = nibabel.Nifti1Image(np.asanyarray(image.dataobj) if voxels is None else voxels, image.affine)
    for key, value in header.items():
        new.header[key][1:4] = value
    nibabel.save(new, file)


def _flip(file):
    """Let the first axis point into the other direction."""
    image = nibabel.load(file)
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), image.affine @ np.diag([-1, 1, 1, 1])), file)


def _no_foreground(dataset):
    for file in (dataset / "labelsTr").iterdir():
        _rewrite(file, np.zeros((48, 48, 32), np.uint8))


def _describe(dataset, **changes):
    """Edit dataset.json; None removes a key."""
    content = json.loads((dataset / "dataset.json").read_text())
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    (dataset / "dataset.json").write_text(json.dumps(content))


DEFECTS = {
    "image holds NaN": (
        lambda d: _rewrite(_image(d), np.full((48, 48, 32), np.nan, np.float32)),
        "$image holds NaN or inf",
    ),
    "image is cut off": (lambda d: truncate(_image(d)), f"$image cannot be read: EOFError: {ANYTHING}"),
    "image is no image": (
        lambda d: _image(d).write_bytes(gzip.compress(b"no image")),
        f"$image cannot be read: ImageFileError: {ANYTHING}",
    ),
    "image is empty": (
        lambda d: _image(d).write_bytes(b""),
        f"$image cannot be read: ImageFileError: {ANYTHING}",
    ),
    "spacing of 0": (
        lambda d: _rewrite(_image(d), pixdim=(0, 1, 1)),
        "$image has a spacing of (0.0, 1.0, 1.0) mm",
    ),
    "label is missing": (
        lambda d: _label(d).unlink(),
        "$label does not exist; images without labels are added with nnUNetv2_topomae add_unlabelled",
    ),
    "label is cut off": (lambda d: truncate(_label(d)), f"$label cannot be read: EOFError: {ANYTHING}"),
    "label of another size": (
        lambda d: _rewrite(_label(d), np.zeros((48, 48, 30), np.uint8)),
        "$label has (48, 48, 30) voxels, not the (48, 48, 32) of phantom_002_0000.nii.gz",
    ),
    "a label that dataset.json lacks": (
        lambda d: _rewrite(_label(d), np.full((48, 48, 32), 9, np.uint8)),
        "$label holds the label 9, but dataset.json has 0, 1, 2, 3, 4",
    ),
    "half a label": (
        lambda d: _rewrite(_label(d), np.full((48, 48, 32), 0.5, np.float32)),
        "$label holds 0.5, but labels are whole numbers",
    ),
    "label of another spacing": (
        lambda d: _rewrite(_label(d), pixdim=(9, 1, 1)),
        f"$label has a spacing of (9, {ANYTHING}) mm of phantom_002_0000.nii.gz",
    ),
    "flipped label": (
        lambda d: _flip(_label(d)),
        "$label is oriented otherwise (its axes point into other directions) than phantom_002_0000.nii.gz",
    ),
    "scaled image": (
        lambda d: _rewrite(_image(d), np.full((48, 48, 32), 1e30, np.float32)),
        f"$image has values up to 1e+30, but most images of its channel up to {ANYTHING}",
    ),
    "channel too many": (
        lambda d: shutil.copy(_image(d), _image(d, "phantom_002_0001")),
        "$image and the other channels of its case are 2, but there should be 1",
    ),
}
DESCRIPTIONS = {
    "no images": (lambda d: shutil.rmtree(d / "imagesTr"), "$dataset/imagesTr does not exist"),
    "no image of that ending": (
        lambda d: _describe(d, file_ending=".nrrd"),
        "$dataset/imagesTr holds no image named CASE_0000.nrrd",
    ),
    "no dataset.json": (lambda d: (d / "dataset.json").unlink(), "$dataset/dataset.json does not exist"),
    "dataset.json is no JSON": (
        lambda d: (d / "dataset.json").write_text('{"labels": {,}'),
        f"$dataset/dataset.json is no valid JSON: {ANYTHING}",
    ),
    "dataset.json is a list": (
        lambda d: (d / "dataset.json").write_text("[]"),
        "$dataset/dataset.json must hold a JSON object, got list",
    ),
    "no labels": (
        lambda d: _describe(d, labels=None),
        '$dataset/dataset.json has no "labels" (names and values of the labels)',
    ),
    "no channels": (
        lambda d: _describe(d, channel_names=None),
        '$dataset/dataset.json has no "channel_names", such as {"0": "CT"}',
    ),
    "no ending": (
        lambda d: _describe(d, file_ending=None),
        '$dataset/dataset.json has no "file_ending" (such as ".nii.gz")',
    ),
    "number of cases in quotes": (
        lambda d: _describe(d, numTraining="5"),
        '$dataset/dataset.json says "numTraining": "5", which is no whole number; write "numTraining": 5',
    ),
    "gap between labels": (
        lambda d: _describe(d, labels={"background": 0, "tree": 2}),
        "$dataset/dataset.json: labels must count up from 0 without a gap, but they are [0, 2]; number them anew, in "
        "the files, too",
    ),
    "label in quotes": (
        lambda d: _describe(d, labels={"background": 0, "tree": "1"}),
        '$dataset/dataset.json: the label "tree" must be a whole number, got "1"',
    ),
    "blank after a channel": (
        lambda d: _describe(d, channel_names={"0": "CT "}),
        '$dataset/dataset.json has a channel "CT " with a blank before or after its name, by which nnU-Net would not '
        'know it and normalise it in another way; write "CT"',
    ),
    "no labelled voxel": (
        _no_foreground,
        "$dataset/labelsTr: no case has a labelled voxel; images without labels are added with nnUNetv2_topomae "
        "add_unlabelled",
    ),
    "wrong number of cases": (
        lambda d: _describe(d, numTraining=7),
        '$dataset/dataset.json says "numTraining": 7, but there are 5 training cases',
    ),
}


@pytest.fixture
def spoilt(workspace):
    """A copy of the raw dataset, to be spoilt."""
    dataset = workspace.folder / "raw" / "Dataset996_Spoilt"
    preprocessed = workspace.folder / "preprocessed" / dataset.name
    shutil.copytree(workspace.raw, dataset)
    yield dataset
    written = snapshot(preprocessed)
    shutil.rmtree(dataset)
    shutil.rmtree(preprocessed, ignore_errors=True)
    assert not written


def _refused(dataset, sentence, capsys) -> None:
    sentence = Template(sentence).substitute(dataset=dataset, image=_image(dataset), label=_label(dataset))
    said = refused([*PLAN, "996"], capsys)
    assert says(said, f"Error: {sentence}\n"), said


@pytest.mark.parametrize(("spoil", "defect"), DEFECTS.values(), ids=DEFECTS.keys())
def test_a_file_that_cannot_be_used_is_named(spoilt, capsys, spoil, defect):
    spoil(spoilt)
    files = "1 files of Dataset996_Spoilt cannot be used"
    _refused(spoilt, f"{files}: {defect}; mend or remove them, then run this command again", capsys)


@pytest.mark.parametrize(("spoil", "sentence"), DESCRIPTIONS.values(), ids=DESCRIPTIONS.keys())
def test_a_dataset_that_is_described_wrongly(spoilt, capsys, spoil, sentence):
    spoil(spoilt)
    _refused(spoilt, sentence, capsys)
