"""Sampling, at exact numbers, and an example whose every intermediate number is known."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detector.anchors import AnchorConfig, AnchorGenerator
from detector.assignment import match
from detector.boxes import encode, is_inside
from detector.sampling import IGNORED, NEGATIVE, POSITIVE, IoUBalancedSampler, Matches, jittered, sample


def tiles(rows: int, columns: int, side: float) -> Tensor:
    """Boxes that tile the plane row by row."""
    return torch.tensor([[x, y, x + 1, y + 1] for y in range(rows) for x in range(columns)]) * side


# Sampling


def kinds(positives: int, negatives: int, ignored: int = 0) -> Tensor:
    """Shuffled kinds of that many candidates."""
    values = torch.tensor([POSITIVE] * positives + [NEGATIVE] * negatives + [IGNORED] * ignored)
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("available", "number", "fraction", "expected"),
    [
        ((500, 5000), 256, 0.5, (128, 128)),
        ((18, 5000), 256, 0.5, (18, 238)),  # negatives fill up
        ((500, 20), 256, 0.5, (128, 20)),  # positives do not
        ((3, 4), 256, 0.5, (3, 4)),  # nothing is padded
        ((0, 4), 256, 0.5, (0, 4)),
        ((5, 0), 256, 0.5, (5, 0)),
        ((0, 0), 256, 0.5, (0, 0)),
        ((500, 5000), 128, 0.25, (32, 96)),
        ((500, 5000), 10, 1.0, (10, 0)),
        ((500, 5000), 10, 0.25, (2, 8)),  # of 2.5 positives two: `at most`
        ((500, 5000), 7, 0.5, (3, 4)),
    ],
)
def test_sample_counts(available: tuple[int, int], number: int, fraction: float, expected: tuple[int, int]) -> None:
    kind = kinds(*available, ignored=50)
    ((positives, negatives),) = sample([kind], number, fraction)
    assert (len(positives), len(negatives)) == expected
    assert (kind[positives] == POSITIVE).all()
    assert (kind[negatives] == NEGATIVE).all()
    assert len({*positives.tolist(), *negatives.tolist()}) == sum(expected)  # without replacement


def test_every_candidate_has_its_chance() -> None:
    kind, seen_positives, seen_negatives = kinds(12, 30), set(), set()
    torch.manual_seed(0)
    for _ in range(60):
        ((positives, negatives),) = sample([kind], 8, 0.5)
        seen_positives |= set(positives.tolist())
        seen_negatives |= set(negatives.tolist())
    assert (len(seen_positives), len(seen_negatives)) == (12, 30)


def test_negatives_balanced_over_their_iou() -> None:
    """Twelve of 22 negatives: four from each third of 0 to 0.5, of which the last has one: three more from the others.

    All of the second third (four) and of the last (one) are drawn; of 17 in the first seven, each equally often.
    """
    iou = torch.tensor([0.9, 0.6, *[0.1] * 16, 0.0, *[0.2, 0.25, 0.3, 0.33], 0.49, 0.4])
    kind = torch.tensor([POSITIVE, POSITIVE, *[NEGATIVE] * 22, IGNORED])
    matches = Matches(kind, torch.zeros(25, dtype=torch.int64), iou)
    torch.manual_seed(0)
    counts = torch.zeros(25)
    for _ in range(400):
        positives, negatives = IoUBalancedSampler()(matches, 14, 0.25)
        assert sorted(positives.tolist()) == [0, 1]
        assert len(set(negatives.tolist())) == 12
        counts[negatives] += 1
    assert counts[19:24].tolist() == [400] * 5 and counts[24] == 0
    assert (counts[2:19] / 400 - 7 / 17).abs().max() < 0.1  # four standard deviations
    positives, negatives = IoUBalancedSampler()(matches, 100, 0.25)  # fewer than are wanted: all
    assert sorted([*positives.tolist(), *negatives.tolist()]) == list(range(24))
    positives, negatives = IoUBalancedSampler()(matches, 4, 0.25)
    assert (len(positives), len(negatives)) == (1, 3)
    assert sorted((iou[negatives] * 6).long().tolist()) == [0, 1, 2]  # one of each third


def test_jittered_boxes_keep_their_shape_within_half_the_share() -> None:
    boxes = torch.tensor([[10.0, 20.0, 110.0, 40.0]]).repeat(400, 1)
    torch.manual_seed(0)
    moved = jittered(boxes, 0.1) - boxes
    torch.testing.assert_close(moved[:, :2], moved[:, 2:])
    x, y = moved[:, 0], moved[:, 1]
    # Up to 5 pixels along x, where the side is 100, and up to 1 along y, where it is 20; both ways, not together.
    assert 4.8 < float(x.max()) <= 5 + 1e-4
    assert -5 - 1e-4 <= float(x.min()) < -4.8
    assert 0.96 < float(y.max()) <= 1 + 1e-4
    assert -1 - 1e-4 <= float(y.min()) < -0.96
    assert abs(float(torch.corrcoef(torch.stack((x, y)))[0, 1])) < 0.2
    assert torch.equal(jittered(boxes, 0.0), boxes)
    assert jittered(boxes[:0], 0.1).shape == (0, 4)


def test_thirty_objects_in_an_image() -> None:
    candidates = tiles(20, 20, 10)
    objects = candidates[::13][:30]
    matches = match(candidates, objects, 0.5, (0.0, 0.5))
    ((positives, negatives),) = sample([matches.kind], 128, 0.25)
    assert sorted(matches.index[positives].tolist()) == list(range(30))
    assert torch.equal(candidates[positives], objects[matches.index[positives]])
    assert len(negatives) == 98


# A worked example: an image of 800 x 800 with two objects (y1, x1, y2, x2): (20, 30, 400, 500) and (300, 400, 500, 600)

EXAMPLE_OBJECTS = torch.tensor([[30.0, 20.0, 500.0, 400.0], [400.0, 300.0, 600.0, 500.0]])
POSITIVES = {
    "scale_major": [
        *(2264, 2271, 4097, 4105, 4113, 4121, 4371, 4379, 4387),
        *(4395, 4645, 4653, 4661, 4669, 4919, 4927, 4935, 4943),
    ],
    "ratio_major": [
        *(2262, 2269, 4096, 4104, 4112, 4120, 4370, 4378, 4386),
        *(4394, 4644, 4652, 4660, 4668, 4918, 4926, 4934, 4942),
    ],
}


@pytest.mark.parametrize("order", ["scale_major", "ratio_major"])
def test_worked_example(order: str) -> None:
    config = AnchorConfig([8, 16, 32], [0.5, 1, 2], center_offset="half_stride", order=order)  # type: ignore[arg-type]
    (anchors,) = AnchorGenerator(config, (16,))([(50, 50)], torch.device("cpu"))
    assert len(anchors) == 22500
    inside = anchors[is_inside(anchors, (800, 800))]
    assert len(inside) == 8940
    iou = box_iou(EXAMPLE_OBJECTS, inside)
    assert iou.max(dim=1).values.tolist() == pytest.approx([0.68130493, 0.61035156], abs=5e-9)
    assert int((iou.max(dim=0).values >= 0.7).sum()) == 0
    matches = match(inside, EXAMPLE_OBJECTS, 0.7, (0.0, 0.3), best_per_object=True)
    assert torch.where(matches.kind == POSITIVE)[0].tolist() == POSITIVES[order]
    assert matches.index[POSITIVES[order]].tolist() == [0, 0] + [1] * 16
    assert int((matches.kind == NEGATIVE).sum()) == 7690
    assert [len(indices) for indices in sample([matches.kind], 256, 0.5)[0]] == [18, 238]
    # dx, dy, dw, dh; float32 corners leave about 6 digits
    deltas = encode(EXAMPLE_OBJECTS[iou.argmax(dim=0)], inside)
    assert deltas[0].tolist() == pytest.approx([0.88940775, 1.70147569, 0.95412884, 1.43471458], rel=1e-6)
    assert deltas[-1].tolist() == pytest.approx([-2.38096111, -5.89992221, 0.95412884, 1.43471458], rel=1e-6)
