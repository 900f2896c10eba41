import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import label

from nnunet_topomae.commands.phantom import LABELS, make_case, write_dataset


def test_structures_have_the_topology_they_are_named_for():
    image, labels = make_case(3)
    assert image.dtype == np.int16
    assert set(np.unique(labels)) == set(LABELS.values())
    full = np.ones((3, 3, 3))
    for name in ("solid_organ", "hollow_organ", "tree"):
        assert label(labels == LABELS[name], full)[1] == 1, name
    outside = labels != LABELS["hollow_organ"]
    assert label(outside)[1] == 2  # the cavity is cut off from the rest


def test_seeds_make_cases():
    assert np.array_equal(make_case(1)[0], make_case(1)[0])
    assert not np.array_equal(make_case(1)[0], make_case(2)[0])


def test_too_small_a_phantom_is_refused():
    with pytest.raises(ValueError, match="at least 24 voxels"):
        make_case(0, (16, 32, 32))


def test_dataset_is_in_nnunets_format(tmp_path):
    write_dataset(tmp_path, num_training=2, num_test=1)
    description = json.loads((tmp_path / "dataset.json").read_text())
    assert description["numTraining"] == 2
    assert [f.name for f in sorted((tmp_path / "imagesTr").iterdir())] == [
        "phantom_000_0000.nii.gz",
        "phantom_001_0000.nii.gz",
    ]
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "labelsTs" / "phantom_002.nii.gz")))
    assert np.array_equal(written, make_case(2)[1])
