"""Threshold, hard and soft NMS: by hand, and against a slow loop over the classes."""

from math import exp

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detector.post_processing import NMS, Candidates, likely_boxes, suppress


def candidates(count: int, classes: int, seed: int = 0) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    corner, sides = (torch.rand(count, 2, generator=generator) for _ in range(2))
    boxes = torch.cat((corner * 60, corner * 60 + 20 + sides * torch.tensor([70.0, 30.0])), dim=1)
    labels = torch.randint(1, classes + 1, (count,), generator=generator)
    return Candidates(boxes, labels, torch.rand(count, generator=generator))


def slow_soft_nms(found: Candidates, kind: NMS, iou: float, sigma: float, threshold: float) -> list[tuple[float, int]]:
    """(score, index) of what is left, class by class, as the paper's figure 2 has it."""
    left = []
    for label in found.labels.unique().tolist():
        scores = {i: float(found.scores[i]) for i in torch.where(found.labels == label)[0].tolist()}
        while scores:
            best = max(scores, key=scores.__getitem__)
            left.append((scores.pop(best), best))
            for other in scores:
                overlap = float(box_iou(found.boxes[best][None], found.boxes[other][None]))
                if kind == "soft_gaussian":
                    scores[other] *= exp(-(overlap**2) / sigma)
                elif overlap > iou:
                    scores[other] *= 1 - overlap
    return sorted(((score, index) for score, index in left if score > threshold), reverse=True)


@pytest.mark.parametrize("kind", ["soft_linear", "soft_gaussian"])
@pytest.mark.parametrize(("iou", "sigma"), [(0.3, 0.5), (0.6, 0.2)])
@pytest.mark.parametrize("limit", [1000, 25])
def test_soft_nms_equals_a_slow_loop(kind: NMS, iou: float, sigma: float, limit: int) -> None:
    found = candidates(80, 3)
    expected = slow_soft_nms(found, kind, iou, sigma, 0.05)
    assert 25 < len(expected) < 80
    kept = suppress(found, kind, iou, sigma, 0.05, limit)
    assert kept.scores.tolist() == pytest.approx([score for score, _ in expected[:limit]], rel=1e-4)
    order = [index for _, index in expected[:limit]]
    assert torch.equal(kept.boxes, found.boxes[order])
    assert torch.equal(kept.labels, found.labels[order])


BOXES = torch.tensor(
    [[0.0, 0, 40, 20], [0, 0, 40, 12], [0, 0, 40, 8], [0, 0, 40, 20]]
)  # IoU with the first: 0.6, 0.4, 1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("hard", {0: 0.9, 2: 0.7}),  # 0.4 is below 0.5; the second and the copy go
        # The third overlaps the second (now 0.8 x 0.4) by 2/3, but comes before it.
        ("soft_linear", {0: 0.9, 2: 0.7, 1: 0.8 * 0.4 * (1 - 2 / 3)}),
        (
            "soft_gaussian",
            {0: 0.9, 2: 0.7 * exp(-0.32), 1: 0.8 * exp(-0.72) * exp(-8 / 9), 3: 0.6 * exp(-2) * exp(-0.32)},
        ),
    ],
)
def test_kinds_by_hand(kind: NMS, expected: dict[int, float]) -> None:
    found = Candidates(BOXES, torch.tensor([7, 7, 7, 7]), torch.tensor([0.9, 0.8, 0.7, 0.6]))
    if kind == "soft_gaussian":  # the copy also falls by its overlap of 0.6 with the second, which is taken before it
        expected = expected | {3: expected[3] * exp(-0.72)}
    kept = suppress(found, kind, 0.5, 0.5, 0.001, 10)
    order = sorted(expected, key=lambda index: -expected[index])
    assert kept.scores.tolist() == pytest.approx([expected[index] for index in order], rel=1e-5)
    assert kept.boxes.tolist() == BOXES[order].tolist()


@pytest.mark.parametrize("kind", ["hard", "soft_linear", "soft_gaussian"])
def test_classes_do_not_compete(kind: NMS) -> None:
    found = Candidates(BOXES[[0, 3]], torch.tensor([2, 1]), torch.tensor([0.3, 0.6]))
    kept = suppress(found, kind, 0.5, 0.5, 0.001, 10)
    assert kept.labels.tolist() == [1, 2]
    assert kept.scores.tolist() == pytest.approx([0.6, 0.3])
    assert suppress(found, kind, 0.5, 0.5, 0.001, 1).labels.tolist() == [1]
    empty = suppress(Candidates(*(part[:0] for part in found)), kind, 0.5, 0.5, 0.001, 10)
    assert [len(part) for part in empty] == [0, 0, 0]


def test_soft_scores_must_exceed_the_threshold() -> None:
    """0.8 x 0.4 x 1/3 = 0.107."""
    found = Candidates(BOXES[:3], torch.ones(3).long(), torch.tensor([0.9, 0.8, 0.7]))
    lengths = [
        len(suppress(found, "soft_linear", 0.5, 0.5, threshold, 10).scores) for threshold in (0.1, 0.11, 0.7, 0.9)
    ]
    assert lengths == [3, 2, 1, 0]


def test_likely_boxes() -> None:
    boxes: Tensor = torch.tensor([[[-5.0, 1, 9, 30], [3, 4, 8, 9]], [[60, 1, 70, 9], [1, 2, 3, 4]]])
    found = likely_boxes(boxes, torch.tensor([[0.6, 0.2], [0.9, 0.3]]), (20, 50), 0.2)
    # A score of 0.2 does not exceed 0.2; the box beyond the right border is nothing once clipped.
    assert found.boxes.tolist() == [[0, 1, 9, 20], [1, 2, 3, 4]]
    assert found.labels.tolist() == [1, 2]
    assert found.scores.tolist() == pytest.approx([0.6, 0.3])
