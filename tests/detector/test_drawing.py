"""Pictures with boxes: colours, where the outline lies, sizes, and what is drawn at all."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from detector.drawing import class_color, draw_boxes, draw_detections

RED = (255, 0, 0)


def black(height: int, width: int) -> Tensor:
    return torch.zeros(3, height, width, dtype=torch.uint8)


def drawn(picture: Tensor) -> Tensor:
    """Mask (H, W) of pixels that are not black."""
    return picture.sum(dim=0) > 0


def test_colours_of_twenty_classes_differ() -> None:
    colors = [class_color(label) for label in range(1, 21)]
    distances = [sum(abs(a - b) for a, b in zip(one, other, strict=True)) for one, other in combinations(colors, 2)]
    assert min(distances) >= 25
    assert all(0 <= channel <= 255 for color in colors for channel in color)
    assert all(max(color) == 255 for color in colors)  # bright


@pytest.mark.parametrize("min_side", [0, 30])
def test_outline_is_where_the_box_says(min_side: int) -> None:
    """Columns 4 to 14 and rows 7 to 11 of an image of 30 x 40 pixels."""
    picture = draw_boxes(black(30, 40), torch.tensor([[4.0, 7.0, 15.0, 12.0]]), [""], [RED], min_side=min_side)
    expected = torch.zeros(30, 40, dtype=torch.bool)
    expected[7:12, 4:15] = True
    expected[8:11, 5:14] = False
    assert torch.equal(drawn(picture), expected)
    assert (picture[0, expected] == 255).all()
    assert (picture[1:] == 0).all()


def test_a_box_of_the_whole_image_is_seen_on_all_sides() -> None:
    picture = drawn(draw_boxes(black(30, 40), torch.tensor([[0.0, 0.0, 40.0, 30.0]]), [""], [RED]))
    assert picture[0].all() and picture[-1].all() and picture[:, 0].all() and picture[:, -1].all()
    assert not picture[1:-1, 1:-1].any()


def test_dashes_lie_on_the_outline_and_leave_gaps() -> None:
    box = torch.tensor([[4.0, 7.0, 35.0, 27.0]])
    solid = drawn(draw_boxes(black(30, 40), box, [""], [RED]))
    dashed = drawn(draw_boxes(black(30, 40), box, [""], [RED], dashed=True))
    assert not (dashed & ~solid).any()
    assert 0.4 * solid.sum() < dashed.sum() < 0.8 * solid.sum()


def test_small_images_are_enlarged_by_a_whole_factor() -> None:
    picture = draw_boxes(black(30, 40), torch.tensor([[4.0, 7.0, 15.0, 12.0]]), [""], [RED], min_side=70)
    assert picture.shape == (3, 90, 120)
    assert picture.dtype == torch.uint8
    rows, columns = drawn(picture).nonzero().unbind(1)
    assert [int(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)] == [12, 21, 45, 36]
    assert draw_boxes(black(30, 40), torch.zeros(0, 4), [], [], min_side=30).shape == (3, 30, 40)


def test_the_image_is_not_changed() -> None:
    image = torch.randint(256, (3, 30, 40), dtype=torch.uint8)
    before = image.clone()
    picture = draw_boxes(image, torch.tensor([[4.0, 7.0, 15.0, 12.0]]), ["cat"], [RED])
    assert torch.equal(image, before)
    picture.zero_()  # nor does the picture share its memory
    assert torch.equal(image, before)
    assert torch.equal(draw_boxes(image, torch.zeros(0, 4), [], []), image)


@pytest.mark.parametrize("box", [[0.0, 0.0, 9.0, 9.0], [150.0, 90.0, 160.0, 100.0], [-20.0, -20.0, 300.0, 300.0]])
def test_captions_stay_in_the_picture(box: list[float]) -> None:
    boxes = torch.tensor([box])
    with_caption = draw_boxes(black(100, 160), boxes, ["aeroplane 0.97"], [RED])
    without = draw_boxes(black(100, 160), boxes, [""], [RED])
    added = (with_caption != without).any(dim=0)
    rows, columns = added.nonzero().unbind(1)
    assert int(rows.max() - rows.min()) >= 8
    assert int(columns.max() - columns.min()) >= 50  # the whole text, moved inwards


def test_detections_from_the_threshold_on_with_the_best_on_top() -> None:
    detections = {
        "boxes": torch.tensor([[10.0, 40.0, 60.0, 80.0], [10.0, 40.0, 60.0, 90.0], [80.0, 50.0, 120.0, 90.0]]),
        "labels": torch.tensor([1, 2, 3]),
        "scores": torch.tensor([0.9, 0.5, 0.49]),
    }
    picture = draw_detections(black(100, 160), detections, ["a", "b", "c"], 0.5)
    assert tuple(picture[:, 60, 10].tolist()) == class_color(1)  # where the first two coincide
    assert tuple(picture[:, 89, 30].tolist()) == class_color(2)
    assert not drawn(picture)[:, 80:].any()
