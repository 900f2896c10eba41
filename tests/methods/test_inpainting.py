import numpy as np
import pytest
import torch
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve

from nnunet_topomae.methods.inpainting import harmonic_inpainting, visible_mean


def _hidden_box(shape=(6, 7, 8)):
    hidden = torch.zeros(1, 1, *shape, dtype=torch.bool)
    hidden[..., 1:5, 2:5, 3:7] = True
    return hidden


def test_the_visible_mean_is_taken_per_sample_and_channel():
    crop = torch.tensor([[[1.0, 3.0, 99.0]], [[5.0, 7.0, 99.0]]]).reshape(1, 2, 1, 1, 3)
    hidden = torch.tensor([False, False, True]).reshape(1, 1, 1, 1, 3)
    assert visible_mean(crop, hidden).flatten().tolist() == [1, 3, 2, 5, 7, 6]


def test_a_linear_image_is_harmonic_and_comes_back():
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (6, 7, 8)), indexing="ij")
    image = (z + 2 * y - 3 * x)[None, None]
    hidden = _hidden_box()
    spoilt = torch.where(hidden, 1000.0, image)
    torch.testing.assert_close(harmonic_inpainting(spoilt, hidden), image, rtol=0, atol=1e-4)


def test_it_solves_laplaces_equation_as_a_sparse_solver_does():
    """The same equation, each hidden voxel the mean of its six neighbours with repeated borders, solved by SciPy."""
    rng = np.random.default_rng(0)
    shape = (4, 4, 5)
    crop, hidden = rng.random(shape), rng.random(shape) < 0.5
    unknown = {tuple(voxel): n for n, voxel in enumerate(np.argwhere(hidden))}
    matrix, right = lil_matrix((len(unknown), len(unknown))), np.zeros(len(unknown))
    for voxel, row in unknown.items():
        matrix[row, row] += 6
        for axis in range(3):
            for step in (-1, 1):
                neighbour = list(voxel)
                neighbour[axis] = min(max(neighbour[axis] + step, 0), shape[axis] - 1)
                if tuple(neighbour) in unknown:
                    matrix[row, unknown[tuple(neighbour)]] -= 1
                else:
                    right[row] += crop[tuple(neighbour)]
    expected = crop.copy()
    expected[hidden] = spsolve(matrix.tocsr(), right)
    got = harmonic_inpainting(*(torch.from_numpy(a)[None, None] for a in (crop, hidden)))
    np.testing.assert_allclose(got[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("fill", [visible_mean, harmonic_inpainting])
def test_hidden_values_have_no_influence_and_visible_ones_stay(fill):
    crop, hidden = torch.rand(2, 3, 6, 7, 8), _hidden_box().expand(2, -1, -1, -1, -1)
    other = torch.where(hidden, torch.rand_like(crop), crop)
    assert torch.equal(fill(crop, hidden), fill(other, hidden))
    assert torch.equal(fill(crop, hidden)[~hidden.expand_as(crop)], crop[~hidden.expand_as(crop)])
