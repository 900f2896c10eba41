import numpy as np
import pytest
import torch

from nnunet_topomae.methods.mim.levels import cut, resize


def coordinates(size) -> torch.Tensor:
    """A volume whose three channels say where a voxel lies."""
    return torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"))[None]


@pytest.mark.parametrize(
    ("grid", "index", "size"),
    [
        ((1, 1, 1), 0, (6, 12, 12)),  # level 1: half the size
        ((2, 2, 2), 6, (6, 12, 12)),  # an octant, as it is
        ((3, 4, 6), 38, (6, 12, 12)),  # enlarged
        ((3, 4, 6), 71, (5, 7, 9)),  # by factors that are no whole numbers
    ],
)
def test_resized_coordinates_agree_to_half_a_voxel(grid, index, size):
    shape = (12, 24, 24)
    volumes = cut(coordinates(shape), grid, torch.tensor([[index]]), size)[0]
    for axis, position in enumerate(np.unravel_index(index, grid)):
        edge = shape[axis] / grid[axis]
        expected = edge * position + (torch.arange(size[axis]) + 0.5) * edge / size[axis] - 0.5
        of_axis = volumes[axis].movedim(axis, -1)
        assert (of_axis - expected).abs().max() <= 0.5
        if edge >= size[axis]:  # nothing is extrapolated
            torch.testing.assert_close(of_axis, expected.expand_as(of_axis))


def test_at_half_the_size_a_voxel_is_the_mean_of_eight():
    volume = torch.rand(2, 3, 4, 6, 8)
    torch.testing.assert_close(resize(volume, (2, 3, 4)), torch.nn.functional.avg_pool3d(volume, 2))


def test_parts_in_the_order_of_their_indices():
    volumes = torch.arange(2.0 * 8).reshape(2, 1, 2, 2, 2)
    parts = cut(volumes, (2, 2, 2), torch.tensor([[7, 0, 3], [1, 1, 6]]), (1, 1, 1))
    assert parts.flatten().tolist() == [7, 0, 3, 9, 9, 14]
