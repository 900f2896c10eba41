import numpy as np
import pytest
from matplotlib.image import imread

from nnunet_topomae.reporting.figures import Curve, Geometry, plane_names, save_columns, save_progress


def _columns(value=1.0):
    return {name: np.random.rand(1, 6, 8, 10).astype(np.float32) * value for name in ("input", "masked", "ViT")}


GEOMETRY = Geometry((3.0, 1.0, 1.0), plane_names())


@pytest.mark.parametrize("value", [1.0, 0.0])  # a constant crop has no grey scale of its own
def test_volumes_are_drawn_in_columns(tmp_path, value):
    file = tmp_path / "reconstructions.png"
    save_columns({"case_1": _columns(value), "case_2": _columns(value)}, GEOMETRY, file)
    assert imread(file).std() > 0
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no case to draw"):
        save_columns({}, GEOMETRY, tmp_path / "x.png")


def test_planes_follow_the_transposition_of_the_plans():
    assert plane_names() == ["axial", "coronal", "sagittal"]
    assert plane_names((2, 0, 1)) == ["sagittal", "axial", "coronal"]


@pytest.mark.parametrize("num_terms", [0, 1, 9])
@pytest.mark.parametrize("skills", [{}, {"ViT": [-0.5], "UNETR++": [-9.0]}])
def test_progress_is_drawn_after_one_epoch(tmp_path, num_terms, skills):
    terms = {f"term_{i}": Curve([0.5], [0.0]) for i in range(num_terms)}
    save_progress(terms, [1e-3], [2.0], skills, tmp_path / "progress.png")
    assert imread(tmp_path / "progress.png").std() > 0
