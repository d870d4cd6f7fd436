"""ATSS and SimOTA: cases worked out by hand, other implementations in plain loops, and what they share with IoU."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detector.assignment import Around, ATSSMatcher, IoUMatcher, NWDMatcher, PairMatcher, SimOTAMatcher
from detector.kernels import transfers
from detector.sampling import FAR, IGNORED, NEGATIVE, POSITIVE, GroundTruth, Matches

OBJECT = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
LEVELS = torch.tensor(
    [
        [5.0, 0.0, 15.0, 10.0],  # IoU with OBJECT 50 / 150 = 0.3333
        [0.5, 0.0, 10.5, 10.0],  # 95 / 105 = 0.9048
        [0.0, 0.0, 10.0, 10.0],  # 1
        [7.0, 0.0, 17.0, 10.0],  # 30 / 170: the fourth by distance, so not looked at
        [-5.0, -5.0, 15.0, 15.0],  # of the second level: 100 / 400 = 0.25
        [5.0, -5.0, 25.0, 15.0],  # 50 / 450 = 0.1111
        [25.0, -5.0, 45.0, 15.0],  # 0
    ]
)


def test_atss_by_hand() -> None:
    """Three of each level: the mean is 0.4332, the standard deviation (of n - 1) 0.4192, so the threshold 0.8524."""
    matches = ATSSMatcher(k=3)(LEVELS, OBJECT, Around([4, 3]))
    assert matches.kind.tolist() == [NEGATIVE, POSITIVE, POSITIVE] + [NEGATIVE] * 4
    assert matches.iou.tolist() == pytest.approx([0.3333, 0.9048, 1, 0.1765, 0.25, 0.1111, 0], abs=1e-4)
    # Two of each: 1, 0.9048, 0.25 and 0.1111 have the mean 0.5665 and the deviation 0.4511: 1.0176.
    assert ATSSMatcher(k=2)(LEVELS, OBJECT, Around([4, 3])).kind.tolist() == [NEGATIVE] * 7
    # As one level, of which the closest three are at 0, 0.5 and (the large one) 0: 0.7183 + 0.4082 = 1.1265.
    assert ATSSMatcher(k=3)(LEVELS, OBJECT, Around()).kind.tolist() == [NEGATIVE] * 7


def test_atss_needs_the_centre_inside_the_object() -> None:
    """With one anchor the threshold is its own IoU."""
    shifted = OBJECT + torch.tensor([4.0, 0.0, 4.0, 0.0])
    assert ATSSMatcher()(shifted, OBJECT, Around()).kind.tolist() == [POSITIVE]
    assert ATSSMatcher()(shifted + torch.tensor([2.0, 0.0, 2.0, 0.0]), OBJECT, Around()).kind.tolist() == [NEGATIVE]
    # An anchor that overlaps nothing is of nothing, though 0 is the mean of nothing but zeros.
    assert ATSSMatcher()(OBJECT + 200, OBJECT, Around()).kind.tolist() == [NEGATIVE]


def test_atss_of_several_objects_and_equal_distances() -> None:
    wide, high = [0.0, 4.0, 10.0, 6.0], [4.0, 0.0, 6.0, 10.0]  # anchors of one location
    anchors = torch.tensor([wide, high, [0.0, 4.0, 10.0, 7.0]])
    # k counts anchors: of a location's two the first is taken, and alone it is at its own mean.
    assert ATSSMatcher(k=1)(anchors[:2], OBJECT, Around()).kind.tolist() == [POSITIVE, NEGATIVE]
    assert ATSSMatcher(k=1)(anchors[:2].flip(0), OBJECT, Around()).kind.tolist() == [POSITIVE, NEGATIVE]
    # Both IoUs are 0.2, and so is their mean.
    assert ATSSMatcher(k=2)(anchors[:2], OBJECT, Around()).kind.tolist() == [POSITIVE, POSITIVE]
    # Positive for both objects, the third goes to the one that it overlaps more: 20 / 30 against 30 / 100.
    objects = torch.cat((OBJECT, torch.tensor([wide])))
    matches = ATSSMatcher(k=1)(anchors[2:], objects, Around())
    assert (matches.kind.tolist(), matches.index.tolist()) == ([POSITIVE], [1])


def iou(box: Sequence[float], other: Sequence[float]) -> float:
    return float(box_iou(torch.tensor([box]), torch.tensor([other])))


def center(box: Sequence[float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def atss_in_loops(anchors: list[list[float]], objects: list[list[float]], levels: list[int], k: int) -> dict[int, int]:
    """Return the objects of the positive anchors, by index."""
    best: dict[int, tuple[float, int]] = {}
    for number, box in enumerate(objects):
        looked_at, start = [], 0
        for length in levels:
            own = sorted(range(start, start + length), key=lambda i: math.dist(center(anchors[i]), center(box)))
            looked_at += own[:k]
            start += length
        ious = {i: iou(anchors[i], box) for i in looked_at}
        threshold = statistics.mean(ious.values()) + statistics.stdev(ious.values())
        for i, value in ious.items():
            x, y = center(anchors[i])
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if value >= threshold and inside and value > best.get(i, (0.0, 0))[0]:
                best[i] = value, number
    return {i: number for i, (_, number) in best.items()}


def found(matches: Matches) -> dict[int, int]:
    assert set(matches.kind.tolist()) <= {POSITIVE, NEGATIVE}
    return {i: int(matches.index[i]) for i in torch.where(matches.kind == POSITIVE)[0].tolist()}


@pytest.mark.parametrize("seed", range(6))
def test_atss_against_loops(random_boxes: Callable[..., Tensor], seed: int) -> None:
    anchors, objects = random_boxes(120, seed), random_boxes(5, 100 + seed)
    expected = atss_in_loops(anchors.tolist(), objects.tolist(), [70, 40, 10], 9)
    assert len(expected) > 3
    assert found(ATSSMatcher()(anchors, objects, Around([70, 40, 10]))) == expected


# SimOTA

POINTS = torch.tensor([[4.0, 4.0], [12.0, 4.0], [4.0, 12.0], [100.0, 100.0]])
ANCHORS = torch.cat((POINTS - 4, POINTS + 4), dim=1)
SMALL = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
# Their IoUs with SMALL are 0.5, 0.875, 0.75 and 1.
PREDICTED = torch.tensor([[0.0, 0.0, 8.0, 4.0], [0.0, 0.0, 8.0, 7.0], [0.0, 0.0, 8.0, 6.0], [0.0, 0.0, 8.0, 8.0]])


def around(logits: Sequence[float], predicted: Tensor = PREDICTED, stride: int = 8) -> Around:
    return Around([len(logits)], [stride], torch.tensor(logits), predicted)


def test_simota_by_hand() -> None:
    """The last anchor is far away; 0.5 + 0.875 + 0.75 is 2 as a whole number, so two anchors are chosen.

    The first is the only one inside the object, so it costs least, though its loss is the highest: 0.693 + 3 * 0.693.
    The second costs 0.693 + 3 * 0.134 = 1.09, and the third 0.693 + 3 * 0.288 = 1.56, both plus 100000.
    """
    assert SimOTAMatcher()(ANCHORS, SMALL, around([0, 0, 0, 0])).kind.tolist() == [1, 1, 0, 0]
    # If its objectness is -2, which costs 2.127, the second is more expensive than the third: 2.53.
    assert SimOTAMatcher()(ANCHORS, SMALL, around([0, -2, 0, 0])).kind.tolist() == [1, 0, 1, 0]
    # Without a weight for boxes their losses do not count; with one IoU to add up there is one positive.
    assert SimOTAMatcher(iou_weight=0)(ANCHORS, SMALL, around([0, -1, 0, 0])).kind.tolist() == [1, 0, 1, 0]
    assert SimOTAMatcher(top=1)(ANCHORS, SMALL, around([0, 0, 0, 0])).kind.tolist() == [1, 0, 0, 0]
    # Within half a stride of the centre lies only the first: one, whose IoU of 0.5 counts as 1.
    assert SimOTAMatcher(radius=0.5)(ANCHORS, SMALL, around([0, 0, 0, 0])).kind.tolist() == [1, 0, 0, 0]


def test_simota_gives_an_anchor_to_the_object_of_the_least_cost() -> None:
    """Both objects choose the first anchor; the second object's IoU with what it predicts is the higher one."""
    objects = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 5.0]])
    matches = SimOTAMatcher(top=1)(ANCHORS[:1], objects, around([0], PREDICTED[:1]))
    assert (matches.kind.tolist(), matches.index.tolist()) == ([POSITIVE], [1])
    matches = SimOTAMatcher(top=1)(ANCHORS[:1], objects.flip(0), around([0], PREDICTED[:1]))
    assert matches.index.tolist() == [0]


def simota_in_loops(
    anchors: list[list[float]], objects: list[list[float]], strides: list[int], known: Around
) -> dict[int, int]:
    """Return the objects of the positive anchors, by index; as YOLOX's `get_assignments` goes about it."""
    assert known.logits is not None and known.boxes is not None
    logits, boxes = known.logits.tolist(), known.boxes.tolist()
    inside, close = {}, {}
    for i, anchor in enumerate(anchors):
        x, y = center(anchor)
        for number, box in enumerate(objects):
            inside[i, number] = box[0] < x < box[2] and box[1] < y < box[3]
            cx, cy = center(box)
            close[i, number] = max(abs(x - cx), abs(y - cy)) < 2.5 * strides[i]
    all_objects = range(len(objects))
    valid = [i for i in range(len(anchors)) if any(inside[i, n] or close[i, n] for n in all_objects)]
    cost = {}
    for i in valid:
        for number in all_objects:
            overlap = iou(boxes[i], objects[number])
            loss = math.log1p(math.exp(-logits[i])) - 3 * math.log(overlap + 1e-8)
            cost[i, number] = loss + (0 if inside[i, number] and close[i, number] else 1e5)
    chosen: dict[int, list[int]] = {}
    for number in all_objects:
        best = sorted((iou(boxes[i], objects[number]) for i in valid), reverse=True)[:10]
        for i in sorted(valid, key=lambda i: cost[i, number])[: max(1, int(sum(best)))]:
            chosen.setdefault(i, []).append(number)
    return {
        i: own[0] if len(own) == 1 else min(all_objects, key=lambda number: cost[i, number])
        for i, own in chosen.items()
    }


@pytest.mark.parametrize("seed", range(6))
def test_simota_against_loops(random_boxes: Callable[..., Tensor], seed: int) -> None:
    anchors, objects = random_boxes(200, seed, 120.0), random_boxes(5, 100 + seed, 100.0)
    logits = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    known = Around([140, 60], [4, 12], logits, anchors + 3 * logits[:, None] * torch.tensor([1.0, -1, 2, 1]))
    expected = simota_in_loops(anchors.tolist(), objects.tolist(), [4] * 140 + [12] * 60, known)
    assert len(expected) > 10
    assert found(SimOTAMatcher()(anchors, objects, known)) == expected


# What all of them have in common

MATCHERS: list[PairMatcher] = [
    IoUMatcher(0.7, (0.0, 0.3), True),
    NWDMatcher(constant=30.0),
    ATSSMatcher(),
    SimOTAMatcher(),
]


def test_adaptive_matchers_ignore_what_is_near_difficult_objects() -> None:
    """A difficult object is not matched; what overlaps it by 0.3 or more, and no other object is positive for, is
    ignored."""
    objects = torch.cat((OBJECT, OBJECT + 40))
    truth = GroundTruth(objects, torch.tensor([1, 1]), torch.tensor([False, True]))
    candidates = torch.cat((OBJECT, OBJECT + 40, OBJECT + 43, OBJECT + 80))  # IoU 49 / 151 = 0.32 of the third
    known = Around([4], [8], torch.zeros(4), candidates)
    for matcher in (ATSSMatcher(k=1), SimOTAMatcher(top=1)):
        for treatment, kinds in (("keep", [1, 1, 0, 0]), ("drop", [1, 0, 0, 0]), ("ignore", [1, -1, -1, 0])):
            (matches,) = matcher.of_images([candidates], [truth], treatment, [known])
            assert matches.kind.tolist() == kinds
            assert matches.index[0] == 0
        alone = GroundTruth(objects[1:], truth.labels[1:], truth.difficult[1:])
        (matches,) = matcher.of_images([candidates], [alone], "ignore", [known])
        assert matches.kind.tolist() == [NEGATIVE, IGNORED, IGNORED, NEGATIVE]


@pytest.mark.parametrize("matcher", MATCHERS, ids=lambda matcher: type(matcher).__name__)
def test_images_at_once_have_the_matches_of_each_alone(
    matcher: PairMatcher, random_boxes: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images with 3, 0 and 5 objects, some of them difficult, and anchors that are not used."""
    images = [random_boxes(60, 0)] * 3
    images[2] = torch.where((torch.arange(60) % 7 == 0)[:, None], torch.tensor([FAR, FAR, FAR + 1, FAR + 1]), images[0])
    truths = []
    for count in (3, 0, 5):
        difficult = torch.arange(count) % 3 == 1
        truths.append(GroundTruth(random_boxes(count, 7 + count), torch.ones(count, dtype=torch.int64), difficult))
    logits = torch.randn(3, 60, generator=torch.Generator().manual_seed(1))
    predicted = torch.stack([random_boxes(60, 20 + image) for image in range(3)])
    known = [Around([40, 20], [8, 16], own, boxes) for own, boxes in zip(logits, predicted, strict=True)]
    for treatment in ("keep", "drop", "ignore"):
        alone = matcher.of_images(images, truths, treatment, known)
        assert (alone[1].kind == NEGATIVE).all()
        assert all((alone[image].kind == POSITIVE).any() for image in (0, 2))
        with monkeypatch.context() as patch:
            patch.setattr(transfers, "_CPUS", set())
            together = matcher.of_images(images, truths, treatment, known)
        for one, other in zip(alone, together, strict=True):
            used = torch.ones(60, dtype=torch.bool) if one is not alone[2] else images[2][:, 0] < FAR
            positive = one.kind == POSITIVE
            assert torch.equal(one.kind[used], other.kind[used])
            assert torch.equal(one.index[positive & used], other.index[positive & used])


@pytest.mark.parametrize("matcher", MATCHERS, ids=lambda matcher: type(matcher).__name__)
def test_no_candidates_and_no_objects(matcher: PairMatcher) -> None:
    none: Any = torch.zeros(0, 4)
    nothing = Around([0], [8], torch.zeros(0), none)
    assert matcher(none, OBJECT, nothing).kind.shape == matcher(none, none, nothing).index.shape == (0,)
    some = Around([4], [8], torch.zeros(4), ANCHORS)
    assert matcher(ANCHORS, none, some).kind.tolist() == [NEGATIVE] * 4
