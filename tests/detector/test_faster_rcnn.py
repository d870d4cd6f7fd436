"""The whole detector on small images: invariants of batches, empty targets, mixed precision, frozen parts."""

from itertools import pairwise
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig
from detector.faster_rcnn import LOSS_NAMES, FasterRCNN
from detector.image_batch import ImageConfig
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig

SMALL = BackboneConfig("small_c4", weights=None, frozen_stages=0, box_head_channels=32)
FPN = BackboneConfig("resnet18_fpn", weights=None, frozen_stages=0, norm="batch", fpn_channels=16, box_head_channels=32)


def detector(
    backbone: BackboneConfig = SMALL,
    anchors: AnchorConfig | None = None,
    rpn: dict[str, Any] | None = None,
    roi: dict[str, Any] | None = None,
    sharp: bool = True,
    **options: Any,
) -> FasterRCNN:
    """Three classes, images of 64 pixels; `sharp`: random heads so strong that scores and boxes differ clearly."""
    torch.manual_seed(0)
    model = FasterRCNN(
        3,
        backbone,
        anchors or AnchorConfig([1, 2], [0.5, 2]),
        RPNConfig(**{"post_nms_train": 60, "post_nms_test": 25} | (rpn or {})),
        RoIConfig(**{"score_threshold": 0.2, "nms_iou": 0.5} | (roi or {})),
        ImageConfig([64], 128),
        **options,
    )
    with torch.no_grad():
        for layer in (model.rpn.head.objectness, model.rpn.head.deltas, model.roi_heads.predictor.scores):
            layer.weight.mul_(30 if sharp else 1)
    return model.to(memory_format=torch.channels_last)


def image(height: int, width: int, seed: int) -> Tensor:
    """Blocks of 8 x 8 pixels in random colours."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(256, (3, -(-height // 8), -(-width // 8)), dtype=torch.uint8, generator=generator)
    return colors.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].contiguous()


def target(boxes: list[list[float]], labels: list[int], difficult: bool = False) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.full((len(labels),), difficult),
    }


IMAGES = [image(64, 96, 0), image(96, 64, 1)]
TARGETS = [
    target([[3.0, 5.0, 40.0, 30.0], [50.0, 20.0, 90.0, 60.0]], [1, 3]),
    target([[10.0, 40.0, 30.0, 88.0]], [2]),
]
EMPTY = target([], [])


# Detections


@pytest.mark.parametrize(
    "sizes",
    [
        ((64, 96), (64, 96)),
        # Resized to 64 x 96, 80 and 70: alone, too, all are padded to 64 x 96. (Padding changes the features: the group
        # norm of this backbone sees the padding of the whole batch.)
        ((64, 96), (128, 160), (32, 35)),
    ],
)
def test_a_batch_gives_what_its_images_give_alone(sizes: tuple[tuple[int, int], ...]) -> None:
    model = detector().eval()
    images = [image(*size, seed) for seed, size in enumerate(sizes)]
    with torch.no_grad():
        together = model(images)
        alone = [model([each]) for each in images]
    for (detections, proposals), found, proposed in zip(alone, *together, strict=True):
        torch.testing.assert_close(proposed, proposals[0], atol=1e-2, rtol=1e-4)
        assert len(found["boxes"]) > 5
        assert torch.equal(found["labels"], detections[0]["labels"])
        torch.testing.assert_close(found["scores"], detections[0]["scores"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["boxes"], detections[0]["boxes"], atol=1e-2, rtol=1e-4)


def test_results_are_sorted_and_inside_the_original_image() -> None:
    height, width = 128, 176  # halved for the network
    model = detector().eval()
    (found,), (proposals,) = model([image(height, width, 3)])
    assert all(first >= second for first, second in pairwise(found["scores"].tolist()))
    assert set(found["labels"].tolist()) <= {1, 2, 3}
    for boxes in (found["boxes"], proposals):
        assert boxes.dtype == torch.float32
        assert float(boxes.min()) >= 0
        assert 100 < float(boxes[:, 2].max()) <= width  # not in the network's pixels
        assert 70 < float(boxes[:, 3].max()) <= height
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(proposals) == 25


def test_float_images_give_what_bytes_give() -> None:
    model = detector().eval()
    (bytes_,), (floats,) = model(IMAGES[:1])[0], model([IMAGES[0].float()])[0]
    torch.testing.assert_close(bytes_["boxes"], floats["boxes"], atol=1e-3, rtol=1e-5)


def test_a_larger_copy_of_an_image_gives_larger_boxes() -> None:
    """Both are resized to the same pixels; only the way back differs, axis by axis."""
    model = detector().eval()
    small = image(64, 96, 5)
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    (one,), (two,) = model([small])[1], model([large])[1]
    torch.testing.assert_close(two, one * 2, atol=0.05, rtol=1e-3)


def test_partial_passes_compose_to_the_whole() -> None:
    """Features alone, proposals from them, detections from both: what published ports call extractor, rpn and head."""
    model = detector().eval()
    images = [image(128, 176, 3), image(96, 64, 1)]
    with torch.no_grad():
        detections, proposals = model(images)
        features, batch = model.features(images)
        assert [level.shape[2:] for level in features] == [(12, 12)]  # 96 x 88 padded to 96, on stride 8
        assert batch.sizes == [(64, 88), (96, 64)]
        proposed = model.proposals(features, batch)
        detected = model.detect(features, proposed, batch)
        for whole, parts, size, original in zip(proposals, proposed, batch.sizes, batch.original_sizes, strict=True):
            scale = torch.tensor([original[1] / size[1], original[0] / size[0]] * 2)
            torch.testing.assert_close(whole, parts * scale)
        for whole_found, found in zip(detections, detected, strict=True):
            assert len(found["boxes"]) > 3
            assert all(torch.equal(whole_found[key], found[key]) for key in ("boxes", "labels", "scores"))
        # Given proposals: each image has its own, in the pixels of the batch; the head alone gives raw predictions.
        given = [proposed[0][:1], proposed[1][:3]]
        logits, deltas = model.roi_heads(features, given)
        assert (logits.shape, deltas.shape) == ((4, 4), (4, 3, 4))
        few = model.detect(features, given, batch)
        alone = model.detect([level[1:] for level in features], given[1:], batch._replace(
            sizes=batch.sizes[1:], original_sizes=batch.original_sizes[1:]))  # fmt: skip
        torch.testing.assert_close(few[1]["boxes"], alone[0]["boxes"])
        assert len(few[0]["boxes"]) <= 3  # one proposal, three classes


def test_partial_passes_in_training_give_the_training_counts_and_gradients() -> None:
    model = detector().train()
    features, batch = model.features(IMAGES)
    assert features[0].requires_grad
    counts = [len(boxes) for boxes in model.proposals(features, batch)]
    assert max(counts) > 25  # the count of evaluation


# Losses


def test_total_is_the_weighted_sum() -> None:
    model = detector(rpn={"reg_weight": 3.0}, roi={"cls_weight": 2.0, "reg_weight": 5.0}).train()
    with torch.no_grad():
        model.roi_heads.predictor.deltas.bias.fill_(2.0)  # or the box loss of RoIs would be nothing beside the others
    losses = {name: float(value.detach()) for name, value in model.losses(IMAGES, TARGETS).items()}
    assert set(losses) == {*LOSS_NAMES, "loss"}
    assert all(losses[name] > 0.01 for name in LOSS_NAMES)
    weights = {"loss_rpn_cls": 1, "loss_rpn_reg": 3, "loss_roi_cls": 2, "loss_roi_reg": 5}
    assert losses["loss"] == pytest.approx(sum(weights[name] * losses[name] for name in LOSS_NAMES), rel=1e-5)


def test_losses_of_a_batch_are_the_mean_of_its_images() -> None:
    """All anchors and 41 RoIs of each image are sampled: nothing is random, and both images count alike."""
    every = {"samples_per_image": 10**5, "positive_fraction": 1.0}
    rpn = every | {"positive_iou": 0.5, "negative_iou": 0.5, "nms_iou": 0.9, "post_nms_train": 40}
    model = detector(anchors=AnchorConfig([1, 2], [0.5, 2], straddling="keep"), rpn=rpn, roi=every).train()
    model.backbone.eval()  # batch norm in training would tie the images of a batch together
    images = [image(64, 96, 0), image(64, 96, 1)]
    targets = [target([[3.0, 5.0, 40.0, 30.0]], [1]), target([[60.0, 10.0, 90.0, 60.0]], [3])]
    together = model.losses(images, targets)
    alone = [model.losses([one], [its]) for one, its in zip(images, targets, strict=True)]
    for name, value in together.items():
        torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2, atol=1e-4, rtol=1e-4)
    assert abs(float((alone[0]["loss_roi_cls"] - alone[1]["loss_roi_cls"]).detach())) > 0.01


def test_roi_losses_do_not_move_the_proposals() -> None:
    model = detector().train()
    losses = model.losses(IMAGES, TARGETS)
    roi_loss = losses["loss_roi_cls"] + losses["loss_roi_reg"]
    gradients = torch.autograd.grad(roi_loss, list(model.rpn.parameters()), retain_graph=True, allow_unused=True)
    assert gradients == (None,) * len(gradients)
    (stem,) = torch.autograd.grad(roi_loss, [next(model.backbone.parameters())])
    assert stem.abs().sum() > 0  # the features learn from both


@pytest.mark.parametrize("backbone", [SMALL, FPN], ids=["small_c4", "resnet18_fpn"])
@pytest.mark.parametrize("targets", [[EMPTY, EMPTY], [TARGETS[0], EMPTY]], ids=["no objects", "one image without"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"anchors": AnchorConfig([32], [1.0])},  # all anchors straddle the border and are dropped
        {"roi": {"background_iou": [0.1, 0.5]}},  # no RoI of an empty image counts as background
        {"roi": {"append_gt": False, "class_agnostic": True}, "rpn": {"objectness": "softmax"}},
        {"roi": {"ohem": True, "class_weights": "balanced", "append_gt": "jittered", "pooling": "roi_pool_floor"}},
    ],
    ids=["plain", "no anchors", "no background", "agnostic softmax", "hard examples"],
)
def test_every_parameter_gets_a_gradient(
    backbone: BackboneConfig, targets: list[dict[str, Tensor]], options: dict[str, Any]
) -> None:
    """Without one, training on several GPUs stops."""
    model = detector(backbone, **options).train()
    losses = model.losses(IMAGES, targets)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    ]
    assert missing == []


def test_difficult_objects() -> None:
    """With every anchor and RoI sampled nothing is random, so that treatments can be compared exactly."""
    many = {"rpn": {"samples_per_image": 10**5, "positive_fraction": 1.0},
            "roi": {"samples_per_image": 10**5, "positive_fraction": 1.0}}  # fmt: skip

    def losses(treatment: str, targets: list[dict[str, Tensor]]) -> list[float]:
        model = detector(**many, difficult=treatment).train()
        return [float(value.detach()) for value in map(model.losses(IMAGES, targets).__getitem__, LOSS_NAMES)]

    difficult = [each | {"difficult": torch.ones(len(each["labels"]), dtype=torch.bool)} for each in TARGETS]
    as_objects, as_nothing = losses("keep", TARGETS), losses("keep", [EMPTY, EMPTY])
    ignored = losses("ignore", difficult)
    assert losses("keep", difficult) == as_objects
    assert losses("drop", difficult) == as_nothing
    assert losses("drop", TARGETS) == losses("ignore", TARGETS) == as_objects
    assert ignored[1] == ignored[3] == 0  # nothing is pulled towards them
    assert ignored[0] not in (as_nothing[0], as_objects[0])  # and what lies on them is not background
    # One of two objects difficult: dropped, it is as if it were not there; ignored, it is not background either.
    half = [target([[3.0, 5.0, 40.0, 30.0]], [1]), TARGETS[1]]
    mixed = [TARGETS[0] | {"difficult": torch.tensor([False, True])}, TARGETS[1]]
    assert losses("drop", mixed) == losses("keep", half)
    assert losses("ignore", mixed)[0] != losses("drop", mixed)[0]


def test_boxes_and_losses_are_float32_under_mixed_precision() -> None:
    model = detector()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.train().losses(IMAGES, TARGETS)
        losses["loss"].backward()
        with torch.no_grad():
            detections, proposals = model.eval()(IMAGES)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    for boxes in [*proposals, *(each["boxes"] for each in detections), *(each["scores"] for each in detections)]:
        assert boxes.dtype == torch.float32
        assert not torch.equal(boxes, boxes.bfloat16().float())  # nor were they rounded on the way
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


def test_frozen_stages_get_no_gradient_and_all_else_does() -> None:
    backbone = BackboneConfig("small_c4", weights="weights.pth", frozen_stages=2, box_head_channels=32)
    model = detector(backbone, load_weights=False).train()
    model.losses(IMAGES, TARGETS)["loss"].backward()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    prefixes = ("backbone.body.stem.", "backbone.body.layer1.")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    assert frozen
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == frozen


def test_training_starts_from_ignorance_and_leaves_it() -> None:
    model = detector(sharp=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(15):
        losses = model.losses(IMAGES, TARGETS)
        history.append({name: float(value.detach()) for name, value in losses.items()})
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert history[0]["loss_rpn_cls"] == pytest.approx(log(2), abs=0.05)  # object or not
    assert history[0]["loss_roi_cls"] == pytest.approx(log(4), abs=0.05)  # three classes and background
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
