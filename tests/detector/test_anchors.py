"""Anchors against hand-computed boxes: area, ratio = height / width, offsets, order of rows, cells and shapes."""

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from detector.anchors import AnchorConfig, AnchorGenerator, base_anchors
from detector.errors import InputError

CPU = torch.device("cpu")


def sides(anchors: Tensor) -> list[tuple[float, float]]:
    return [(x2 - x1, y2 - y1) for x1, y1, x2, y2 in anchors.tolist()]


def test_the_papers_nine_anchors() -> None:
    half = [64 * sqrt(2), 128 * sqrt(2), 256 * sqrt(2)]  # half the longer side of 128, 256 and 512 at ratio 2
    wide = [[-a, -a / 2, a, a / 2] for a in half]
    square = [[-a, -a, a, a] for a in (64, 128, 256)]
    high = [[-a / 2, -a, a / 2, a] for a in half]
    torch.testing.assert_close(base_anchors(AnchorConfig()), torch.tensor(wide + square + high))
    by_scale = [box for scale in zip(wide, square, high, strict=True) for box in scale]
    torch.testing.assert_close(base_anchors(AnchorConfig(order="scale_major")), torch.tensor(by_scale))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        # ratio 1/4 is twice as wide as the side and half as high, ratio 9 a third as wide and three times as high
        ("ratio_major", [(24, 6), (48, 12), (4, 36), (8, 72)]),
        ("scale_major", [(24, 6), (4, 36), (48, 12), (8, 72)]),
    ],
)
def test_ratio_is_height_over_width_at_equal_area(order: Any, expected: list[tuple[float, float]]) -> None:
    anchors = base_anchors(AnchorConfig(scales=[1, 2], aspect_ratios=[0.25, 9], base_size=12, order=order))
    assert anchors.dtype == torch.float32
    assert sides(anchors) == expected
    assert (anchors[:, :2] == -anchors[:, 2:]).all()


@pytest.mark.parametrize(("offset", "first"), [("zero", 0.0), ("half_stride", 8.0), ("half_stride_minus_half", 7.5)])
def test_centre_of_the_first_anchor(offset: Any, first: float) -> None:
    generator = AnchorGenerator(AnchorConfig([1], [4], center_offset=offset), (16,))
    (anchors,) = generator([(2, 3)], CPU)
    assert sides(anchors) == [(8, 32)] * 6
    centers = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in anchors.tolist()]
    # Row by row: x runs faster than y.
    assert centers == [(first + 16 * column, first + 16 * row) for row in range(2) for column in range(3)]


def test_rounded_base_sides_are_those_of_py_faster_rcnn() -> None:
    """Its generate_anchors() prints these inclusive corners around the cell (0, 0, 15, 15)."""
    printed = [
        *([-84, -40, 99, 55], [-176, -88, 191, 103], [-360, -184, 375, 199]),
        *([-56, -56, 71, 71], [-120, -120, 135, 135], [-248, -248, 263, 263]),
        *([-36, -80, 51, 95], [-80, -168, 95, 183], [-168, -344, 183, 359]),
    ]
    (anchors,) = AnchorGenerator(AnchorConfig(rounding="base_sides"), (16,))([(1, 1)], CPU)
    assert anchors.tolist() == [[x1, y1, x2 + 1, y2 + 1] for x1, y1, x2, y2 in printed]


def test_corners_rounded_to_whole_pixels() -> None:
    """32 pixels at ratio 3 (18.48 x 55.43) and at ratio 1/2 (45.25 x 22.63)."""
    config = AnchorConfig([32], [3, 0.5], base_size=1, rounding="nearest")
    assert base_anchors(config).tolist() == [[-9, -28, 9, 28], [-23, -11, 23, 11]]
    assert base_anchors(AnchorConfig([32], [3, 0.5], base_size=1))[0].tolist() == pytest.approx(
        [-9.2376, -27.7128, 9.2376, 27.7128], abs=1e-4
    )


@pytest.mark.parametrize(("spacing", "step"), [("stride", (64, 64)), ("fitted", (56, 42))])
def test_spacing_of_a_level_that_does_not_divide_the_image(spacing: Any, step: tuple[int, int]) -> None:
    """An image of 224 x 168 pixels: 28 x 21 cells of 8 pixels, and 4 x 4 of nominally 64."""
    config = AnchorConfig([1], [1], center_offset="half_stride", spacing=spacing)
    fine, coarse = AnchorGenerator(config, (8, 64))([(28, 21), (4, 4)], CPU)
    centers = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in coarse.tolist()]
    dy, dx = step
    assert centers == [(dx / 2 + dx * column, dy / 2 + dy * row) for row in range(4) for column in range(4)]
    assert fine[-1].tolist() == [20 * 8 + 4 - 8, 27 * 8 + 4 - 8, 20 * 8 + 4 + 8, 27 * 8 + 4 + 8]


def test_all_shapes_of_a_cell_before_the_next_cell() -> None:
    generator = AnchorGenerator(AnchorConfig([2, 4], [1], base_size=8, center_offset="zero"), (8,))
    (anchors,) = generator([(2, 2)], CPU)
    assert generator.anchors_per_location == (2,)
    assert anchors.tolist() == [
        *([-8, -8, 8, 8], [-16, -16, 16, 16]),  # (0, 0)
        *([0, -8, 16, 8], [-8, -16, 24, 16]),  # row 0, column 1
        *([-8, 0, 8, 16], [-16, -8, 16, 24]),  # row 1, column 0
        *([0, 0, 16, 16], [-8, -8, 24, 24]),
    ]


def test_one_list_per_level() -> None:
    config = AnchorConfig([[2, 3], [8, 12]], [1], base_size=4, center_offset="half_stride")
    fine, coarse = AnchorGenerator(config, (4, 16))([(3, 5), (1, 2)], CPU)
    assert (fine.shape, coarse.shape) == ((30, 4), (4, 4))
    assert fine[:2].tolist() == [[-2, -2, 6, 6], [-4, -4, 8, 8]]
    assert coarse.tolist() == [[-8, -8, 24, 24], [-16, -16, 32, 32], [8, -8, 40, 24], [0, -16, 48, 32]]


def test_ratios_per_level_with_other_numbers_of_scales() -> None:
    config = AnchorConfig([[2, 3], [8]], [[1], [0.25, 4]], base_size=4, center_offset="zero")
    fine, coarse = AnchorGenerator(config, (4, 16))([(1, 1), (1, 1)], CPU)
    assert fine.tolist() == [[-4, -4, 4, 4], [-6, -6, 6, 6]]
    assert coarse.tolist() == [[-32, -8, 32, 8], [-8, -32, 8, 32]]  # height / width
    assert config.names_of_level(1) == ["scale8_ratio0.25", "scale8_ratio4"]


def test_free_sizes_for_all_levels_or_per_level() -> None:
    config = AnchorConfig(sizes=[[10, 4], [3, 6]], center_offset="zero", order="scale_major")
    fine, coarse = AnchorGenerator(config, (4, 16))([(1, 2), (1, 1)], CPU)
    assert fine.tolist() == [[-5, -2, 5, 2], [-1.5, -3, 1.5, 3], [-1, -2, 9, 2], [2.5, -3, 5.5, 3]]
    assert coarse.tolist() == fine[:2].tolist()
    config = AnchorConfig(sizes=[[[10, 4]], [[7, 9.5]]], center_offset="zero", rounding="nearest")
    fine, coarse = AnchorGenerator(config, (4, 16))([(1, 1), (1, 1)], CPU)
    assert (fine.tolist(), coarse.tolist()) == ([[-5, -2, 5, 2]], [[-4, -5, 4, 5]])
    assert config.names_of_level(1) == ["7x9.5"]
    ((scale, ratio),) = config.shapes_of_level(1)
    assert (str(scale), ratio) == ("nan", 1.3571)


@pytest.mark.parametrize(
    "config",
    [
        AnchorConfig([[2, 3], [8]], [[1], [0.25]], base_size=4, center_offset="zero"),
        AnchorConfig(sizes=[[[8, 8], [12, 12]], [[64, 16]]], center_offset="zero"),
    ],
)
def test_other_numbers_of_anchors_on_each_level(config: AnchorConfig) -> None:
    generator = AnchorGenerator(config, (4, 16))
    fine, coarse = generator([(1, 2), (1, 1)], CPU)
    assert generator.anchors_per_location == (2, 1)
    assert fine.tolist() == [[-4, -4, 4, 4], [-6, -6, 6, 6], [0, -4, 8, 4], [-2, -6, 10, 6]]
    assert coarse.tolist() == [[-32, -8, 32, 8]]


def test_one_list_serves_all_levels() -> None:
    fine, coarse = AnchorGenerator(AnchorConfig([2], [1], base_size=4), (4, 16))([(1, 1), (1, 1)], CPU)
    assert fine.tolist() == [[-2, -2, 6, 6]]
    assert coarse.tolist() == [[4, 4, 12, 12]]


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(InputError, match=r"anchors\.scales: 2 lists for 3 .*levels.*4, 8, 16"):
        AnchorGenerator(AnchorConfig([[1], [2]]), (4, 8, 16))
    with pytest.raises(InputError, match=r"anchors\.aspect_ratios: 3 lists for 2 levels"):
        AnchorGenerator(AnchorConfig([[1], [2]], [[1], [2], [3]]), (4, 8))
    with pytest.raises(InputError, match=r"anchors\.sizes: 1 lists for 2 levels"):
        AnchorGenerator(AnchorConfig([[1]], sizes=[[[1, 2]]]), (4, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": []}, r"anchors\.scales: \[\]"),
        ({"scales": [[8], [-1]]}, r"anchors\.scales: \[\[8\], \[-1\]\]"),
        ({"aspect_ratios": [0.5, 0]}, r"anchors\.aspect_ratios: \[0.5, 0\]"),
        ({"aspect_ratios": [[1], [-2]]}, r"anchors\.aspect_ratios: \[\[1\], \[-2\]\]"),
        ({"sizes": []}, r"anchors\.sizes: \[\] must be a list of \[width, height\] in pixels, or one list per level$"),
        ({"sizes": [[1, 2], [3]]}, r"anchors\.sizes: \[\[1, 2\], \[3\]\]"),
        ({"sizes": [[[1, 2]], []]}, r"anchors\.sizes: \[\[\[1, 2\]\], \[\]\]"),
        ({"sizes": [[4, -1]]}, r"anchors\.sizes: \[\[4, -1\]\]"),
        ({"sizes": [4, 1]}, r"anchors\.sizes: \[4, 1\]"),
        ({"base_size": 0}, r"anchors\.base_size: 0"),
        ({"order": "random"}, r"anchors\.order: 'random' is none of ratio_major, scale_major"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AnchorConfig(**options)


def test_sizes_are_kept_up_to_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AnchorGenerator, "cache_bytes", 2000)
    generator = AnchorGenerator(AnchorConfig([1], [1]), (16,))
    first = generator([(2, 3)], CPU)[0]
    assert generator([(2, 3)], CPU)[0] is first
    assert generator([(3, 2)], CPU)[0][-1].tolist() == [16, 32, 32, 48]  # not taken for (2, 3)
    for height in (20, 30, 40):  # of 320, 480 and 640 bytes, beside two of 96 bytes
        generator([(height, 1)], CPU)
    assert generator([(2, 3)], CPU)[0] is first
    generator([(60, 1)], CPU)  # 960 bytes: the three used longest ago go
    assert [size for *sizes, _ in generator._cache for size in sizes] == [(40, 1), (2, 3), (60, 1)]
    generator([(200, 1)], CPU)  # more than the limit by itself
    assert [size for *sizes, _ in generator._cache for size in sizes] == [(200, 1)]
    torch.testing.assert_close(generator([(2, 3)], CPU)[0], first)


def test_ten_million_scales_are_refused_at_once():
    with pytest.raises(InputError, match=r"^anchors: 10000000 scales x 3 aspect_ratios; at most 10000 shapes$"):
        AnchorConfig(scales=[8.0] * 10_000_000)
