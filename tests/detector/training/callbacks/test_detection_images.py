"""Where boxes of a hand-made case lie in the pictures of a validation, in which colours, and when they are drawn."""

from typing import Any

import torch
from torch import Tensor

from detector.training.callbacks.detection_images import DetectionImages
from detector.training.callbacks.mistakes import LOOKS, RIGHT
from detector.use.drawing import GROUND_TRUTH_COLOR, class_color

IMAGE = torch.zeros(3, 300, 400, dtype=torch.uint8)
NAMES = ["cat", "dog"]
TARGET: dict[str, Any] = {
    "boxes": torch.tensor(
        [[20.0, 40, 100, 120], [150, 40, 230, 120], [280, 40, 360, 120], [20, 180, 100, 260], [290, 180, 370, 260]]
    ),
    "labels": torch.tensor([1, 1, 2, 2, 1]),
    "difficult": torch.tensor([False, False, False, False, True]),
}
FOUND = {  # the second cat is called a dog; the first dog is half found; the second is missed; something is nothing
    "boxes": torch.tensor(
        [[22.0, 42, 102, 122], [152, 42, 232, 122], [280, 60, 320, 120], [26, 46, 106, 126], [150, 200, 200, 280],
         [20, 180, 100, 260]]
    ),
    "labels": torch.tensor([1, 2, 2, 1, 2, 2]),
    "scores": torch.tensor([0.9, 0.8, 0.7, 0.6, 0.55, 0.4]),
}  # fmt: skip


def colors_at(picture: Tensor, x: int, y: int) -> tuple[int, ...]:
    return tuple(picture[:, y, x].tolist())


def left_edges(picture: Tensor, boxes: Tensor) -> list[tuple[int, ...]]:
    """Colours of both pixels of the left outlines, in a row where no caption is."""
    edges = []
    for x1, _, _, y2 in boxes.long().tolist():
        colors = {colors_at(picture, x, y2 - 15) for x in (x1, x1 + 1)}
        assert len(colors) == 1
        edges += colors
    return edges


def test_detections_are_where_they_belong_in_the_colours_of_their_classes() -> None:
    picture = DetectionImages().draw(IMAGE, TARGET, FOUND, NAMES)
    cat, dog = class_color("cat"), class_color("dog")
    assert picture.shape[2] == 400 and picture.shape[1] > 300  # the legend is below
    assert left_edges(picture, FOUND["boxes"][:5]) == [cat, dog, dog, cat, dog]
    assert left_edges(picture, TARGET["boxes"][[0, 1, 3]]) == [GROUND_TRUTH_COLOR] * 3  # the last detection is too weak
    assert left_edges(picture, FOUND["boxes"][:1] - 5) == [(0, 0, 0)]


def test_mistakes_have_their_colours() -> None:
    picture = DetectionImages().draw_mistakes(IMAGE, TARGET, FOUND, NAMES)
    kinds = ("classification", "localisation", "duplicate", "background")
    assert left_edges(picture, FOUND["boxes"][:5]) == [RIGHT.color, *(LOOKS[kind].color for kind in kinds)]
    assert left_edges(picture, TARGET["boxes"][[3]]) == [LOOKS["missed"].color]
    assert colors_at(picture, 20, 105) == GROUND_TRUTH_COLOR  # a found object has a thin outline
    assert colors_at(picture, 21, 105) == (0, 0, 0)


def test_difficult_objects_are_dashed() -> None:
    for draw in (DetectionImages().draw, DetectionImages().draw_mistakes):
        column = draw(IMAGE, TARGET, FOUND, NAMES)[0, 182:258, 290]
        assert 25 < int((column == 255).sum()) < 50 and 25 < int((column == 0).sum()) < 50


def test_small_images_are_enlarged_to_the_width_of_a_card_and_boxes_with_them() -> None:
    target = TARGET | {"boxes": TARGET["boxes"] / 4}
    found = FOUND | {"boxes": FOUND["boxes"] / 4}
    small = DetectionImages().draw_mistakes(torch.zeros(3, 75, 100, dtype=torch.uint8), target, found, NAMES)
    assert torch.equal(small, DetectionImages().draw_mistakes(IMAGE, TARGET, FOUND, NAMES))


def test_lines_of_large_images_are_as_wide_on_the_card() -> None:
    """Four times the card's width: outlines of eight pixels."""
    target, found = TARGET | {"boxes": TARGET["boxes"] * 4}, FOUND | {"boxes": FOUND["boxes"] * 4}
    picture = DetectionImages().draw_mistakes(torch.zeros(3, 1200, 1600, dtype=torch.uint8), target, found, NAMES)
    assert [colors_at(picture, x, 420) for x in (87, 88, 95, 96)] == [(0,) * 3, *[RIGHT.color] * 2, (0,) * 3]
