"""What GPUs compute at once for all images, computed so on the CPU: the same as one by one."""

from copy import deepcopy
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from detector.anchors import AnchorConfig
from detector.assignment import Around, IoUMatcher
from detector.backbones.base import BackboneConfig, BackboneName
from detector.faster_rcnn import FasterRCNN
from detector.image_batch import ImageConfig
from detector.kernels import transfers
from detector.kernels.nms import nms_of_classes, nms_of_levels
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.sampling import IGNORED, NEGATIVE, POSITIVE, GroundTruth, sample

BOXES = torch.tensor([[10.0, 5, 60, 60], [40, 20, 90, 70], [5, 5, 30, 20]])


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`at_once()`: from now on all images are computed at once."""
    return lambda: monkeypatch.setattr(transfers, "_CPUS", set())


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "small_c4", "difficult": "ignore", "straddling": "drop", "best_per_object": "one"},
        {"backbone": "resnet18_fpn", "difficult": "drop", "straddling": "keep", "pooling": "roi_pool"},
        {"backbone": "resnet18_fpn", "difficult": "keep", "straddling": "drop", "objectness": "softmax"},
        {"backbone": "resnet18_fpn", "difficult": "ignore", "straddling": "drop", "matcher": "atss"},
        {"backbone": "small_c4", "difficult": "drop", "straddling": "keep", "matcher": "simota"},
    ],
)
def test_the_whole_detector(options: dict[str, Any], images: int, at_once: Any) -> None:
    """Losses (with so many samples that all are taken), gradients, detections and proposals."""
    torch.manual_seed(0)
    rpn = {key: options[key] for key in ("best_per_object", "objectness", "matcher") if key in options}
    detector = FasterRCNN(
        3,
        BackboneConfig(
            cast(BackboneName, options["backbone"]),
            weights="none",
            frozen_stages=0,
            norm="batch",
            fpn_channels=32,
            box_head_channels=32,
        ),
        AnchorConfig([1.0, 2.0, 4.0], straddling=options["straddling"]),
        RPNConfig(samples_per_image=10**5, pre_nms_train=300, pre_nms_test=300, score_threshold=0.45, **rpn),
        RoIConfig(
            samples_per_image=10**4,
            positive_fraction=1.0,
            score_threshold=0.2,
            pooling=options.get("pooling", "roi_align"),
        ),
        ImageConfig(shortest_side=[96]),
        options["difficult"],
    )
    detector.roi_heads.predictor.deltas.weight.data.normal_(std=0.05)
    pixels = [torch.randint(0, 255, (3, 80, 100 + 10 * (i // 2)), dtype=torch.uint8) for i in range(images)]
    flags = torch.tensor([False, True, False])
    targets = [{"boxes": BOXES[:n], "labels": torch.tensor([1, 2, 3])[:n], "difficult": flags[:n]} for n in (2, 0, 3)]
    results: list[list[Tensor]] = []
    for now in (lambda: None, at_once):
        now()
        network = deepcopy(detector)
        losses = network.losses(pixels, targets[:images])
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        with torch.no_grad():
            detections, proposals = network.eval()(pixels)
        assert all(len(found["boxes"]) > 5 for found in detections)
        tensors = [value for found in detections for value in found.values()]
        results.append([*losses.values(), *gradients, *tensors, *proposals])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


def test_matches_of_images_with_unequal_numbers_of_objects(at_once: Any) -> None:
    torch.manual_seed(1)
    corners = torch.rand(3, 40, 2) * 60
    candidates = list(torch.cat((corners, corners + torch.rand(3, 40, 2) * 50 + 1), dim=2))
    candidates[1] = candidates[1][:25]
    truths = [GroundTruth(BOXES[:n], torch.ones(n).long(), torch.arange(n) == 1) for n in (3, 0, 2)]
    matcher = IoUMatcher(0.4, (0.0, 0.2), "one")
    expected = matcher.of_images(candidates, truths, "ignore", [Around()] * 3)
    assert {kind for found in expected for kind in found.kind.tolist()} == {POSITIVE, NEGATIVE, IGNORED}
    at_once()
    for found, other in zip(matcher.of_images(candidates, truths, "ignore", [Around()] * 3), expected, strict=True):
        assert found.kind.equal(other.kind)
        assert found.index.equal(other.index)
        assert found.iou.equal(other.iou)


def test_samples(at_once: Any) -> None:
    """As many as there should be, of the right kind, each as often as the others."""
    at_once()
    kinds = [torch.tensor([POSITIVE] * p + [IGNORED] * 3 + [NEGATIVE] * n) for p, n in ((6, 20), (1, 2), (0, 9))]
    drawn = torch.zeros(29)
    for _ in range(600):
        for kind, (positives, negatives), expected in zip(
            kinds, sample(kinds, 8, 0.5), [(4, 4), (1, 2), (0, 8)], strict=True
        ):
            assert (len(positives.unique()), len(negatives.unique())) == expected == (len(positives), len(negatives))
            assert (kind[positives] == POSITIVE).all()
            assert (kind[negatives] == NEGATIVE).all()
            if kind is kinds[0]:
                drawn[positives] += 1
                drawn[negatives] += 1
    assert (drawn[:6] / 600 - 4 / 6).abs().max() < 0.08
    assert (drawn[9:] / 600 - 4 / 20).abs().max() < 0.08


@pytest.mark.parametrize("of_nms", [10, 70, 1000])
def test_nms_of_many_images(of_nms: int, at_once: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    counts = [40, 0, 25, 30]
    corners = torch.rand(95, 2) * 60
    boxes, scores = torch.cat((corners, corners + torch.rand(95, 2) * 40), dim=1), torch.rand(95)
    labels, first = torch.randint(1, 4, (95,)), 0
    monkeypatch.setattr("detector.kernels.nms._AT_ONCE", of_nms)
    at_once()
    kept = nms_of_classes(boxes, scores, labels, counts, 0.3, 100, 12)
    for count, own in zip(counts, kept, strict=True):
        rows = slice(first, first + count)
        expected = batched_nms(boxes[rows], scores[rows], labels[rows], 0.3)[:12] + first
        assert own.tolist() == expected.tolist()
        first += count


@pytest.mark.parametrize("few", [0, 10**6])
def test_nms_of_levels(few: int, at_once: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rounds, and by one call: levels and images do not compete, and of equals none is lost."""
    torch.manual_seed(3)
    numbers, images = [30, 12, 1], 3  # of the levels
    corners = torch.rand(images, 43, 2) * 50
    boxes = torch.cat((corners, corners + torch.rand(images, 43, 2) * 50), dim=2)
    boxes[0, 35] = boxes[0, 3]  # the same box on two levels
    scores = torch.cat([torch.rand(images, n).sort(dim=1, descending=True).values for n in numbers], dim=1)
    usable = torch.rand(images, 43) < 0.8
    usable[0, [3, 35]], usable[1] = True, False
    expected = nms_of_levels(boxes, scores, numbers, usable, 0.3, 100, 9)
    at_once()
    monkeypatch.setattr("detector.kernels.nms._FEW", few)
    for limit in (9, 100):
        kept, counts = nms_of_levels(boxes, scores, numbers, usable, 0.3, 100, limit)
        assert counts == expected[1] == usable.sum(dim=1).tolist()
        assert [own[:9].tolist() for own in kept] == [own.tolist() for own in expected[0]]
    assert {3, 35} <= set(kept[0].tolist())
    alone = nms_of_levels(boxes[:1], scores[:1], numbers, usable[:1], 0.3, 100, 100)
    assert (alone[0][0].tolist(), alone[1]) == (kept[0].tolist(), counts[:1])
    assert [len(own) for own in expected[0]] == [9, 0, 9]
