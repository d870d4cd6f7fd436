"""Matching, rule by rule, at exact values."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detector.anchors import AnchorConfig, AnchorGenerator
from detector.assignment import Around, IoUMatcher, Matcher, NWDMatcher, match
from detector.boxes import is_inside
from detector.sampling import IGNORED, NEGATIVE, POSITIVE, GroundTruth, Matches

OBJECT = torch.tensor([[0.0, 0.0, 100.0, 100.0]])


def strips(*heights: float) -> Tensor:
    """Boxes within OBJECT, as wide as it is: their IoU with it is height / 100."""
    return torch.tensor([[0.0, 0.0, 100.0, height] for height in heights])


def tiles(rows: int, columns: int, side: float) -> Tensor:
    """Boxes that tile the plane row by row."""
    return torch.tensor([[x, y, x + 1, y + 1] for y in range(rows) for x in range(columns)]) * side


def test_thresholds_at_exact_values() -> None:
    candidates = strips(71, 70, 69, 30, 29, 10, 9)
    kinds = match(candidates, OBJECT, 0.7, (0.0, 0.3)).kind
    assert kinds.tolist() == [POSITIVE, POSITIVE, IGNORED, IGNORED, NEGATIVE, NEGATIVE, NEGATIVE]
    # Fast R-CNN's background: [0.1, 0.5)
    kinds = match(strips(50, 49, 10, 9), OBJECT, 0.5, (0.1, 0.5)).kind
    assert kinds.tolist() == [POSITIVE, NEGATIVE, NEGATIVE, IGNORED]


def test_a_candidate_goes_to_the_object_it_overlaps_most() -> None:
    objects = torch.tensor([[0.0, 0.0, 40.0, 20.0], [10.0, 0.0, 50.0, 20.0], [200.0, 0.0, 240.0, 20.0]])
    candidates = torch.tensor([[9.0, 0.0, 49.0, 20.0], [1.0, 0.0, 41.0, 20.0], [199.0, 0.0, 239.0, 20.0]])
    matches = match(candidates, objects, 0.5, (0.0, 0.5))
    assert matches.kind.tolist() == [POSITIVE] * 3
    assert matches.index.tolist() == [1, 0, 2]


def test_best_per_object_includes_ties_and_keeps_the_object() -> None:
    objects = torch.tensor([[0.0, 0.0, 10.0, 20.0], [100.0, 100.0, 140.0, 120.0]])
    candidates = torch.tensor(
        [
            [0.0, 0.0, 40.0, 20.0],  # IoU 0.25 with the first object: its best, shared with the next two
            [-30.0, 0.0, 10.0, 20.0],
            [0.0, -60.0, 10.0, 20.0],
            [0.0, 0.0, 50.0, 20.0],  # 0.2
            [100.0, 100.0, 140.0, 110.0],  # 0.5 with the second object: its best
            [100.0, 100.0, 140.0, 104.0],  # 0.2
        ]
    )
    without = match(candidates, objects, 0.7, (0.0, 0.3))
    assert without.kind.tolist() == [NEGATIVE] * 4 + [IGNORED, NEGATIVE]
    matches = match(candidates, objects, 0.7, (0.0, 0.3), best_per_object=True)
    assert matches.kind.tolist() == [POSITIVE] * 3 + [NEGATIVE, POSITIVE, NEGATIVE]
    assert matches.index[matches.kind == POSITIVE].tolist() == [0, 0, 0, 1]


def test_one_best_per_object_is_the_first_of_ties_and_goes_to_that_object() -> None:
    objects = torch.tensor([[0.0, 0.0, 10.0, 20.0], [0.0, 0.0, 40.0, 16.0], [500.0, 0.0, 540.0, 10.0]])
    candidates = torch.tensor(
        [
            [0.0, 0.0, 40.0, 20.0],  # 0.25 with the first object, 0.8 with the second
            [-30.0, 0.0, 10.0, 20.0],  # 0.25 with the first
            [300.0, 0.0, 340.0, 20.0],
        ]
    )
    both = match(candidates, objects, 0.9, (0.0, 0.2), best_per_object=True)
    assert both.kind.tolist() == [POSITIVE, POSITIVE, NEGATIVE]
    assert both.index[:2].tolist() == [1, 0]
    swapped = match(candidates, objects[[1, 0, 2]], 0.9, (0.0, 0.2), best_per_object="one")
    one = match(candidates, objects, 0.9, (0.0, 0.2), best_per_object="one")
    # The first candidate is the best of two objects: the last of them has it. The third object has none.
    assert one.kind.tolist() == swapped.kind.tolist() == [POSITIVE, IGNORED, NEGATIVE]
    assert (one.index[0], swapped.index[0]) == (1, 1)
    alone = match(candidates[[1, 0]], objects[:1], 0.9, (0.0, 0.2), best_per_object="one")
    assert alone.kind.tolist() == [POSITIVE, IGNORED]


def test_one_best_may_overlap_another_object_more() -> None:
    objects = torch.tensor([[0.0, 0.0, 40.0, 20.0], [0.0, 0.0, 40.0, 4.0]])
    candidates = torch.tensor([[0.0, 0.0, 40.0, 20.0], [0.0, 0.0, 40.0, 12.0]])  # IoU 1, 0.2; 0.6, 1/3
    own, one = (match(candidates, objects, 0.7, (0.0, 0.3), best_per_object=value) for value in (True, "one"))
    assert own.kind.tolist() == one.kind.tolist() == [POSITIVE, POSITIVE]
    assert own.index.tolist() == [0, 0]
    assert one.index.tolist() == [0, 1]


def test_an_object_that_nothing_overlaps_has_no_best_candidates() -> None:
    candidates = tiles(2, 3, 10)
    far = torch.tensor([[500.0, 500.0, 520.0, 510.0]])
    matches = match(candidates, far, 0.7, (0.0, 0.3), best_per_object=True)
    assert matches.kind.tolist() == [NEGATIVE] * 6
    both = match(candidates, torch.cat((far, candidates[4:5])), 0.7, (0.0, 0.3), best_per_object=True)
    assert both.kind.tolist() == [NEGATIVE] * 4 + [POSITIVE, NEGATIVE]
    assert both.index[4] == 1


@pytest.mark.parametrize(
    ("box", "ties"),
    [
        ((229.0, 368.0, 250.0, 459.0), 36),
        ((184.0, 307.0, 521.0, 756.0), 37),
        ((590.0, 534.0, 667.0, 661.0), 3),
        ((538.0, 557.0, 682.0, 798.0), 2),
    ],
)
def test_ties_do_not_depend_on_rounding(box: tuple[float, float, float, float], ties: int) -> None:
    """All anchors of one shape that contain an object overlap it alike, though their corners are rounded."""
    (anchors,) = AnchorGenerator(AnchorConfig(), (16,))([(50, 50)], torch.device("cpu"))
    anchors = anchors[is_inside(anchors, (800, 800))]
    # The same anchors without the rounding of their corners, and their IoU in float64.
    center = ((anchors[:, :2] + anchors[:, 2:]).double() / 2 / 8).round() * 8
    sides = (anchors[:, 2:] - anchors[:, :2]).double()
    side = 2 ** sides.prod(1, keepdim=True).log2().div(2).round()
    root = 2 ** ((sides[:, 1:] / sides[:, :1]).log2().round() / 2)
    half = torch.cat((side / root, side * root), dim=1) / 2
    exact = box_iou(torch.tensor([box], dtype=torch.float64), torch.cat((center - half, center + half), dim=1))[0]
    expected = exact >= exact.max() - 1e-12
    assert int(expected.sum()) == ties
    matches = match(anchors, torch.tensor([box]), 0.99, (0.0, 0.3), best_per_object=True)
    assert torch.equal(matches.kind == POSITIVE, expected)


def test_treatments_of_difficult_objects() -> None:
    difficult_object = torch.tensor([[200.0, 0.0, 300.0, 100.0]])
    objects, difficult = torch.cat((difficult_object, OBJECT)), torch.tensor([True, False])
    near_object = strips(80, 20)  # IoU 0.8 and 0.2 with OBJECT
    near_difficult = strips(60, 50, 49) + torch.tensor([200.0, 0.0, 200.0, 0.0])
    candidates = torch.cat((near_object, near_difficult))

    def kinds_of(treatment: str, which: list[int], best_per_object: bool = False) -> list[int]:
        return match(
            candidates, objects[which], 0.5, (0.0, 0.5), best_per_object, difficult[which], treatment
        ).kind.tolist()

    assert kinds_of("keep", [0, 1]) == [POSITIVE, NEGATIVE, POSITIVE, POSITIVE, NEGATIVE]
    assert kinds_of("drop", [0, 1]) == [POSITIVE] + [NEGATIVE] * 4
    assert kinds_of("ignore", [0, 1]) == [POSITIVE, NEGATIVE, IGNORED, IGNORED, NEGATIVE]
    for best_per_object in (False, True):  # a difficult object has no best candidates either
        assert kinds_of("drop", [0], best_per_object) == [NEGATIVE] * 5
        assert kinds_of("ignore", [0], best_per_object) == [NEGATIVE, NEGATIVE, IGNORED, IGNORED, NEGATIVE]
    # What is positive for an object stays so, however much it also overlaps an ignored one; and it is that object's.
    # From the upper bound of negatives on, which in an RPN is not the bound of positives.
    ignored = match(strips(50, 30, 29), OBJECT, 0.7, (0.0, 0.3), False, torch.tensor([True]), "ignore")
    assert ignored.kind.tolist() == [IGNORED, IGNORED, NEGATIVE]
    both = match(OBJECT, OBJECT.repeat(2, 1), 0.5, (0.0, 0.5), False, difficult, "ignore")
    assert (both.kind.tolist(), both.index.tolist()) == ([POSITIVE], [1])


def test_no_objects_and_no_candidates() -> None:
    none = torch.zeros(0, 4)
    all_background = match(tiles(1, 3, 10), none, 0.7, (0.0, 0.3), best_per_object=True)
    assert all_background.kind.tolist() == [NEGATIVE] * 3
    assert all_background.index.tolist() == [0] * 3
    # Where background must overlap an object a little, an empty image has none.
    assert match(tiles(1, 3, 10), none, 0.5, (0.1, 0.5)).kind.tolist() == [IGNORED] * 3
    for objects in (OBJECT, none):
        matches = match(none, objects, 0.7, (0.0, 0.3), best_per_object=True)  # all anchors straddle the border
        assert matches.kind.shape == matches.index.shape == (0,)


# The normalised Wasserstein distance


def test_nwd_by_hand() -> None:
    """Both are a distance of 5 from a box of 6 x 8: one by its centre (3, 4), one by half its sides (3, 4)."""
    objects = torch.tensor([[0.0, 0.0, 6.0, 8.0]])
    candidates = torch.tensor([[3.0, 4.0, 9.0, 12.0], [-3.0, -4.0, 9.0, 12.0], [0.0, 0.0, 6.0, 8.0]])
    for constant, value in ((12.8, 0.676634), (5.0, 0.367879)):  # exp(-5 / 12.8), exp(-1)
        overlap = NWDMatcher(constant=constant).overlap(objects, candidates)
        assert overlap.tolist() == [pytest.approx([value, value, 1.0], abs=1e-6)]


def test_nwd_has_the_rules_of_iou_but_no_best_among_negatives() -> None:
    """Centres 4, 5, 12 and 16 pixels from the first object: exp(-4 / 12.8) = 0.73, 0.68, 0.39, 0.29."""
    first = torch.tensor([[0.0, 0.0, 6.0, 8.0]])
    candidates = first + torch.tensor([[4.0], [5.0], [12.0], [16.0]]) * torch.tensor([1.0, 0.0, 1.0, 0.0])
    matches = NWDMatcher()(candidates, first, Around())
    assert matches.kind.tolist() == [POSITIVE, IGNORED, IGNORED, NEGATIVE]
    assert matches.iou.tolist() == pytest.approx([0.7316, 0.6766, 0.3916, 0.2865], abs=1e-4)
    # Plain IoU is 2 / 10 for the best one, which the rule of the best candidates saves; the other two overlap nothing.
    assert IoUMatcher(0.7, (0.0, 0.3), True)(candidates, first, Around()).kind.tolist() == [POSITIVE] + [NEGATIVE] * 3
    assert NWDMatcher()(candidates[2:], first, Around()).kind.tolist() == [POSITIVE, NEGATIVE]  # the best, 0.39
    assert NWDMatcher()(candidates[3:], first, Around()).kind.tolist() == [NEGATIVE]  # 0.29 is below 0.3
    assert NWDMatcher(best_per_object=False)(candidates[2:], first, Around()).kind.tolist() == [IGNORED, NEGATIVE]


def test_nwd_against_a_loop(random_boxes: Callable[..., Tensor]) -> None:
    objects, candidates = random_boxes(4, 0), random_boxes(50, 1)
    overlap = NWDMatcher(constant=40.0).overlap(objects, candidates)
    for row, (a, b, c, d) in zip(overlap, objects.tolist(), strict=True):
        for value, (e, f, g, h) in zip(row.tolist(), candidates.tolist(), strict=True):
            squares = ((a + c - e - g) / 2) ** 2 + ((b + d - f - h) / 2) ** 2
            squares += ((c - a - g + e) ** 2 + (d - b - h + f) ** 2) / 4
            assert value == pytest.approx(math.exp(-math.sqrt(squares) / 40), rel=1e-5)


# Matchers of one's own, and all of them on images with difficult objects or without any


class Nearest(Matcher):
    """The candidate whose left side is closest to that of an object is positive."""

    def __call__(self, candidates: Tensor, objects: Tensor, around: Around) -> Matches:
        """Return the matches."""
        kind = torch.full((len(candidates),), NEGATIVE)
        index = torch.zeros_like(kind)
        for number, box in enumerate(objects):
            best = int((candidates[:, 0] - box[0]).abs().argmin())
            kind[best], index[best] = POSITIVE, number
        return Matches(kind, index, torch.zeros(len(candidates)))


def test_a_matcher_of_ones_own_sees_no_difficult_objects() -> None:
    objects = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 0.0, 60.0, 10.0], [90.0, 0.0, 99.0, 10.0]])
    truth = GroundTruth(objects, torch.tensor([1, 1, 1]), torch.tensor([True, False, False]))
    candidates = torch.tensor([[0.0, 0.0, 10.0, 9.0], [48.0, 0.0, 60.0, 10.0], [91.0, 0.0, 99.0, 10.0]])
    expected = {"keep": [POSITIVE] * 3, "drop": [NEGATIVE, POSITIVE, POSITIVE], "ignore": [IGNORED, POSITIVE, POSITIVE]}
    for treatment, kinds in expected.items():
        (found,) = Nearest().of_images([candidates], [truth], treatment, [Around()])
        assert found.kind.tolist() == kinds
        assert found.index.tolist()[1:] == [1, 2]
    (found,) = Nearest().of_images([candidates], [truth._replace(difficult=~truth.difficult)], "drop", [Around()])
    assert (found.kind.tolist(), found.index.tolist()) == ([POSITIVE, NEGATIVE, NEGATIVE], [0, 0, 0])
    none = GroundTruth(objects[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    for treatment in expected:
        (found,) = Nearest().of_images([candidates], [none], treatment, [Around()])
        assert (found.kind.tolist(), found.index.tolist()) == ([NEGATIVE] * 3, [0, 0, 0])
