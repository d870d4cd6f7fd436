"""Suggested anchors: found where the answer is known, in the structure of the grid, and judged on other images."""

import numpy as np
import pytest

from detector.anchors import AnchorConfig
from detector.errors import InputError
from experiments.anchors.suggestion import suggest_anchors
from experiments.anchors.views import TrainingView


def view(widths_and_heights: list[tuple[float, float]], images: int = 40) -> TrainingView:
    """One object in the middle of each image of 400 x 300 pixels, of the given sides in turn."""
    sides = np.array([widths_and_heights[i % len(widths_and_heights)] for i in range(images)])
    center = np.array([200.0, 150.0]) + np.random.default_rng(1).uniform(-8, 8, (images, 2))
    boxes = np.concatenate((center - sides / 2, center + sides / 2), axis=1).astype(np.float32)
    return TrainingView(np.tile([300, 400], (images, 1)), boxes, np.arange(images))


def test_one_shape_is_found() -> None:
    # 90 x 40 pixels: side 60 = 3.75 x 16, ratio 4 / 9. On stride 4 nothing but the shape counts.
    given = AnchorConfig(scales=[8], aspect_ratios=[1], straddling="keep")
    found = suggest_anchors(given, [4], [view([(90, 40)])], number=1)
    assert found.scales == pytest.approx([3.75], rel=0.03)
    assert found.aspect_ratios == pytest.approx([4 / 9], rel=0.05)
    assert found.folds == len(found.gains) == 5
    assert found.mean_best_iou > 0.9
    assert found.given_mean_best_iou == pytest.approx(90 * 40 / 128**2, abs=0.01)
    assert np.mean(found.gains) == pytest.approx(found.mean_best_iou - found.given_mean_best_iou)
    assert (found.given_share_iou_50, found.share_iou_50) == (0, 1)
    assert found == suggest_anchors(given, [4], [view([(90, 40)])], number=1)


def test_of_several_training_sizes_each_object_takes_one_in_turn() -> None:
    """Of the three objects in each of five parts two are seen at 32 pixels and one at 64, by an anchor of 128."""
    given = AnchorConfig(scales=[8], aspect_ratios=[1], straddling="keep")
    found = suggest_anchors(given, [4], [view([(32, 32)], 15), view([(64, 64)], 15)], number=1)
    assert found.given_mean_best_iou == pytest.approx((1 / 16 + 1 / 4 + 1 / 16) / 3)


def test_structure_of_scales_and_ratios() -> None:
    shapes = [(30.0, 30.0), (120, 120), (20, 45), (80, 180)]  # sides 30 and 120 x ratios 1 and 9 / 4
    given = AnchorConfig(scales=[1, 2, 3], aspect_ratios=[0.3, 0.5], base_size=10, straddling="keep")
    found = suggest_anchors(given, [4], [view(shapes)], number=2)
    assert found.scales == pytest.approx([3, 12], rel=0.06)
    assert found.aspect_ratios == pytest.approx([1, 9 / 4], rel=0.08)
    assert found.options == (
        f'--model.anchors.scales "[{found.scales[0]:g}, {found.scales[1]:g}]" '
        f'--model.anchors.aspect_ratios "[{found.aspect_ratios[0]:g}, {found.aspect_ratios[1]:g}]"'
    )


def test_lists_per_level_get_as_many_scales_each() -> None:
    given = AnchorConfig(scales=[[50], [300]], aspect_ratios=[1], base_size=1, straddling="keep")
    found = suggest_anchors(given, [4, 8], [view([(30, 30), (120, 120)])], number=1)
    assert [len(level) for level in found.scales] == [1, 1]
    assert [level[0] for level in found.scales] == pytest.approx([30, 120], rel=0.06)
    assert found.options.startswith(f'--model.anchors.scales "[[{found.scales[0][0]:g}], [')


def test_dropped_anchors_do_not_count() -> None:
    # Objects as large as the image: an anchor of their shape would fit nowhere.
    given = AnchorConfig(scales=[10], aspect_ratios=[0.75], straddling="drop")
    sizes = np.tile([300, 400], (20, 1))
    whole = TrainingView(sizes, np.tile(np.array([0, 0, 400, 300], np.float32), (20, 1)), np.arange(20))
    found = suggest_anchors(given, [16], [whole], number=1)
    side, ratio = 16 * found.scales[0], found.aspect_ratios[0]
    assert side / ratio**0.5 <= 400
    assert side * ratio**0.5 <= 300
    assert found.mean_best_iou > 0.8


def test_too_little_to_judge() -> None:
    with pytest.raises(InputError, match="two images with objects"):
        suggest_anchors(AnchorConfig(), [16], [view([(30, 30)], images=1)], number=1)


def test_ratios_per_level_are_searched_for_each() -> None:
    """Objects of 32 pixels, for stride 4, are wide, those of 256, for stride 32, are high."""
    given = AnchorConfig([[30], [300]], [[1], [1]], base_size=1, straddling="keep")
    found = suggest_anchors(given, [4, 32], [view([(45, 22.5), (140, 280)])], number=1)
    assert [level[0] for level in found.scales] == pytest.approx([32, 198], rel=0.08)
    assert [level[0] for level in found.aspect_ratios] == pytest.approx([0.5, 2], rel=0.08)


def test_free_sizes_go_to_the_level_whose_stride_fits() -> None:
    """Sides of 32 and 256 pixels fit strides 4 and 32; stride 8 has no objects, and one square of 64 pixels."""
    given = AnchorConfig([[32], [64], [256]], [1], base_size=1, straddling="keep")
    shapes = [(64.0, 16.0), (16.0, 64.0), (128.0, 256.0)]
    found = suggest_anchors(given, [4, 8, 32], [view(shapes, 90)], number=3, form="sizes")
    assert found.sizes is not None
    fine, middle, coarse = found.sizes
    assert fine == [pytest.approx([16, 64], rel=0.06), pytest.approx([64, 16], rel=0.06)]  # a third is of no use
    assert middle == [[64, 64]]
    assert any(size == pytest.approx([128, 256], rel=0.06) for size in coarse)
    assert found.mean_best_iou > 0.8 > 0.4 > found.given_mean_best_iou
    assert found.options.startswith('--model.anchors.sizes "[[[')
    assert found.applied(given).sizes == found.sizes
    again = suggest_anchors(found.applied(given), [4, 8, 32], [view(shapes, 90)], number=1)  # sizes, as configured
    assert again.sizes is not None and [len(level) for level in again.sizes] == [1, 1, 1]
    assert again.given_mean_best_iou == pytest.approx(found.mean_best_iou, abs=0.02)


def test_a_level_of_few_objects_has_fewer_sizes() -> None:
    """Of 64 objects 16 are large, of two shapes: enough for one size, and the 48 others for three."""
    given = AnchorConfig([[32], [256]], [1], base_size=1, straddling="keep")
    small = [(64.0, 16.0), (16.0, 64.0), (32.0, 32.0)]
    shapes = [*small, (128.0, 256.0), *small, (256.0, 128.0)]
    found = suggest_anchors(given, [4, 32], [view(shapes, 64)], number=3, form="sizes")
    assert found.sizes is not None
    assert [len(level) for level in found.sizes] == [3, 1]
