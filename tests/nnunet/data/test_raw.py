"""What is wrong with the files of a raw dataset is said in one sentence, before anything is written."""

import gzip
import json
import shutil
from pathlib import Path
from string import Template

import nibabel
import numpy as np
import pytest

from nnunet_topomae.nnunet.data.raw import dataset_name
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


def _rename(dataset, name):
    """Give a case another name."""
    _image(dataset).rename(_image(dataset, f"{name}_0000"))
    _label(dataset).rename(_label(dataset).with_name(f"{name}.nii.gz"))


def _shear(file):
    """Let the second axis lean over."""
    image = nibabel.load(file)
    sheared = image.affine.copy()
    sheared[0, 1] = 1
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), sheared), file)


def _no_foreground(dataset):
    for file in (dataset / "labelsTr").iterdir():
        _rewrite(file, np.zeros((48, 48, 32), np.uint8))


def _describe(folder, **changes):
    """Edit dataset.json; None removes a key."""
    content = json.loads((folder / "dataset.json").read_text())
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(content))


DEFECTS = {
    "image holds NaN": (
        lambda d: _rewrite(_image(d), np.full((48, 48, 32), np.nan, np.float32)),
        "$image holds NaN or inf",
    ),
    "image of one value": (
        lambda d: _rewrite(_image(d), np.full((48, 48, 32), 7, np.int16)),
        "$image: all voxels have the same value",
    ),
    "image without a voxel": (
        lambda d: _rewrite(_image(d), np.zeros((48, 48, 0), np.float32)),
        "$image holds no voxel",
    ),
    "image of complex numbers": (
        lambda d: _rewrite(_image(d), np.ones((48, 48, 32), np.complex64)),
        "$image holds values of the type complex64, which are no real numbers",
    ),
    "image with a time axis": (
        lambda d: _rewrite(_image(d), np.ones((48, 48, 32, 2), np.int16)),
        "$image has (48, 48, 32, 2) voxels, but must hold one image with three axes",
    ),
    "slice": (
        lambda d: _rewrite(_image(d), np.ones((48, 48), np.int16)),
        "$image has (48, 48) voxels, but must hold one image with three axes",
    ),
    "sheared image": (
        lambda d: _shear(_image(d)),
        f"$image cannot be read with SimpleITK: {ANYTHING}",
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
        lambda d: _rewrite(_image(d), np.linspace(0, 1e30, 73728, dtype=np.float32).reshape(48, 48, 32)),
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
        '$dataset/dataset.json says "numTraining": "5", which is no whole number; write how many training cases '
        "there are, without quotes",
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
    "ending without a dot": (
        lambda d: _describe(d, file_ending="nii.gz"),
        '$dataset/dataset.json: "file_ending" must begin with a dot, such as ".nii.gz", got "nii.gz"',
    ),
    "no background": (
        lambda d: _describe(d, labels={"tree": 0, "leaf": 1}),
        f"$dataset/dataset.json: Background{ANYTHING}",
    ),
    "regions without an order": (
        lambda d: _describe(d, labels={"background": 0, "tree": [1, 2, 3, 4], "leaf": [2]}),
        f"$dataset/dataset.json: {ANYTHING}regions_class_order!",
    ),
    "channels in disorder": (
        lambda d: _describe(d, channel_names={"1": "MRI", "0": "CT"}),
        '$dataset/dataset.json has the channels 1, 0; number them "0", "1" and so on in this order, as nnU-Net '
        "normalises them in the order in which they are written",
    ),
    "channels in a list": (
        lambda d: _describe(d, channel_names=["CT"]),
        '$dataset/dataset.json has no "channel_names", such as {"0": "CT"}',
    ),
    "blank after a channel": (
        lambda d: _describe(d, channel_names={"0": "CT "}),
        '$dataset/dataset.json has a channel "CT " with a blank before or after its name, by which nnU-Net would not '
        'know it and normalise it in another way; write "CT"',
    ),
    "a case that is named as labels are": (
        lambda d: _rename(d, "phantom_000_seg"),
        "$dataset: the case 'phantom_000_seg' has a name that ends in _seg, as the files of labels do, so it could "
        "overwrite one; rename it",
    ),
    "a case that leads to another folder": (
        lambda d: _describe(d, dataset={"../../x": {"images": ["imagesTr/phantom_000_0000.nii.gz"], "label": ""}}),
        "$dataset: the case '../../x' has a name that leads to another folder; rename it",
    ),
    "a case without images": (
        lambda d: _describe(d, dataset={"a": {"label": "labelsTr/phantom_000.nii.gz"}}),
        '$dataset/dataset.json: "dataset" must be an object that has "images" (a list) and "label" for every case',
    ),
    "no such reader": (
        lambda d: _describe(d, overwrite_image_reader_writer="os"),
        "nnU-Net has no reader os; correct dataset.json",
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


def test_a_fingerprint_that_was_left_half_written_is_named(workspace, capsys):
    file = workspace.preprocessed / "dataset_fingerprint.json"
    content = file.read_text()
    file.write_text(content[:9])
    try:
        said = refused([*PLAN, "998"], capsys)
    finally:
        file.write_text(content)
    assert says(said, f"Error: {file} is no valid JSON: {ANYTHING}; add --clean, which extracts it anew\n")


def test_a_dataset_of_several_names_is_refused(workspace):
    (workspace.preprocessed.parent / "Dataset998_Twin").mkdir()
    try:
        with pytest.raises(ValueError, match="dataset 998 has several names: Dataset998_Phantom, Dataset998_Twin"):
            dataset_name(998)
    finally:
        (workspace.preprocessed.parent / "Dataset998_Twin").rmdir()
    assert dataset_name(998) == "Dataset998_Phantom"
