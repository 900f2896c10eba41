import numpy as np
import pytest
from matplotlib.image import imread

from nnunet_topomae.reporting.figures import Curve, Reconstruction, plane_names, save_progress, save_reconstructions


def _reconstruction(value=1.0):
    volumes = {name: np.random.rand(1, 6, 8, 10).astype(np.float32) * value for name in ("input", "masked", "ViT")}
    return Reconstruction("case_1", volumes, (3.0, 1.0, 1.0), plane_names())


@pytest.mark.parametrize("value", [1.0, 0.0])  # a constant crop has no grey scale of its own
def test_reconstructions_are_drawn(tmp_path, value):
    file = tmp_path / "reconstructions.png"
    save_reconstructions([_reconstruction(value), _reconstruction(value)], file)
    assert imread(file).std() > 0
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no reconstruction to draw"):
        save_reconstructions([], tmp_path / "x.png")


def test_planes_follow_the_transposition_of_the_plans():
    assert plane_names() == ["axial", "coronal", "sagittal"]
    assert plane_names((2, 0, 1)) == ["sagittal", "axial", "coronal"]


@pytest.mark.parametrize("num_terms", [1, 9])
def test_progress_is_drawn_after_one_epoch(tmp_path, num_terms):
    terms = {f"term_{i}": Curve([0.5], [0.0]) for i in range(num_terms)}
    save_progress(terms, [1e-3], [2.0], tmp_path / "progress.png")
    assert imread(tmp_path / "progress.png").std() > 0
