"""What a record shows of a pass, against the pass itself and against other code; and that looking changes nothing."""

from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detector import boxes as box_ops
from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig
from detector.faster_rcnn import FasterRCNN
from detector.image_batch import ImageConfig, to_original
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.sampling import IGNORED, NEGATIVE, POSITIVE
from detector.step_record import StepRecord, ask, asking, unrecorded
from detector.training.alternating import AlternatingConfig, AlternatingTraining
from tests.detector.training.small_detector import BATCH, OPTIONS, SMALL

FPN = BackboneConfig("resnet18_fpn", weights=None, frozen_stages=0, norm="batch", fpn_channels=16, box_head_channels=32)
SHAPES = 5 * 4


def detector(roi: dict[str, Any] | None = None, image: dict[str, Any] | None = None) -> FasterRCNN:
    """Five levels with two scales and two ratios each; random heads so strong that scores and boxes differ."""
    torch.manual_seed(0)
    model = FasterRCNN(
        2,
        FPN,
        AnchorConfig([[1, 2], [2, 3], [4, 5], [6, 7], [8, 9]], [0.5, 3], straddling="drop"),
        RPNConfig(pre_nms_train=300, post_nms_train=40, pre_nms_test=200, post_nms_test=25, min_side=4),
        RoIConfig(**{"samples_per_image": 16, "score_threshold": 0.2, "nms_iou": 0.5} | (roi or {})),
        ImageConfig([64], 96, **(image or {})),
    )
    with torch.no_grad():
        for layer in (model.rpn.head.objectness, model.rpn.head.deltas, model.roi_heads.predictor.scores):
            layer.weight.mul_(30)
    return model


def losses(model: FasterRCNN, seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """The losses of a step, and the random numbers' state after it."""
    torch.manual_seed(seed)
    return model.losses(*BATCH), torch.get_rng_state()


@pytest.fixture(scope="module")
def trained() -> tuple[FasterRCNN, StepRecord]:
    model = detector()
    with closing(ask()) as record:
        losses(model)
    return model, record


def test_a_step_is_the_same_to_the_bit_whether_recorded_or_not() -> None:
    found = []
    for recorded in (False, True):
        model = detector()
        record = ask()
        if not recorded:
            record.close()
        values, state = losses(model)
        values["loss"].backward()
        record.close()
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append((values, state, gradients))
    (plain, plain_state, plain_gradients), (seen, seen_state, seen_gradients) = found
    assert all(torch.equal(plain[name], seen[name]) for name in plain)
    assert torch.equal(plain_state, seen_state)
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain_gradients, seen_gradients, strict=True)
        if a is not None and b is not None
    )
    assert sum(gradient is not None for gradient in seen_gradients) > 50


def test_evaluation_is_the_same_to_the_bit_whether_recorded_or_not() -> None:
    model = detector().eval()
    plain, plain_proposals = model(BATCH[0])
    with closing(ask()) as record:
        seen, seen_proposals = model(BATCH[0])
    assert all(torch.equal(a[key], b[key]) for a, b in zip(plain, seen, strict=True) for key in a)
    assert all(map(torch.equal, plain_proposals, seen_proposals))
    assert len(seen[0]["boxes"]) > 2 and record.anchor_matches == () and record.sampled_rois == ()


def test_anchors_and_their_shapes(trained: tuple[FasterRCNN, StepRecord]) -> None:
    _, record = trained
    sides = (record.anchors[:, 2:] - record.anchors[:, :2]).double()
    scale, ratio = sides.prod(1).sqrt() / 16, sides[:, 1] / sides[:, 0]
    level, place = record.shape_of_anchor // 4, record.shape_of_anchor % 4  # ratio-major: ratio, then scale
    torch.testing.assert_close(ratio, torch.tensor([0.5, 3.0]).double()[place // 2], rtol=1e-4, atol=0)
    scales = torch.tensor([[1.0, 2], [2, 3], [4, 5], [6, 7], [8, 9]]).double()
    torch.testing.assert_close(scale, scales[level, place % 2], rtol=1e-4, atol=0)
    assert torch.bincount(record.shape_of_anchor, minlength=SHAPES).reshape(5, 4)[:, 0].tolist() == [
        *(16 * 24, 8 * 12, 4 * 6, 2 * 3, 1 * 2)
    ]
    assert record.logits.shape == (2, len(record.anchors)) and record.deltas.shape == (2, len(record.anchors), 4)
    assert not record.logits.requires_grad and not record.deltas.requires_grad and not record.roi_logits.requires_grad


def test_shapes_where_levels_differ_in_their_number() -> None:
    """Levels of 2, 1 and 3 anchors per location and 2, 2 and 1 locations."""
    record = StepRecord(level_anchors=[torch.zeros(n, 4) for n in (4, 2, 3)], anchors_per_location=(2, 1, 3))
    assert record.shape_of_anchor.tolist() == [0, 1, 0, 1, 2, 2, 3, 4, 5]


def test_matches_by_plain_iou(trained: tuple[FasterRCNN, StepRecord]) -> None:
    """Positive from IoU 0.7 on, or as an object's best; straddling anchors are ignored."""
    _, record = trained
    assert record.batch is not None
    rescued = 0
    for truth, found, size in zip(record.truths, record.anchor_matches, record.batch.sizes, strict=True):
        inside = box_ops.is_inside(record.anchors, size)
        iou = box_iou(truth.boxes, record.anchors) * inside
        torch.testing.assert_close(found.iou, iou.max(dim=0).values)
        best = (iou >= iou.max(dim=1, keepdim=True).values * (1 - 1e-5)).any(dim=0)
        high = found.iou >= 0.7
        assert torch.equal(found.kind == POSITIVE, (high | best) & inside)
        assert torch.equal(found.kind == NEGATIVE, (found.iou < 0.3) & ~best & inside)
        assert bool((found.kind[~inside] == IGNORED).all())
        assert torch.equal(found.rescued(0.7), best & ~high)
        rescued += int(found.rescued(0.7).sum())
    assert rescued >= 1


def test_sampled_anchors_have_their_kind_and_targets(trained: tuple[FasterRCNN, StepRecord]) -> None:
    _, record = trained
    for truth, found, drawn in zip(record.truths, record.anchor_matches, record.sampled_anchors, strict=True):
        assert len(drawn.positives) >= 1 and len(drawn.positives) + len(drawn.negatives) <= 256
        assert set(found.kind[drawn.positives].tolist()) == {POSITIVE}
        assert set(found.kind[drawn.negatives].tolist()) == {NEGATIVE}
        boxes = box_ops.decode(drawn.deltas, record.anchors[drawn.positives])
        torch.testing.assert_close(boxes, truth.boxes[found.index[drawn.positives]], rtol=1e-4, atol=1e-3)


def check_proposals(record: StepRecord) -> list[Tensor]:
    """Each proposal is decoded from the anchor that it names. Returns those after NMS."""
    assert record.batch is not None
    after = []
    for image, (found, size) in enumerate(zip(record.proposals, record.batch.sizes, strict=True)):
        decoded = box_ops.decode(record.deltas[image, found.anchors], record.anchors[found.anchors])
        assert torch.equal(box_ops.clip(decoded, size), found.boxes)
        assert torch.equal(record.logits[image, found.anchors], found.scores)
        assert len(found.kept) < len(found.boxes) and len(found.anchors.unique()) == len(found.anchors)
        scores = found.scores[found.kept]
        assert bool((scores[:-1] >= scores[1:]).all())
        after.append(found.boxes[found.kept])
    return after


def test_proposals_name_their_anchors(trained: tuple[FasterRCNN, StepRecord]) -> None:
    _, record = trained
    after = check_proposals(record)
    assert all(len(record.shape_of_anchor[found.anchors].unique()) > 15 for found in record.proposals)
    for boxes, candidates, truth in zip(after, record.roi_candidates, record.truths, strict=True):
        assert torch.equal(candidates, torch.cat((boxes, truth.boxes)))


@pytest.mark.parametrize("options", [{}, {"ohem": True, "ohem_nms_iou": 0.99, "samples_per_image": 41}])
def test_sampled_rois_point_at_their_candidates(options: dict[str, Any]) -> None:
    with closing(ask()) as record:
        losses(detector(roi=options | {"background_iou": [0.0, 0.5]}))
    for rois, boxes, found, truth in zip(
        record.sampled_rois, record.roi_candidates, record.roi_matches, record.truths, strict=True
    ):
        assert torch.equal(rois.boxes, boxes[rois.candidates])
        positive = found.kind[rois.candidates] == POSITIVE
        assert torch.equal(positive, rois.labels > 0) and positive.any() and not positive.all()
        assert torch.equal(rois.labels[positive], truth.labels[found.index[rois.candidates[positive]]])
        assert bool((found.iou[rois.candidates[positive]] >= 0.5).all())
    assert [len(boxes) for boxes in record.rois] == [len(rois.labels) for rois in record.sampled_rois]
    assert record.roi_logits.shape == (sum(map(len, record.rois)), 3)
    assert record.roi_deltas.shape == (sum(map(len, record.rois)), 2, 4)


@pytest.mark.parametrize("nms", ["hard", "soft_linear"])
def test_detections_lead_back_to_rois_and_anchors(nms: str) -> None:
    model = detector(roi={"nms": nms}).eval()
    with closing(ask()) as record:
        detections, proposals = model(BATCH[0])
    assert record.batch is not None
    after = check_proposals(record)
    deltas = record.roi_deltas.split([len(boxes) for boxes in record.rois])
    for image, (found, result) in enumerate(zip(record.detections, detections, strict=True)):
        assert torch.equal(after[image], record.rois[image])
        assert torch.equal(to_original(after[image], record.batch, image), proposals[image])
        assert torch.equal(to_original(found.boxes, record.batch, image), result["boxes"])
        own = deltas[image][found.rois, found.labels - 1]
        decoded = box_ops.decode(own, record.rois[image][found.rois], model.roi_heads.config.delta_std)
        assert torch.equal(box_ops.clip(decoded, record.batch.sizes[image]), found.boxes)
        assert len(found.rois.unique()) > 1


def test_of_several_views_the_first_is_recorded() -> None:
    views = {"test_flip": True, "test_shortest_sides": [80, 64]}
    model = detector(image=views).eval()
    with closing(ask()) as record:
        _, proposals = model(BATCH[0])
    assert record.batch is not None and record.batch.sizes == [(80, 120), (80, 120)] and record.detections == ()
    for image, boxes in enumerate(check_proposals(record)):
        assert torch.equal(to_original(boxes, record.batch, image), proposals[image])


def test_askers_have_records_of_their_own_until_they_close() -> None:
    model = detector().eval()
    first, second = ask(), ask()
    model(BATCH[0][:1])
    first.close()
    with unrecorded():
        model(BATCH[0])
    assert [len(record.proposals) for record in (first, second)] == [1, 1]
    model(BATCH[0])
    assert [len(record.proposals) for record in (first, second)] == [1, 2]
    second.close()
    second.close()
    assert asking() == ()


PARTS = ("level_logits", "anchor_matches", "sampled_anchors", "proposals", "sampled_rois", "rois")


@pytest.mark.parametrize(
    ("step", "seen"),
    [
        (1, ("level_logits", "anchor_matches", "sampled_anchors")),
        (2, ("level_logits", "proposals", "sampled_rois", "rois")),
        (3, ("level_logits", "anchor_matches", "sampled_anchors")),
        (4, ("level_logits", "proposals", "sampled_rois", "rois")),
    ],
)
def test_alternating_training_shows_what_each_step_computes(step: int, seen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    scheme = AlternatingTraining(FasterRCNN(2, SMALL, **OPTIONS), AlternatingConfig())
    scheme.restore({"alternating": {"step": step, "ends": []}})
    with closing(ask()) as record:
        scheme.losses(*BATCH)
    assert tuple(name for name in PARTS if len(getattr(record, name))) == seen
    assert len(record.truths) == 2 and record.batch is not None
