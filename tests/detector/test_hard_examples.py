"""Online hard example mining: the RoIs with the highest losses are trained on, and finding them leaves no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from detector.roi_heads import RoIConfig, RoIHeads
from detector.sampling import GroundTruth, hardest

Heads = Callable[..., RoIHeads]
Truth = Callable[..., GroundTruth]

FEATURES = [torch.zeros(1, 5, 20, 20)]


@pytest.fixture
def ohem_heads(heads: Heads) -> Heads:
    """`ohem_heads(**options)`: heads whose prediction is the same everywhere: background and class 1 equally likely,
    classes 2 and 3 never."""

    def make(**options: Any) -> RoIHeads:
        roi_heads = heads(ohem=True, append_gt=False, **options)
        for parameter in roi_heads.predictor.parameters():
            torch.nn.init.zeros_(parameter)
        with torch.no_grad():
            roi_heads.predictor.scores.bias[2:] = torch.tensor([-4.0, -9.0])
        return roi_heads

    return make


@pytest.mark.parametrize(
    ("number", "iou", "expected"),
    [
        (2, 0.95, [[60, 0, 70, 10], [60, 0, 70, 10.8]]),  # the two of class 3: a loss of about 9.7
        (2, 0.7, [[60, 0, 70, 10.8], [0, 0, 40, 20]]),  # they overlap by 0.93: the harder one, then that of class 2
        (3, 0.7, [[60, 0, 70, 10.8], [0, 0, 40, 20], [100, 50, 120, 90]]),
        (99, 0.7, [[60, 0, 70, 10.8], [0, 0, 40, 20], [100, 50, 120, 90], [200, 200, 220, 230]]),
        # The other one of class 3 stays away, and so does no background.
    ],
)
def test_the_hardest_rois_are_trained_on(
    number: int, iou: float, expected: list[list[float]], ohem_heads: Heads, truth: Truth
) -> None:
    """Losses: class 3 ln(2 + e^-4 + e^-9) + 9, and a box loss for the second; class 2 that + 4; class 1 and
    background that alone, and class 1 a box loss more."""
    objects = truth([[60, 0, 70, 10], [0, 0, 40, 20], [100, 50, 120, 80]], [3, 2, 1])
    boxes = torch.tensor(
        [[200.0, 200, 220, 230], [60, 0, 70, 10], [60, 0, 70, 10.8], [0, 0, 40, 20], [100, 50, 120, 90]]
    )
    roi_heads = ohem_heads(samples_per_image=number, ohem_nms_iou=iou, positive_fraction=0.25)
    (rois,) = roi_heads.sample_rois([boxes], [objects], "drop", FEATURES)
    assert sorted(rois.boxes.tolist()) == sorted(torch.tensor(expected).tolist())
    labels = {60.0: 3, 0.0: 2, 100.0: 1, 200.0: 0}
    assert rois.labels.tolist() == [labels[x] for x in rois.boxes[:, 0].tolist()]
    assert (rois.labels > 0).tolist() == sorted((rois.labels > 0).tolist(), reverse=True)


def test_losses_make_a_roi_harder_by_their_weights(ohem_heads: Heads, truth: Truth) -> None:
    """Class 1, 10 pixels too high: dh = ln(30 / 40), dy = -1 / 8; background elsewhere costs as much in its class."""
    objects = truth([[100, 50, 120, 80]], [1])
    boxes = torch.tensor([[200.0, 200, 220, 230], [100, 50, 120, 90]])
    for reg_weight, cls_weight, first in ((1.0, 1.0, 100.0), (0.0, 1.0, 200.0), (1.0, 1000.0, 200.0)):
        roi_heads = ohem_heads(samples_per_image=1, reg_weight=reg_weight, cls_weight=cls_weight)
        with torch.no_grad():
            roi_heads.predictor.scores.bias[1] = 0.01  # class 1 a little easier than background
        (rois,) = roi_heads.sample_rois([boxes], [objects], "drop", FEATURES)
        assert rois.boxes[:, 0].tolist() == [first]


@pytest.mark.parametrize(("reg_loss", "first"), [("smooth_l1", 0.0), ("iou", 98.5)])
def test_the_kind_of_box_loss_ranks_rois(reg_loss: Any, first: float, ohem_heads: Heads, truth: Truth) -> None:
    """One RoI is 2.2 of 10 pixels off, the other 1.3 times as large: smooth L1 of 2.2 - 0.5 and 2 (5 ln 1.3 - 0.5)
    = 1.62, IoU of 7.8 / 12.2 = 0.64 and 1 / 1.3^2 = 0.59."""
    objects = truth([[2.2, 0, 12.2, 10], [100, 10, 110, 20]], [1, 1])
    boxes = torch.tensor([[0.0, 0, 10, 10], [98.5, 8.5, 111.5, 21.5]])
    roi_heads = ohem_heads(samples_per_image=1, reg_loss=reg_loss)
    (rois,) = roi_heads.sample_rois([boxes], [objects], "drop", FEATURES)
    assert rois.boxes[:, 0].tolist() == [first]


def test_finding_the_hardest_leaves_no_trace(three_objects: GroundTruth, four_proposals: Tensor) -> None:
    """No dropout, no batch statistics, no gradients, no random numbers; and the mode of each part comes back."""
    head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(20, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout())
    head.pool_size, head.out_channels, head.scales = 2, 8, (1.0,)  # type: ignore[assignment]
    head[1].eval()  # frozen
    roi_heads = RoIHeads(head, (16,), 3, RoIConfig(ohem=True, samples_per_image=2))  # type: ignore[arg-type]
    before = {key: value.clone() for key, value in roi_heads.state_dict().items()}
    state = torch.get_rng_state()
    features = [torch.randn(1, 5, 20, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()]
    picked = [roi_heads.sample_rois([four_proposals], [three_objects], "ignore", features)[0] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(picked[0].boxes, picked[1].boxes)
    assert all(torch.equal(value, before[key]) for key, value in roi_heads.state_dict().items())
    assert [module.training for module in head] == [True, False, True, True]
    assert [60, 0, 70, 10] not in picked[0].boxes.tolist()  # difficult, ignored


def test_hard_examples_learn_under_mixed_precision(
    heads: Heads, three_objects: GroundTruth, four_proposals: Tensor
) -> None:
    """Autocast's copies of the weights, made without gradients for the choice, must not serve the training pass."""
    roi_heads = heads(ohem=True, samples_per_image=3)
    features = [torch.randn(1, 5, 20, 20)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sampled = roi_heads.sample_rois([four_proposals], [three_objects], "drop", features)
        logits, deltas = roi_heads(features, [rois.boxes for rois in sampled])
        sum(roi_heads.losses(logits, deltas, sampled).values()).backward()  # type: ignore[union-attr]
    for name, parameter in roi_heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("proposals", [torch.zeros(0, 4), torch.tensor([[0.0, 0, 30, 20]])])
def test_hard_examples_without_objects(proposals: Tensor, ohem_heads: Heads, truth: Truth) -> None:
    (rois,) = ohem_heads().sample_rois([proposals], [truth([], [])], "drop", FEATURES)
    assert rois.labels.tolist() == [0] * len(proposals)


def test_the_hardest_come_in_the_order_of_the_rois() -> None:
    """Of losses 1, 4, 2 and 3 the three hardest, by index; the one that the hardest covers is left out."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10], [20, 0, 30, 10]])
    losses = torch.tensor([1.0, 4.0, 2.0, 3.0, 3.9])
    assert hardest(boxes, losses, 0.7, 3).tolist() == [1, 2, 3]
    assert hardest(boxes, losses, 0.7, 9).tolist() == [0, 1, 2, 3]
