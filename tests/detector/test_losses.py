"""The losses against sums worked out by hand."""

from math import atan, exp, log, pi

import pytest
import torch

from detector.losses import (
    BinaryCrossEntropy,
    BoxLossName,
    CrossEntropy,
    FocalLoss,
    Normalizer,
    RPNNormalizer,
    SmoothL1,
    balanced_class_weights,
    box_loss,
    normalized,
)


def test_objectness_by_hand() -> None:
    logits, is_object = torch.tensor([0.0, 2.0, -3.0]), torch.tensor([True, False, True])
    expected = (log(2) + log(1 + exp(2)) + log(1 + exp(3))) / 3
    assert float(BinaryCrossEntropy()(logits, is_object)) == pytest.approx(expected)


def test_focal_objectness_by_hand() -> None:
    """Lin 2017, equation 5, over two objects and one of background; where no object is, divided by 1."""
    logits, is_object = torch.tensor([0.0, 2.0, -3.0]), torch.tensor([1.0, 0.0, 1.0])
    p, q = 1 / (1 + exp(-2)), 1 / (1 + exp(3))
    background = 0.7 * p**3 * -log(1 - p)
    expected = (0.3 * 0.5**3 * log(2) + background + 0.3 * (1 - q) ** 3 * -log(q)) / 2
    assert float(FocalLoss(0.3, 3.0)(logits, is_object)) == pytest.approx(expected)
    assert float(FocalLoss(0.3, 3.0)(logits[1:2], is_object[1:2])) == pytest.approx(background)


def test_classes_by_hand() -> None:
    logits, labels = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 4.0]]), torch.tensor([1, 0])
    expected = (log(3) + log(exp(1) + exp(2) + exp(4)) - 1) / 2
    assert float(CrossEntropy()(logits, labels)) == pytest.approx(expected)


def test_classes_with_weights_by_hand() -> None:
    logits, labels = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 4.0]]), torch.tensor([1, 0])
    first, second = log(3), log(exp(1) + exp(2) + exp(4)) - 1
    loss = CrossEntropy()(logits, labels, torch.tensor([0.25, 2.0, 7.0]))
    assert float(loss) == pytest.approx((2 * first + 0.25 * second) / 2.25)
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits, labels, weight=torch.tensor([0.25, 2.0, 7.0]))
    )


@pytest.mark.parametrize(
    ("labels", "background"),
    [
        ([0, 0, 0, 0, 3, 1], 2 / 4),  # two objects weigh as much as four samples of background
        ([2, 2, 1, 0], 3.0),
        ([0, 0], 0.0),  # no objects: background counts nothing
        ([3, 1], 2.0),  # no background: nothing to weigh
    ],
)
def test_balanced_weights(labels: list[int], background: float) -> None:
    weights = balanced_class_weights(torch.tensor(labels), 3)
    assert weights.tolist() == [background, 1, 1, 1]
    total = sum(weights[label] for label in labels if label == 0)
    assert float(total) == (2 if labels == [0, 0, 0, 0, 3, 1] else 3 if labels == [2, 2, 1, 0] else 0)


def test_samples_that_weigh_nothing_give_zero_and_zero_gradients() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    labels = torch.zeros(3, dtype=torch.int64)
    loss = CrossEntropy()(logits, labels, balanced_class_weights(labels, 3))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (1.0, 0.5 * 0.1**2 + 0.5 * 0.5**2 + (2 - 0.5)),
        (1 / 9, 4.5 * 0.1**2 + (0.5 - 1 / 18) + (2 - 1 / 18)),  # turns at 1/9: 0.1 is below, 0.5 above
        (0.0, 0.1 + 0.5 + 2),
    ],
)
@pytest.mark.parametrize(
    ("normalizer", "count"), [("samples", 7), ("positives", 2), ("samples_per_image", 12), ("locations", 35)]
)
def test_box_loss_by_hand(beta: float, expected: float, normalizer: RPNNormalizer, count: int) -> None:
    targets = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    predictions = targets + torch.tensor([[0.1, 0.0, -0.5, 0.0], [0.0, 0.0, 0.0, 2.0]])
    each = SmoothL1(beta)(predictions, targets, torch.as_tensor)
    loss = normalized(each, 7, normalizer, samples_per_batch=12, locations=35)
    assert float(loss) == pytest.approx(expected / count, rel=1e-5)


OVERLAP, DISTANCE = 25 / 275, 125 / 850  # of boxes 10 x 10 and 10 x 20; centres 5 and 10 apart in a hull of 15 x 25
ASPECT = 4 / pi**2 * (atan(1) - atan(0.5)) ** 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("iou", 1 - OVERLAP),
        ("giou", 1 - OVERLAP + 100 / 375),
        ("diou", 1 - OVERLAP + DISTANCE),
        ("ciou", 1 - OVERLAP + DISTANCE + ASPECT**2 / (1 - OVERLAP + ASPECT)),
    ],
)
def test_losses_of_boxes_by_hand(kind: BoxLossName, expected: float) -> None:
    objects = torch.tensor([[0.0, 0.0, 10.0, 10.0], [30.0, 40.0, 50.0, 60.0]])
    boxes = torch.tensor([[5.0, 5.0, 15.0, 25.0], [30.0, 40.0, 50.0, 60.0]], requires_grad=True)

    def decode(halves: torch.Tensor) -> torch.Tensor:
        return halves * 2

    part = box_loss(kind, 1.0)
    loss = normalized(part(boxes / 2, objects / 2, decode), 5, "samples")
    assert float(loss.detach()) == pytest.approx(expected / 5, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, boxes)
    assert gradient.isfinite().all()
    assert (gradient[0, :2] > 0).all()  # the overlap grows where its corner moves to the upper left
    assert part(boxes / 2, objects / 2, decode).tolist() == [[pytest.approx(expected, rel=1e-5)], [0]]
    nothing = normalized(part(boxes[:0], objects[:0], decode), 5, "positives")
    assert nothing.item() == 0
    assert (torch.autograd.grad(nothing, boxes)[0] == 0).all()


@pytest.mark.parametrize("normalizer", ["samples", "positives"])
def test_nothing_sampled_gives_zero_and_zero_gradients(normalizer: Normalizer) -> None:
    scores, deltas = torch.ones(5, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    classes = torch.ones(5, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    total = (
        BinaryCrossEntropy()(scores[none], none.bool())
        + CrossEntropy()(classes[none], none)
        + normalized(SmoothL1(1 / 9)(deltas[none], torch.zeros(0, 4), torch.as_tensor), 0, normalizer)
    )
    total.backward()
    assert float(total.detach()) == 0
    for leaf in (scores, classes, deltas):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


def test_losses_are_float32_under_bfloat16() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.4]], dtype=torch.bfloat16)
    losses = (
        BinaryCrossEntropy()(logits[0], torch.tensor([True, False, True])),
        CrossEntropy()(logits, torch.tensor([2])),
        normalized(SmoothL1(1.0)(logits[:, [0, 1, 2, 2]], torch.zeros(1, 4), torch.as_tensor), 3, "samples"),
    )
    assert {loss.dtype for loss in losses} == {torch.float32}
    expected = sum(float(v) ** 2 for v in logits[0, [0, 1, 2, 2]]) / 2 / 3
    assert float(losses[2]) == pytest.approx(expected, rel=1e-6)
