"""Pictures with boxes: colours, where outlines and captions lie, sizes, and what is drawn at all."""

from itertools import combinations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from detector import VOC_CLASSES
from detector.use.drawing import class_color, draw_boxes, draw_detections

RED = (255, 0, 0)


def black(height: int, width: int) -> Tensor:
    return torch.zeros(3, height, width, dtype=torch.uint8)


def drawn(picture: Tensor) -> Tensor:
    """Mask (H, W) of pixels that are not black."""
    return picture.sum(dim=0) > 0


def strip_of(picture: Tensor, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Return the box of all pixels of exactly this colour, whose rim must be of it: nothing lies on that strip."""
    mask = (picture == torch.tensor(color)[:, None, None]).all(dim=0)
    rows, columns = mask.nonzero().unbind(1)
    top, bottom, left, right = (int(v) for v in (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1))
    own = mask[top:bottom, left:right]
    assert own[0].all() and own[-1].all() and own[:, 0].all() and own[:, -1].all()
    return left, top, right, bottom


def captions_of(picture: Tensor, without: Tensor, colors: list[tuple[int, int, int]]) -> list[tuple[int, ...]]:
    """Return the strips of captions of these colours in a picture, compared with the one that has none."""
    added = picture.where((picture != without).any(dim=0), torch.zeros_like(picture))
    return [strip_of(added, color) for color in colors]


@pytest.mark.parametrize(
    ("names", "least"),
    [
        (VOC_CLASSES, (12, 4, 4)),
        (["cross", "ellipse", "rectangle", "ring", "star", "triangle"], (40, 20, 20)),
    ],
)
def test_colours_of_classes_differ_to_all_eyes(names: list[str], least: tuple[float, float, float]) -> None:
    """In CIELAB, where 2.3 is just visible; the eyes without red or green as Vienot, Brettel and Mollon (1999)."""
    colors = np.array([class_color(name) for name in names]) / 255
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    no_red = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    no_green = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    for seen, distance in zip((np.eye(3), no_red, no_green), least, strict=True):
        linear = colors**2.2 @ (np.linalg.inv(to_lms) @ seen @ to_lms).T
        lab = cv2.cvtColor(linear.clip(0, 1).astype(np.float32)[None], cv2.COLOR_LRGB2LAB)[0]
        assert min(float(np.linalg.norm(one - other)) for one, other in combinations(lab, 2)) >= distance


def test_a_class_has_its_colour_wherever_it_stands() -> None:
    """Pinned: pictures of other days, data sets and machines show the same ones."""
    assert [class_color(name) for name in ("person", "car", "raccoon")] == [
        (0, 255, 195),
        (135, 210, 255),
        (210, 225, 150),
    ]
    assert class_color("TV monitor") == class_color("tv_monitor") == class_color("tvmonitor")
    assert class_color("\u732b") != class_color("\u72ac")
    assert class_color("\udcff") == class_color("\udcff")  # of a name that is no text in UTF-8


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
    dashed = drawn(draw_boxes(black(30, 40), box, [""], [RED], dashed=[True]))
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


SHADES = [(100 + 3 * number, 30, 30) for number in range(40)]


def test_captions_of_coinciding_boxes_lie_side_by_side() -> None:
    boxes, texts = torch.tensor([[120.0, 100.0, 320.0, 200.0]]).repeat(8, 1), ["person 0.50"] * 8
    without = draw_boxes(black(300, 440), boxes, [""] * 8, SHADES[:8])
    strips = captions_of(draw_boxes(black(300, 440), boxes, texts, SHADES[:8]), without, SHADES[:8])
    assert len({(right - left, bottom - top) for left, top, right, bottom in strips}) == 1  # whole, and of one size
    assert strips[-1][0] == 120 and strips[-1][3] == 100  # the last is the best: on its upper left corner
    for one, other in combinations(strips, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_what_finds_no_room_is_marked() -> None:
    boxes = torch.tensor([[20.0, 30.0, 110.0, 70.0]]).repeat(40, 1)
    without = draw_boxes(black(100, 130), boxes, [""] * 40, SHADES)
    picture = draw_boxes(black(100, 130), boxes, ["person 0.50"] * 40, SHADES)
    added = picture.where((picture != without).any(dim=0), torch.zeros_like(picture))
    widths = []
    for color in SHADES:
        columns = (added == torch.tensor(color)[:, None, None]).all(dim=0).any(dim=0).nonzero()
        if len(columns):
            widths.append(int(columns.max() - columns.min()) + 1)
    assert widths[-1] > 50
    marks = [width for width in widths if width <= 20]
    assert len(marks) >= 3
    assert len(widths) - len(marks) >= 3


def test_captions_leave_small_objects_visible() -> None:
    """Twenty-five touching objects of 14 pixels, too small for any caption, which find room outside alone."""
    corners = [(60.0 + 14 * column, 60.0 + 14 * row) for row in range(5) for column in range(5)]
    boxes = torch.tensor([[x, y, x + 14, y + 14] for x, y in corners])
    without = draw_boxes(black(200, 200), boxes, [""] * 25, SHADES[:25])
    picture = draw_boxes(black(200, 200), boxes, ["cell 0.9"] * 25, SHADES[:25])
    covered = (picture != without).any(dim=0)
    assert covered.any()
    for x, y in corners:
        assert covered[int(y) : int(y) + 14, int(x) : int(x) + 14].float().mean() <= 0.5


@pytest.mark.parametrize("side", [320, 2000])
def test_captions_are_readable_at_any_size(side: int) -> None:
    """At 1/30 of the shorter side, in a crowd as small as 1/80 of it, but never below 10 pixels."""
    lone = torch.tensor([[0.3, 0.3, 0.7, 0.7]]) * side
    crowd = torch.cat((lone + 0.01 * side * torch.arange(-9, 0)[:, None], lone))
    shades = SHADES[: len(crowd)]
    heights = []
    for boxes, colors in ((lone, shades[-1:]), (crowd, shades)):
        without = draw_boxes(black(side, side), boxes, [""] * len(boxes), colors)
        picture = draw_boxes(black(side, side), boxes, ["sheep 0.5"] * len(boxes), colors)
        strips = captions_of(picture, without, colors)
        heights.append([bottom - top for _, top, _, bottom in strips])
    assert side / 40 <= heights[0][0] <= side / 18
    assert heights[1][-1] == heights[0][0]
    assert min(heights[1]) >= max(10, side / 80)


@pytest.mark.parametrize(("color", "ink"), [((255, 240, 60), 0), ((60, 200, 90), 0), ((40, 60, 230), 255)])
def test_captions_are_in_the_ink_that_contrasts_more(color: tuple[int, int, int], ink: int) -> None:
    picture = draw_boxes(black(200, 200), torch.tensor([[50.0, 80.0, 150.0, 180.0]]), ["HHHHH"], [color])
    difference = (picture[:, 70:80, 53:80].int() - torch.tensor(color)[:, None, None]).sum(dim=0)  # above the box
    assert (difference.min() < -100, difference.max() > 100) == (ink == 0, ink == 255)


def test_objects_are_white_and_dashed_under_detections_and_their_captions_beside() -> None:
    box = torch.tensor([[40.0, 40.0, 160.0, 160.0]])
    detections = {"boxes": box + 30, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    picture = draw_detections(black(200, 240), detections, ["cat"], 0.5, box, ["cat (difficult)"])
    white = (picture == 255).all(dim=0)
    assert 0.3 < white[40, 45:155].float().mean() < 0.7  # the upper edge
    assert tuple(picture[:, 100, 70].tolist()) == class_color("cat")
    assert int(white[20:40].any(dim=0).sum()) > 60  # a strip above it
    assert torch.equal(
        draw_detections(black(200, 240), detections, ["cat"], 0.95, box),
        draw_boxes(black(200, 240), box, [""], [(255, 255, 255)], [True]),
    )


def test_detections_from_the_threshold_on_with_the_best_on_top() -> None:
    detections = {
        "boxes": torch.tensor([[10.0, 40.0, 60.0, 80.0], [10.0, 40.0, 60.0, 90.0], [80.0, 50.0, 120.0, 90.0]]),
        "labels": torch.tensor([1, 2, 3]),
        "scores": torch.tensor([0.9, 0.5, 0.49]),
    }
    picture = draw_detections(black(100, 160), detections, ["a", "b", "c"], 0.5)
    assert tuple(picture[:, 60, 10].tolist()) == class_color("a")  # where the first two coincide
    assert tuple(picture[:, 89, 30].tolist()) == class_color("b")
    assert not drawn(picture)[:, 80:].any()
