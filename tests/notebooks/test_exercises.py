"""The exercises of notebooks 01 and 03: their checks accept what is right, and nothing else."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from torchvision.ops import box_iou, nms

from detector import boxes as box_ops

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks/01_faster_rcnn_step_by_step.ipynb"


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    """Return the names that the cells of exercises and solutions define."""
    names: dict[str, Any] = {"torch": torch, "box_iou": box_iou, "nms": nms, "box_ops": box_ops}
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    for cell in cells:
        if cell.cell_type == "code" and ("def check_" in cell.source or "_solution(" in cell.source):
            exec(cell.source, names)
    return names


def overlap(a: list[float], b: list[float], clamp: bool = True, extra: float = 0.0) -> float:
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + extra for i in (0, 1)]
    both = math.prod(max(side, 0) for side in sides) if clamp else math.prod(sides)
    areas = [math.prod(box[i + 2] - box[i] + extra for i in (0, 1)) for box in (a, b)]
    return both / (sum(areas) - both)


def greedy(boxes: list[list[float]], scores: list[float], threshold: float) -> list[int]:
    kept: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda index: -scores[index]):
        if all(overlap(boxes[index], boxes[other]) <= threshold for other in kept):
            kept.append(index)
    return kept


def moved(deltas: list[float], anchor: list[float], swapped: bool = False, power: float = 1.0) -> list[float]:
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x = (anchor[0] + anchor[2]) / 2 + deltas[0] * (height if swapped else width)
    y = (anchor[1] + anchor[3]) / 2 + deltas[1] * (width if swapped else height)
    w, h = width * math.exp(power * deltas[2]), height * math.exp(power * deltas[3])
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def test_right_answers_pass(notebook: dict[str, Any]) -> None:
    assert notebook["check_iou"](overlap)
    assert notebook["check_decode"](moved)
    assert notebook["check_suppress"](greedy)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        ("check_iou", lambda a, b: None),
        ("check_iou", lambda a, b: float("nan")),
        ("check_iou", lambda a, b: overlap(a, b, clamp=False)),
        ("check_iou", lambda a, b: overlap(a, b, extra=1)),
        ("check_iou", lambda a, b: overlap(a, [b[0], b[1], b[2], b[3] + 0.001])),
        ("check_decode", lambda deltas, anchor: None),
        ("check_decode", lambda deltas, anchor: moved(deltas, anchor, swapped=True)),
        ("check_decode", lambda deltas, anchor: moved(deltas, anchor, power=-1)),
        ("check_decode", lambda deltas, anchor: moved(deltas, anchor)[:2] + anchor[2:]),
        ("check_suppress", lambda boxes, scores, threshold: None),
        ("check_suppress", lambda boxes, scores, threshold: sorted(greedy(boxes, scores, threshold))),
        ("check_suppress", lambda boxes, scores, threshold: greedy(boxes, scores, threshold - 0.01)),
        ("check_suppress", lambda boxes, scores, threshold: greedy(boxes, scores, 0.5)),
        (
            "check_suppress",  # what a dropped box overlaps is dropped too
            lambda boxes, scores, threshold: [
                index
                for index in greedy(boxes, scores, 1)
                if all(
                    overlap(boxes[index], boxes[other]) <= threshold
                    for other in range(len(boxes))
                    if scores[other] > scores[index]
                )
            ],
        ),
    ],
)
def test_wrong_answers_do_not(notebook: dict[str, Any], check: str, answer: Callable[..., Any]) -> None:
    assert not notebook[check](answer)


@pytest.mark.parametrize(
    ("part", "change", "right"), [("a", "c", True), *((p, c, False) for p, c in ("?a", "ab", "bc"))]
)
def test_the_verdict_on_the_run_of_notebook_03(part: str, change: str, right: bool) -> None:
    names: dict[str, Any] = {}
    cells = nbformat.read(NOTEBOOK.with_name("03_why_is_ap_low.ipynb"), as_version=4).cells
    exec(next(cell.source for cell in cells if "def check_verdict" in cell.source), names)
    assert names["check_verdict"](part, change) is right
