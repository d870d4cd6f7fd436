"""RoIAlign by weighted sums of cells against torchvision's operator, with gradients; max pooling over whole cells."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align, roi_pool

from detector.kernels.roi_align import cells_and_weights, interpolation
from detector.roi_pooling import pool_aligned, pool_whole_cells


def random_rois(number: int) -> Tensor:
    """RoIs in three images of 208 x 272 pixels, some crossing the border, some far outside, some thin."""
    corner = torch.rand(number, 2) * torch.tensor([340.0, 270.0]) - 40
    boxes = torch.cat((corner, corner + torch.rand(number, 2) ** 2 * 250 + 0.1), dim=1)
    image = torch.sort(torch.randint(0, 3, (number,))).values
    return torch.cat((image[:, None].float(), boxes), dim=1)


def first_level(rois: Tensor) -> Tensor:
    return torch.zeros(len(rois), dtype=torch.int64)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("pool_size", "sampling"), [(7, 2), (7, 1), (14, 2), (3, 4)])
def test_equals_torchvision(aligned: bool, pool_size: int, sampling: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 5, 13, 17, requires_grad=True)
    rois = random_rois(60)
    expected = roi_align(features, rois, pool_size, 1 / 16, sampling, aligned=aligned)
    pooled = pool_aligned([features], rois, first_level(rois), [16], pool_size, sampling, aligned)
    torch.testing.assert_close(pooled, expected, atol=2e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(pooled, features, weights)
    (expected_gradient,) = torch.autograd.grad(expected, features, weights)
    torch.testing.assert_close(gradient, expected_gradient, atol=5e-5, rtol=1e-5)


def test_levels_of_different_sizes() -> None:
    """Three RoIs on two maps, also of images that are not in order, and their gradients to both maps."""
    torch.manual_seed(0)
    maps = [torch.randn(3, 5, 26, 34, requires_grad=True), torch.randn(3, 5, 13, 17, requires_grad=True)]
    rois = random_rois(30).flip(0)
    level = torch.arange(30) % 2
    pooled = pool_aligned(maps, rois, level, [8, 16], 3, 2, True)
    expected = torch.zeros_like(pooled)
    for index, stride in enumerate((8, 16)):
        expected[index::2] = roi_align(maps[index], rois[index::2], 3, 1 / stride, 2, aligned=True)
    torch.testing.assert_close(pooled, expected, atol=2e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(out, maps, weights) for out in (pooled, expected))
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)


def dense(start: float, end: float, cells: int, pool_size: int, sampling: int) -> Tensor:
    """Weight of each cell in each bin (P, cells)."""
    index, weights = interpolation(
        torch.tensor([start]), torch.tensor([end]), torch.tensor([cells]), pool_size, sampling, aligned=True
    )
    return torch.zeros(pool_size, cells).scatter_add(1, index[0], weights[0])


def test_weights_by_hand() -> None:
    """A RoI from cell 0.5 to 2.5, two bins, one point each: points 1.0 and 2.0, exactly on the cells' centres."""
    assert dense(0.5, 2.5, 4, pool_size=2, sampling=1).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    # Two points per bin: 0.75 and 1.25, then 1.75 and 2.25.
    expected = [[0.125, 0.75, 0.125, 0], [0, 0.125, 0.75, 0.125]]
    assert dense(0.5, 2.5, 4, pool_size=2, sampling=2).tolist() == expected


def test_points_outside() -> None:
    """Beyond -1 a point is 0; between -1 and 0 it takes the first cell."""
    assert dense(-3.0, 1.0, 2, pool_size=4, sampling=1).tolist() == [[0, 0], [0, 0], [1, 0], [0.5, 0.5]]


def test_cells_are_counted_over_levels_images_and_rows() -> None:
    """One bin with one point on the centre of row 1, column 2 of the second image on the second level."""
    maps = [torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 2, 3)]
    roi = torch.tensor([[1.0, 32.0, 16.0, 48.0, 32.0]])  # cells of 16 pixels: 2..3 and 1..2
    cells, weights = cells_and_weights(maps, roi, torch.tensor([1]), [8, 16], 1, 1, aligned=True)
    before = 2 * 4 * 6 + 2 * 3
    assert cells[weights > 0].tolist() == [before + 1 * 3 + 2]
    assert weights.sum() == 1


def test_adaptive_sampling_takes_the_operator() -> None:
    features, rois = torch.randn(3, 5, 13, 17), random_rois(10)
    pooled = pool_aligned([features], rois, first_level(rois), [16], 7, 0, True)
    assert torch.equal(pooled, roi_align(features, rois, 7, 1 / 16, 0, aligned=True))


def test_no_rois() -> None:
    features = torch.randn(2, 5, 13, 17, requires_grad=True)
    rois = torch.zeros(0, 5)
    pooled = pool_aligned([features], rois, first_level(rois), [16], 7, 2, True)
    assert pooled.shape == (0, 5, 7, 7)
    assert torch.autograd.grad(pooled.sum(), features)[0].abs().max() == 0


def test_float32_under_autocast() -> None:
    features, rois = torch.randn(3, 5, 13, 17).bfloat16(), random_rois(10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pool_aligned([features], rois, first_level(rois), [16], 7, 2, True)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, roi_align(features.float(), rois, 7, 1 / 16, 2, aligned=True), atol=2e-5, rtol=0)


# Max pooling over whole cells


def test_corners_are_rounded_down_and_both_cells_included() -> None:
    """A RoI from (28, 15) to (50, 64): columns 1 to 3 and rows 0 to 4; for RoIPool columns 2, 3 and rows 1 to 4."""
    features = torch.arange(42.0).view(1, 1, 6, 7)  # 7 * row + column
    rois = torch.tensor([[0.0, 28.0, 15.0, 50.0, 64.0]])
    pooled = pool_whole_cells(-features, rois, 2, 16)  # the lowest number of each bin
    # Two bins of 3 columns share the middle one (1-2, 2-3), and so do those of 5 rows (0-2, 2-4).
    assert (-pooled).tolist() == [[[[1, 2], [15, 16]]]]
    assert pool_whole_cells(features, rois, 2, 16).tolist() == [[[[16, 17], [30, 31]]]]
    assert (-roi_pool(-features, rois, 2, 1 / 16)).tolist() == [[[[9, 10], [23, 24]]]]


def test_a_roi_up_to_the_border_ends_in_the_last_cell() -> None:
    features = torch.randn(2, 3, 4, 6)
    rois = torch.tensor([[1.0, 40.0, 20.0, 96.0, 64.0], [0.0, 95.9, 63.9, 96.0, 64.0], [0.0, -9.0, -9.0, 3.0, 3.0]])
    pooled = pool_whole_cells(features, rois, 3, 16)
    torch.testing.assert_close(pooled[0], torch.nn.functional.adaptive_max_pool2d(features[1, :, 1:, 2:], 3))
    torch.testing.assert_close(pooled[1], features[0, :, 3:, 5:].expand(3, 3, 3))
    torch.testing.assert_close(pooled[2], features[0, :, :1, :1].expand(3, 3, 3))


def test_whole_cells_give_each_maximum_its_gradient() -> None:
    features = torch.arange(12.0).view(1, 1, 3, 4).requires_grad_()
    pooled = pool_whole_cells(features, torch.tensor([[0.0, 0, 0, 20, 40], [0, 16, 16, 40, 40]]), 1, 16)
    (gradient,) = torch.autograd.grad(pooled.sum(), features)
    assert pooled.flatten().tolist() == [9, 10]
    assert gradient.nonzero()[:, 2:].tolist() == [[2, 1], [2, 2]]
    none = pool_whole_cells(features, torch.zeros(0, 5), 2, 16)
    assert none.shape == (0, 1, 2, 2)
    assert torch.autograd.grad(none.sum(), features)[0].abs().max() == 0
