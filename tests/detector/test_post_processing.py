"""Threshold, hard and soft NMS: by hand, and against a slow loop over the classes; and the detections of RoI heads."""

from collections.abc import Callable
from math import exp

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.ops import box_iou, nms

from detector.image_batch import ImageBatch
from detector.post_processing import NMS, Candidates, likely_boxes, suppression
from detector.roi_heads import RoIConfig, RoIHeads

Heads = Callable[..., RoIHeads]
Batch = Callable[..., ImageBatch]
Boxes = Callable[..., Tensor]


def candidates(count: int, classes: int, seed: int = 0) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    corner, sides = (torch.rand(count, 2, generator=generator) for _ in range(2))
    boxes = torch.cat((corner * 60, corner * 60 + 20 + sides * torch.tensor([70.0, 30.0])), dim=1)
    labels = torch.randint(1, classes + 1, (count,), generator=generator)
    return Candidates(boxes, labels, torch.rand(count, generator=generator), torch.arange(count))


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
    (kept,) = suppression(kind, iou, sigma).of_images([found], SIZES[:1], 0.05, limit)
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
    found = Candidates(
        BOXES, torch.tensor([7, 7, 7, 7]), torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([5, 6, 7, 8])
    )
    if kind == "soft_gaussian":  # the copy also falls by its overlap of 0.6 with the second, which is taken before it
        expected = expected | {3: expected[3] * exp(-0.72)}
    (kept,) = suppression(kind, 0.5, 0.5).of_images([found], SIZES[:1], 0.001, 10)
    order = sorted(expected, key=lambda index: -expected[index])
    assert kept.scores.tolist() == pytest.approx([expected[index] for index in order], rel=1e-5)
    assert kept.boxes.tolist() == BOXES[order].tolist()
    assert kept.rois.tolist() == [5 + index for index in order]


@pytest.mark.parametrize("kind", ["hard", "soft_linear", "soft_gaussian"])
def test_classes_do_not_compete(kind: NMS) -> None:
    found = Candidates(BOXES[[0, 3]], torch.tensor([2, 1]), torch.tensor([0.3, 0.6]), torch.tensor([5, 6]))
    (kept,) = suppression(kind, 0.5, 0.5).of_images([found], SIZES[:1], 0.001, 10)
    assert (kept.labels.tolist(), kept.rois.tolist()) == ([1, 2], [6, 5])
    assert kept.scores.tolist() == pytest.approx([0.6, 0.3])
    (one,) = suppression(kind, 0.5, 0.5).of_images([found], SIZES[:1], 0.001, 1)
    assert one.labels.tolist() == [1]
    (empty,) = suppression(kind, 0.5, 0.5).of_images([Candidates(*(part[:0] for part in found))], SIZES[:1], 0.001, 10)
    assert [len(part) for part in empty] == [0, 0, 0, 0]


def test_soft_scores_must_exceed_the_threshold() -> None:
    """0.8 x 0.4 x 1/3 = 0.107."""
    found = Candidates(BOXES[:3], torch.ones(3).long(), torch.tensor([0.9, 0.8, 0.7]), torch.arange(3))
    lengths = [
        len(suppression("soft_linear", 0.5, 0.5).of_images([found], SIZES[:1], threshold, 10)[0].scores)
        for threshold in (0.1, 0.11, 0.7, 0.9)
    ]
    assert lengths == [3, 2, 1, 0]


SIZES = [(20, 50), (100, 64), (20, 50)]


def test_likely_boxes() -> None:
    boxes: Tensor = torch.tensor([[[-5.0, 1, 9, 30], [3, 4, 8, 9]], [[60, 1, 70, 9], [1, 2, 3, 4]]])
    scores = torch.tensor([[0.6, 0.2], [0.9, 0.3]])
    found, of_wide, of_none = likely_boxes(boxes.repeat(2, 1, 1), scores.repeat(2, 1), [2, 2, 0], SIZES, 0.2)
    # A score of 0.2 does not exceed 0.2; the box beyond the right border is nothing once clipped.
    assert found.boxes.tolist() == [[0, 1, 9, 20], [1, 2, 3, 4]]
    assert found.labels.tolist() == [1, 2]
    assert found.scores.tolist() == pytest.approx([0.6, 0.3])
    assert of_wide.boxes.tolist() == [[0, 1, 9, 30], [60, 1, 64, 9], [1, 2, 3, 4]]
    assert (of_wide.labels.tolist(), of_wide.rois.tolist()) == ([1, 1, 2], [0, 1, 1])
    assert [tuple(part.shape) for part in of_none] == [(0, 4), (0,), (0,), (0,)]


def test_boxes_thinner_than_a_pixel_are_kept() -> None:
    """Only what is as good as nothing goes: sides of a hundredth of a pixel in the batch."""
    boxes = torch.tensor([[[3.0, 4, 3.5, 9]], [[3, 4, 3.02, 4.02]], [[3, 4, 3.005, 9]], [[3, 4, 9, 4.005]]])
    (found,) = likely_boxes(boxes, torch.full((4, 1), 0.9), [4], [(20, 50)], 0.2)
    assert found.boxes.tolist() == boxes[:2, 0].tolist()


# Detections of RoI heads


def predictions(rois: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rois, 4, generator=generator) * 2, torch.randn(rois, columns, 4, generator=generator)


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_detections_equal_a_slow_selection(
    class_agnostic: bool, heads: Heads, image_batch: Batch, random_boxes: Boxes
) -> None:
    roi_heads = heads(class_agnostic=class_agnostic, score_threshold=0.2, nms_iou=0.4, detections_per_image=12)
    rois, size = random_boxes(40, 5), (170, 200)
    logits, deltas = predictions(40, 1 if class_agnostic else 3)
    (found,) = roi_heads.detections(logits, deltas, [rois], image_batch(size))
    scores, expected = logits.softmax(1), []
    for label in (1, 2, 3):
        column = deltas[:, 0 if class_agnostic else label - 1] * torch.tensor(roi_heads.config.delta_std)
        boxes = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(column, rois)
        boxes = torch.stack([boxes[:, i].clamp(0, size[1 - i % 2]) for i in range(4)], dim=1)
        likely = scores[:, label] > 0.2
        boxes, class_scores = boxes[likely], scores[likely, label]
        expected += [(float(class_scores[i]), label, boxes[i]) for i in nms(boxes, class_scores, 0.4).tolist()]
    expected = sorted(expected, key=lambda each: -each[0])
    assert len(expected) > 12
    assert found["labels"].tolist() == [label for _, label, _ in expected[:12]]
    torch.testing.assert_close(found["scores"], torch.tensor([score for score, _, _ in expected[:12]]))
    torch.testing.assert_close(found["boxes"], torch.stack([box for *_, box in expected[:12]]), atol=1e-3, rtol=1e-5)


def test_detections_equal_torchvisions(
    heads: Heads, image_batch: Batch, random_boxes: Boxes, torchvision_heads: Callable[[RoIConfig], TorchvisionRoIHeads]
) -> None:
    roi_heads = heads(score_threshold=0.05, nms_iou=0.5, detections_per_image=30)
    rois, sizes = [random_boxes(30, 5), random_boxes(25, 6)], [(170, 200), (140, 160)]
    logits, deltas = predictions(55, 3)
    found = roi_heads.detections(logits, deltas, rois, image_batch(*sizes))
    with_background = torch.cat((torch.zeros(55, 1, 4), deltas), dim=1).flatten(1)
    peer = torchvision_heads(roi_heads.config).postprocess_detections(logits, with_background, rois, sizes)
    for ours, boxes, scores, labels in zip(found, *peer, strict=True):
        assert len(boxes) == 30
        assert torch.equal(ours["labels"], labels)
        torch.testing.assert_close(ours["scores"], scores)
        torch.testing.assert_close(ours["boxes"], boxes, atol=1e-3, rtol=1e-5)


def test_detections_return_to_original_pixels_axis_by_axis(heads: Heads, image_batch: Batch) -> None:
    """61 x 200 became 30 x 100: the height by a factor of 61 / 30, the width by 2."""
    roi_heads = heads(classes=2)
    rois = torch.tensor([[10.0, 3.0, 75.0, 15.0], [50.0, 6.0, 300.0, 90.0]])
    logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 8.0]])
    batch = image_batch((30, 100), originals=[(61, 200)])
    (found,) = roi_heads.detections(logits, torch.zeros(2, 2, 4), [rois], batch)
    assert found["labels"].tolist() == [1, 2]
    torch.testing.assert_close(found["boxes"], torch.tensor([[20.0, 6.1, 150.0, 30.5], [100.0, 12.2, 200.0, 61.0]]))


@pytest.mark.parametrize(
    ("nms", "scores"),
    [("hard", [0.9, 0.5]), ("soft_linear", [0.9, 0.5, 0.32]), ("soft_gaussian", [0.9, 0.5, 0.8 * 0.48675226])],
)
def test_kinds_of_nms(nms: str, scores: list[float], heads: Heads, image_batch: Batch) -> None:
    """The second box overlaps the first by 0.6: 0.8 x 0.4, or 0.8 x exp(-0.36 / 0.5). The third is alone."""
    roi_heads = heads(classes=1, nms=nms, nms_iou=0.5)
    rois = torch.tensor([[0.0, 0, 40, 20], [0, 0, 40, 12], [100, 100, 140, 112]])
    probabilities = torch.tensor([0.9, 0.8, 0.5])
    logits = torch.stack((torch.zeros(3), torch.logit(probabilities)), dim=1)
    (found,) = roi_heads.detections(logits, torch.zeros(3, 1, 4), [rois], image_batch((200, 200)))
    assert found["scores"].tolist() == pytest.approx(scores)
    assert found["boxes"].tolist() == rois[[0, 2, 1]][: len(scores)].tolist()


def test_a_score_must_exceed_the_threshold_and_empty_boxes_are_dropped(heads: Heads, image_batch: Batch) -> None:
    roi_heads = heads(classes=1, score_threshold=0.5)
    rois = torch.tensor([[0.0, 0, 9, 9], [20, 20, 40, 30], [150, 10, 160, 20]])  # the last lies outside of the image
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.1], [0.0, 5.0]])
    (found,) = roi_heads.detections(logits, torch.zeros(3, 1, 4), [rois], image_batch((50, 100)))
    assert found["boxes"].tolist() == [[20, 20, 40, 30]]
