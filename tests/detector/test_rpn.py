"""The region proposal network: order of outputs and anchors, proposals against a slow recomputation, both losses."""

from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionRPN
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss, nms

from detector.anchors import AnchorConfig
from detector.boxes import decode, is_inside
from detector.image_batch import ImageBatch
from detector.rpn import RegionProposalNetwork, RPNConfig, RPNOutput
from detector.sampling import GroundTruth

LN2 = log(2)


def image_batch(*sizes: tuple[int, int], originals: list[tuple[int, int]] | None = None) -> ImageBatch:
    """A batch of which only the sizes matter."""
    return ImageBatch(torch.zeros(len(sizes), 3, 1, 1), list(sizes), originals or list(sizes))


def truth(*boxes: list[float], difficult: bool = False) -> GroundTruth:
    count = len(boxes)
    return GroundTruth(torch.tensor(boxes).view(-1, 4), torch.ones(count).long(), torch.full((count,), difficult))


def random_output(rpn: RegionProposalNetwork, images: int, *sizes: tuple[int, int], spread: float = 0.3) -> RPNOutput:
    """Random logits and deltas at the anchors of feature maps of those sizes."""
    generator = torch.Generator().manual_seed(7)
    anchors = rpn.anchor_generator(sizes, torch.device("cpu"))
    logits = [torch.randn(images, len(level), generator=generator) for level in anchors]
    deltas = [torch.randn(images, len(level), 4, generator=generator) * spread for level in anchors]
    return RPNOutput(logits, deltas, anchors)


def network(
    anchors: AnchorConfig | None = None, strides: tuple[int, ...] = (16,), **options: Any
) -> RegionProposalNetwork:
    return RegionProposalNetwork(6, strides, anchors or AnchorConfig([1], [1]), RPNConfig(**options))


# The head


def slow_proposals(
    output: RPNOutput, image: int, size: tuple[int, int], before: int, after: int, config: RPNConfig
) -> Tensor:
    """Proposals of one image, level by level, with torchvision's parts."""
    boxes, scores = [], []
    for logits, deltas, anchors in zip(*output, strict=True):
        order = logits[image].sort(descending=True).indices[:before]
        moved = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas[image][order], anchors[order])
        moved = clip_boxes_to_image(moved, size)
        wide = (moved[:, 2] - moved[:, 0] >= config.min_side) & (moved[:, 3] - moved[:, 1] >= config.min_side)
        moved, level_scores = moved[wide], logits[image][order][wide]
        keep = nms(moved, level_scores, config.nms_iou)
        boxes.append(moved[keep])
        scores.append(level_scores[keep])
    return torch.cat(boxes)[torch.cat(scores).sort(descending=True).indices[:after]]


@pytest.mark.parametrize("training", [True, False])
def test_proposals_equal_a_slow_recomputation(training: bool) -> None:
    rpn = network(
        AnchorConfig([[1, 2], [4, 6]], [0.5, 2], base_size=8),
        strides=(8, 16),
        **{"pre_nms_train": 150, "post_nms_train": 40, "pre_nms_test": 60, "post_nms_test": 25},
        nms_iou=0.6,
        min_side=9,
    ).train(training)
    output = random_output(rpn, 2, (8, 12), (4, 6))
    sizes = [(64, 96), (50, 90)]
    proposals = rpn.proposals(output, image_batch(*sizes))
    before, after = (150, 40) if training else (60, 25)
    for image, size in enumerate(sizes):
        expected = slow_proposals(output, image, size, before, after, rpn.config)
        assert len(expected) == after
        torch.testing.assert_close(proposals[image], expected, atol=1e-4, rtol=1e-5)


def test_counts_before_and_after_nms() -> None:
    """Four anchors that do not overlap on each of two levels: the counts alone decide."""
    counts = {"pre_nms_train": 3, "post_nms_train": 5, "pre_nms_test": 2, "post_nms_test": 10}
    rpn = network(AnchorConfig([[1], [2]], [1]), strides=(16, 32), **counts)
    output = random_output(rpn, 1, (2, 2), (2, 2), spread=0)
    assert len(rpn.train().proposals(output, image_batch((64, 64)))[0]) == 5
    (two_each,) = rpn.eval().proposals(output, image_batch((64, 64)))
    assert sorted((two_each[:, 2] - two_each[:, 0]).tolist()) == [16, 16, 32, 32]


def test_overlapping_proposals_survive_on_different_levels_only() -> None:
    rpn = network(AnchorConfig([[1], [1]], [1], center_offset="zero"), strides=(16, 16)).eval()
    output = random_output(rpn, 1, (1, 1), (1, 1), spread=0)
    assert len(rpn.proposals(output, image_batch((64, 64)))[0]) == 2
    single = network(AnchorConfig([1, 1.01], [1])).eval()
    output = random_output(single, 1, (1, 1), spread=0)
    assert len(single.proposals(output, image_batch((64, 64)))[0]) == 1


def test_small_proposals_are_dropped_after_clipping() -> None:
    # Anchors of 16 pixels around x = 8, 24, 40 at y = 8, in an image 45 wide: the last one is clipped to 13 pixels.
    for min_side, kept in ((0.0, 3), (13.0, 3), (13.5, 2), (17.0, 0)):
        rpn = network(min_side=min_side).eval()
        output = random_output(rpn, 1, (1, 3), spread=0)
        assert len(rpn.proposals(output, image_batch((60, 45)))[0]) == kept
    # Anchors in the padding collapse to nothing and are never proposed.
    rpn = network().eval()
    output = random_output(rpn, 1, (1, 3), spread=0)
    assert len(rpn.proposals(output, image_batch((16, 20)))[0]) == 2


@pytest.mark.parametrize(("scales", "kept"), [(False, [3, 3]), (True, [2, 3])])
def test_minimum_side_follows_the_factor_of_its_image(scales: bool, kept: list[int]) -> None:
    """Boxes of 16, 16 and 13 pixels; the first image was enlarged by 1.5, the second shrunk by half."""
    rpn = network(min_side=10.0, min_side_scales=scales).eval()  # 15 pixels of the first, 5 of the second
    output = random_output(rpn, 2, (1, 3), spread=0)
    batch = image_batch((60, 45), (60, 45), originals=[(40, 30), (120, 90)])
    assert [len(boxes) for boxes in rpn.proposals(output, batch)] == kept


def test_proposals_below_the_score_threshold_are_dropped() -> None:
    """Probabilities 0.5 and 0.047 (logits 0 and -3) of anchors that do not overlap."""
    rpn = network(AnchorConfig([1], [1]), score_threshold=0.05).eval()
    anchors = rpn.anchor_generator([(1, 2)], torch.device("cpu"))
    output = RPNOutput([torch.tensor([[-3.0, 0.0]])], [torch.zeros(1, 2, 4)], anchors)
    assert rpn.proposals(output, image_batch((16, 32)))[0].tolist() == [[16, 0, 32, 16]]
    rpn.config.score_threshold = 0.047
    assert rpn.proposals(output, image_batch((16, 32)))[0].tolist() == [[16, 0, 32, 16], [0, 0, 16, 16]]


def test_proposals_are_detached() -> None:
    rpn = network(AnchorConfig([1, 2], [0.5, 2]))
    output = rpn([torch.randn(1, 6, 3, 4)])
    assert output.deltas[0].requires_grad
    assert not rpn.proposals(output, image_batch((48, 64)))[0].requires_grad


# Losses

CELL_0, CELL_5 = [0.0, 0.0, 16.0, 16.0], [16.0, 16.0, 32.0, 32.0]


def tiled(**options: Any) -> tuple[RegionProposalNetwork, RPNOutput]:
    """16 anchors that tile an image of 64 x 64 row by row, with a logit of 3 at the sixth and no deltas."""
    rpn = network(**options)
    output = random_output(rpn, 1, (4, 4), spread=0)
    output.logits[0].zero_()
    output.logits[0][0, 5] = 3
    return rpn, output


@pytest.mark.parametrize(
    ("difficult", "expected"),
    [
        ("drop", (15 * LN2 + log(1 + exp(3))) / 16),  # the sixth anchor is background
        ("keep", (15 * LN2 + log(1 + exp(-3))) / 16),  # it is an object
        ("ignore", LN2),  # it takes no part
    ],
)
def test_difficult_objects_in_the_loss(difficult: str, expected: float) -> None:
    rpn, output = tiled()
    objects = GroundTruth(torch.tensor([CELL_5, CELL_0]), torch.tensor([1, 1]), torch.tensor([True, False]))
    losses = rpn.losses(output, image_batch((64, 64)), [objects], difficult)
    assert float(losses["loss_rpn_cls"]) == pytest.approx(expected)
    assert float(losses["loss_rpn_reg"]) == 0


@pytest.mark.parametrize(
    ("normalizer", "count"),
    [("samples", 16 + 2), ("positives", 3), ("samples_per_image", 2 * 256), ("locations", 4 * 4 + 1 * 2)],
)
def test_box_loss_by_hand_over_two_images(normalizer: str, count: int) -> None:
    """Each image has its own objects: targets and normalisers are not mixed up."""
    rpn = network(reg_beta=1.0, reg_normalizer=normalizer, positive_iou=0.5, negative_iou=0.3)
    output = random_output(rpn, 2, (4, 4), spread=0)
    output.deltas[0][0, 5] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    output.deltas[0][1, 1] = torch.tensor([0.0, 0.0, 0.0, 0.5])
    # The second image is only 16 high and 32 wide: of its anchors two lie inside.
    moved = [18.0, 16.0, 34.0, 32.0]  # the sixth anchor (IoU 7 / 9), moved by an eighth of its width
    other = [[0.0, 0.0, 16.0, 10.0], [16.0, 0.0, 32.0, 16.0]]  # IoU 0.625 with the first anchor, 1 with the second
    losses = rpn.losses(output, image_batch((64, 64), (16, 32)), [truth(moved), truth(*other)], "drop")
    first = 0.5 * ((0.1 - 0.125) ** 2 + 0.2**2 + 0.3**2 + 0.4**2)
    dy, dh = -3 / 16, log(10 / 16)
    second = 0.5 * (dy**2 + dh**2) + 0.5 * 0.5**2
    assert float(losses["loss_rpn_reg"]) == pytest.approx((first + second) / count, rel=1e-5)


def test_box_loss_of_decoded_boxes_over_two_images() -> None:
    """The anchors are those of each image's positives, at both levels."""
    rpn = network(strides=(16, 32), reg_loss="giou", reg_normalizer="positives", best_per_object="one")
    output = random_output(rpn, 2, (4, 4), (2, 2))
    boxes = [[18.0, 16.0, 34.0, 32.0], [0.0, 0.0, 16.0, 13.0], [40.0, 9.0, 56.0, 24.0]]
    own = [truth(boxes[0]), truth(*boxes[1:])]
    loss = rpn.losses(output, image_batch((64, 64), (64, 64)), own, "drop")["loss_rpn_reg"]
    anchors, deltas = torch.cat(output.anchors), torch.cat(output.deltas, dim=1)
    places = [(0, 5), (1, 0), (1, 17)]
    predicted = [
        BoxCoder((1.0,) * 4).decode_single(deltas[place][None], anchors[place[1]][None])[0] for place in places
    ]
    expected = generalized_box_iou_loss(torch.stack(predicted), torch.tensor(boxes), reduction="mean")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_focal_objectness_of_all_anchors() -> None:
    """RetinaNet's: all 16 anchors, one of them an object, over the one; an untrained network finds objects rare."""
    everything = {"samples_per_image": 10**6, "positive_fraction": 1.0}
    rpn, output = tiled(cls_loss="focal", focal_alpha=0.2, focal_gamma=1.0, **everything)
    torch.testing.assert_close(rpn.head.objectness.bias.sigmoid(), torch.tensor([0.01]))
    loss = rpn.losses(output, image_batch((64, 64)), [truth(CELL_5)], "drop")["loss_rpn_cls"]
    missed = 1 / (1 + exp(3))
    assert float(loss) == pytest.approx(0.2 * missed * -log(1 - missed) + 15 * 0.8 * 0.5 * LN2, rel=1e-5)


def test_locations_of_all_levels_and_images_without_padding() -> None:
    rpn = network(AnchorConfig([1], [0.5, 2]), strides=(16, 32))
    # The paper's images: 600 x 1000 on stride 16 has about 2400. Anchors at a location do not count.
    assert network()._locations((600, 1000)) == 38 * 63
    assert rpn._locations((33, 64)) == 3 * 4 + 2 * 2


def test_best_anchors_of_an_object() -> None:
    """An object between two anchors, at IoU 1/3 with both: both are positive, one of them, or none."""
    between = [8.0, 0.0, 24.0, 16.0]
    for best, expected in ((True, [0, 1]), ("one", [0]), (False, [])):
        rpn, output = tiled(best_per_object=best)
        positives, negatives, *_ = rpn.sample_anchors(output, image_batch((64, 64)), [truth(between)], "drop")[0]
        assert positives.tolist() == expected
        assert len(negatives) == 14


def test_sampling_limits_each_image() -> None:
    rpn, output = tiled(samples_per_image=4)
    picked = [rpn.sample_anchors(output, image_batch((64, 64)), [truth(*boxes)], "drop")[0] for boxes in ([CELL_0], [])]
    assert [(len(positives), len(negatives)) for positives, negatives, *_ in picked] == [(1, 3), (0, 4)]


def test_straddling_anchors_are_dropped_or_kept() -> None:
    for straddling, sampled in (("drop", 12), ("keep", 16)):
        config = AnchorConfig([1], [1], straddling=straddling)  # type: ignore[arg-type]
        rpn = network(config)
        output = random_output(rpn, 1, (4, 4))
        # An image of 60 x 64 within its padding: the last row of anchors crosses its border.
        positives, negatives, *_ = rpn.sample_anchors(output, image_batch((60, 64)), [truth(CELL_5)], "drop")[0]
        assert positives.tolist() == [5]
        assert len(negatives) == sampled - 1


@pytest.mark.parametrize(("straddling", "best"), [("drop", 8), ("keep", 12)])
def test_an_objects_best_anchor_is_the_best_of_those_that_are_used(straddling: Any, best: int) -> None:
    """Its IoU is 6/26 with an anchor within the image, and 10/22 with the one below, which straddles the border."""
    rpn = network(AnchorConfig([1], [1], straddling=straddling))
    output = random_output(rpn, 1, (4, 4))
    objects = [truth([0.0, 42.0, 16.0, 58.0])]
    assert rpn.sample_anchors(output, image_batch((60, 64)), objects, "drop")[0].positives.tolist() == [best]


@pytest.mark.parametrize("boxes", [[], [[3.0, 4.0, 40.0, 30.0]]])
@pytest.mark.parametrize("straddling", ["drop", "keep"])
@pytest.mark.parametrize("objectness", ["sigmoid", "softmax"])
def test_anchors_larger_than_the_image(boxes: list[list[float]], straddling: Any, objectness: str) -> None:
    """512-pixel anchors on 64 pixels: where those that straddle the border are dropped, nothing is left to train on."""
    rpn = network(AnchorConfig([32], [1], straddling=straddling), objectness=objectness, best_per_object=True)
    output = rpn([torch.randn(1, 6, 4, 4)])
    losses = rpn.losses(output, image_batch((64, 64)), [truth(*boxes)], "drop")
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert (float(losses["loss_rpn_cls"].detach()) == 0) == (straddling == "drop")
    for name, parameter in rpn.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert not is_inside(output.anchors[0], (64, 64)).any()
    (proposals,) = rpn.proposals(output, image_batch((64, 64)))
    assert len(proposals) >= 1
    assert is_inside(proposals, (64, 64)).all()


def test_anchors_that_were_cached_in_inference_mode_can_be_trained_on() -> None:
    rpn = network(AnchorConfig([1, 2], [0.5, 2], straddling="keep"))
    features = torch.randn(1, 6, 4, 4)
    with torch.inference_mode():
        rpn([features])
    losses = rpn.losses(rpn([features]), image_batch((64, 64)), [truth(CELL_5)], "drop")
    (losses["loss_rpn_cls"] + losses["loss_rpn_reg"]).backward()
    assert rpn.head.deltas.weight.grad is not None
    assert rpn.head.deltas.weight.grad.abs().sum() > 0


def test_losses_equal_torchvisions_on_the_same_anchors() -> None:
    rpn = network(AnchorConfig([2, 4], [0.5, 1, 2], straddling="keep"), strides=(16,), samples_per_image=10**6)
    output = random_output(rpn, 2, (8, 11))
    boxes = [
        torch.tensor([[10.0, 12.0, 71.0, 50.0], [60.0, 30.0, 95.0, 110.0]]),
        torch.tensor([[100.0, 5.0, 170.0, 60.0]]),
    ]
    ours = rpn.losses(output, image_batch((128, 176), (128, 176)), [truth(*b.tolist()) for b in boxes], "drop")
    counts = {"training": 1, "testing": 1}
    peer = TorchvisionRPN(None, None, 0.7, 0.3, 10**6, 0.5, counts, counts, 0.7)
    anchors = [output.anchors[0]] * 2
    labels, matched = peer.assign_targets_to_anchors(anchors, [{"boxes": b} for b in boxes])
    targets = list(peer.box_coder.encode(matched, anchors))
    assert int(sum((label == 1).sum() for label in labels)) >= 3
    cls, reg = peer.compute_loss(output.logits[0], output.deltas[0].view(-1, 4), labels, targets)
    torch.testing.assert_close(ours["loss_rpn_cls"], cls, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours["loss_rpn_reg"], reg, rtol=1e-5, atol=0)


def test_worked_example() -> None:
    """800 x 800 with two objects (see test_sampling.py): an untrained objectness of 0 costs ln 2."""
    rpn = network(AnchorConfig([8, 16, 32], [0.5, 1, 2], order="scale_major"))
    torch.nn.init.zeros_(rpn.head.objectness.weight)
    objects = truth([30.0, 20.0, 500.0, 400.0], [400.0, 300.0, 600.0, 500.0])
    output = rpn([torch.randn(1, 6, 50, 50)])
    positives, negatives, deltas = rpn.sample_anchors(output, image_batch((800, 800)), [objects], "drop")[0]
    assert (len(positives), len(negatives)) == (18, 238)
    learnt = decode(deltas, output.anchors[0][positives])
    torch.testing.assert_close(learnt, objects.boxes[[0, 0] + [1] * 16], rtol=0, atol=1e-3)
    losses = rpn.losses(output, image_batch((800, 800)), [objects], "drop")
    assert float(losses["loss_rpn_cls"].detach()) == pytest.approx(LN2)
    assert is_inside(output.anchors[0][torch.cat((positives, negatives))], (800, 800)).all()
