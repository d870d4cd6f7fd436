"""The picture of an audit: its axes follow the objects, and it says what they leave out."""

from types import SimpleNamespace

import numpy as np
import pytest

from detector.anchors import AnchorConfig
from detector.image_batch import ImageConfig
from detector.rpn import RPNConfig
from experiments.anchors.audited_data import AuditInput
from experiments.anchors.plot import audit_figure


def panels(widths: list[float], heights: list[float], scale: float = 2):
    """Return the three axes for objects of these sides in an image that is not resized, with one square anchor."""
    boxes = np.array([[0, 0, width, height] for width, height in zip(widths, heights, strict=True)], dtype=np.float32)
    objects = SimpleNamespace(
        box=boxes.reshape(-1, 4),
        image_id=np.zeros(len(boxes), dtype=int),
        label=np.ones(len(boxes), dtype=int),
        difficult=np.zeros(len(boxes), dtype=bool),
    )
    truth = SimpleNamespace(objects=objects, sizes=np.array([[4000, 4000]]), class_names=["one"])
    anchors = AnchorConfig(scales=[scale], aspect_ratios=[1], straddling="keep")
    image = ImageConfig(shortest_side=[4000], longest_side=4000)
    given = AuditInput(anchors, (16,), image, RPNConfig(), "drop", truth)
    return audit_figure(given, given.audit(), "title").axes


def drawn(axes) -> float:
    """Return how many objects the bars of a histogram hold."""
    return sum(bar.get_height() for bar in axes.patches)


def test_few_extreme_objects_do_not_stretch_the_axes() -> None:
    sides, ratios, both = panels([40.0] * 298 + [1.0, 3200.0], [40.0] * 298 + [1.0, 3200.0])
    low, high = sides.get_xlim()
    assert low >= 16 and high <= 110  # an octave on both sides of 40, up to the bins' ends; the anchor is of 32
    assert "not shown: 2 of 300 objects" in sides.get_xlabel() and "1 to 3.2e+03" in sides.get_xlabel()
    assert drawn(sides) == pytest.approx(298)
    assert "not shown" not in ratios.get_xlabel() and drawn(ratios) == pytest.approx(300)
    assert "not shown: 2 of 300 objects" in both.get_xlabel()
    assert both.get_ylim()[1] <= 110


def test_an_object_is_missing_in_the_third_panel_where_one_of_its_sides_is_beyond() -> None:
    sides, ratios, both = panels([40.0] * 299 + [400.0], [40.0] * 299 + [4.0])
    assert "not shown" not in sides.get_xlabel()  # the area is the others'
    assert "not shown: 1 of 300 objects" in ratios.get_xlabel()
    assert "not shown: 1 of 300 objects" in both.get_xlabel()


@pytest.mark.parametrize("sides", [[20.0, 45.0, 90.0], [10.0, 19.0, 37.0] * 100, []])
def test_nothing_is_left_out_where_objects_are_within_an_octave_of_others(sides: list[float]) -> None:
    for axes in panels(sides, sides):
        assert "not shown" not in axes.get_xlabel()


def test_every_anchor_is_shown() -> None:
    sides, _, both = panels([40.0] * 300, [40.0] * 300, scale=128)
    assert sides.get_xlim()[1] >= 2048 and both.get_xlim()[1] >= 2048
