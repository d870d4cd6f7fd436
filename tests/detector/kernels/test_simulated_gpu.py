"""The detector on a simulated GPU: what it waits for, copies and launches, for every option that computes something."""

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from typing import Any, cast

import pytest
import torch
from torchvision.models import detection

from detector.anchors import AnchorConfig
from detector.backbones.base import BackboneConfig, BackboneName
from detector.faster_rcnn import LOSS_NAMES, FasterRCNN
from detector.image_batch import ImageConfig
from detector.kernels import precision
from detector.kernels.transfers import constant, true_indices
from detector.metrics import DetectionAP, ProposalRecall
from detector.roi_heads import RoIConfig
from detector.rpn import RPNConfig
from detector.step_record import ask
from tests.detector.kernels.simulated_gpu import FOUND, Counted, batch, move, simulated_gpu

IMAGES = 2
TRAINING, DETECTING = Counter(to_cpu=3, nms=1), Counter(to_cpu=3, nms=2)
"""Training: NMS of the proposals, and how many of each image it leaves; the anchors' and the RoIs' samples. Detecting:
the same two of proposals, likely boxes, NMS of them, how many of each image that leaves."""
LEVELS = Counter(to_cpu=1)
"""How many RoIs are on each level of a pyramid."""
NOTHING: Counter[str] = Counter()
ROUNDS = Counter(item=1, nms=-1)
LARGE = {"image": {"pad_multiple": 512}}  # of which there are 12,288 anchors

OPTIONS: dict[str, tuple[dict[str, Any], Counter[str], Counter[str]]] = {
    "as it is": ({}, NOTHING, NOTHING),
    "vgg16": ({"backbone": "vgg16"}, NOTHING, NOTHING),
    "vgg16_bn": ({"backbone": "vgg16_bn"}, NOTHING, NOTHING),
    "resnet18_c4": ({"backbone": "resnet18_c4"}, NOTHING, NOTHING),
    "resnet18_fpn": ({"backbone": "resnet18_fpn"}, LEVELS, LEVELS),
    "mobilenet_v2_c4": ({"backbone": "mobilenet_v2_c4"}, NOTHING, NOTHING),
    "mobilenet_v3_large_fpn": ({"backbone": "mobilenet_v3_large_fpn"}, LEVELS, LEVELS),
    "conv_fc": ({"backbone": "resnet18_fpn", "of_backbone": {"box_head": "conv_fc"}}, LEVELS, LEVELS),
    # NMS of each image's RoIs, how many of the hardest are positive; of levels, those of the pass that finds them.
    "ohem": ({"roi": {"ohem": True}}, Counter(to_cpu=1, nms=IMAGES), NOTHING),
    "ohem of levels": (
        {"backbone": "resnet18_fpn", "roi": {"ohem": True}},
        Counter(to_cpu=3, nms=IMAGES),
        LEVELS,
    ),
    "balanced": ({"roi": {"class_weights": "balanced"}}, NOTHING, NOTHING),
    "weights": ({"roi": {"class_weights": [1.0, 2.0, 1.0, 1.0]}}, NOTHING, NOTHING),
    "jittered": ({"roi": {"append_gt": "jittered"}}, NOTHING, NOTHING),
    "no objects added": ({"roi": {"append_gt": False}}, NOTHING, NOTHING),
    "agnostic": ({"roi": {"class_agnostic": True}}, NOTHING, NOTHING),
    "adaptive": ({"backbone": "resnet18_fpn", "roi": {"sampling_ratio": 0}}, LEVELS, LEVELS),
    "roi_pool": ({"backbone": "resnet18_fpn", "roi": {"pooling": "roi_pool"}}, LEVELS, LEVELS),
    # The cells of the RoIs of each of four levels.
    "roi_pool_floor": (
        {"backbone": "resnet18_fpn", "roi": {"pooling": "roi_pool_floor"}},
        Counter(to_cpu=5),
        Counter(to_cpu=5),
    ),
    # No NMS of detections, nor how many of each image it leaves; instead, how many scores are above the threshold.
    "soft": ({"roi": {"nms": "soft_gaussian"}}, NOTHING, Counter(nms=-1)),
    # Whether NMS of the proposals has ended instead of how many it leaves, or that of each image by itself.
    "many proposals": ({"rpn": {"pre_nms_train": 3000, "pre_nms_test": 3000}, **LARGE}, ROUNDS, ROUNDS),
    "most proposals": (
        {"rpn": {"pre_nms_train": 5000, "pre_nms_test": 5000}, **LARGE},
        Counter(nms=IMAGES - 1),
        Counter(nms=IMAGES - 1),
    ),
    "softmax": ({"rpn": {"objectness": "softmax", "score_threshold": 0.1, "min_side_scales": True}}, NOTHING, NOTHING),
    "one": ({"rpn": {"best_per_object": "one"}}, NOTHING, NOTHING),
    "keep": ({"anchors": {"straddling": "keep", "spacing": "fitted"}, "difficult": "keep"}, NOTHING, NOTHING),
    "ignore": ({"difficult": "ignore"}, NOTHING, NOTHING),
    "caffe": ({"image": {"channel_order": "bgr", "pixel_max": 255.0}}, NOTHING, NOTHING),
    # Two views: proposals and likely boxes of both.
    "flip": ({"image": {"test_flip": True}}, NOTHING, Counter(to_cpu=2, nms=1)),
}


def build(
    backbone: str = "small_c4",
    of_backbone: dict[str, Any] | None = None,
    anchors: dict[str, Any] | None = None,
    rpn: dict[str, Any] | None = None,
    roi: dict[str, Any] | None = None,
    image: dict[str, Any] | None = None,
    difficult: Any = "drop",
) -> FasterRCNN:
    """A detector on the simulated GPU, in training."""
    name = cast(BackboneName, backbone)
    detector = FasterRCNN(
        3,
        BackboneConfig(name, weights="none", frozen_stages=0, norm="batch", **of_backbone or {}),
        AnchorConfig([1.0, 2.0, 4.0], **anchors or {}),
        RPNConfig(
            **{"pre_nms_train": 300, "pre_nms_test": 300, "post_nms_train": 50, "post_nms_test": 50} | (rpn or {})
        ),
        RoIConfig(**roi or {}),
        ImageConfig(shortest_side=[96], **image or {}),
        difficult,
    )
    move(detector)
    return detector


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("option", OPTIONS)
def test_waits(option: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mix of devices, results in float32, no waits but these, whoever watches."""
    if dtype is not None and "backbone" not in OPTIONS[option][0]:
        pytest.skip("precision makes no difference outside of networks and pooling")
    options, in_training, in_detecting = OPTIONS[option]
    monkeypatch.setattr(precision, "_is_ill_conditioned", lambda _: False)
    with simulated_gpu(monkeypatch), closing(ask()):
        detector = build(**options)
        images, targets = batch(IMAGES, (80, 100), unlike=True)
        with Counted() as training, torch.autocast("cuda", torch.bfloat16, enabled=dtype is not None):
            losses = detector.losses(images, targets)
        assert {(loss.device.type, loss.dtype) for loss in losses.values()} == {("cuda", torch.float32)}
        assert set(losses) == {*LOSS_NAMES, "loss"}
        detector.eval()
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=dtype is not None)
        with Counted() as detecting, torch.no_grad(), autocast:
            detections, proposals = detector(images)
        tensors = [*proposals, *(value for found in detections for value in found.values())]
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
        assert {found["boxes"].dtype for found in detections} == {torch.float32}
    assert _positive(training.waits) == _sum(TRAINING, in_training)
    assert _positive(detecting.waits) == _sum(DETECTING, in_detecting)


@pytest.mark.parametrize("unlike", [False, True])
def test_more_images_are_few_more_operations(unlike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which each takes a GPU less time than the program that asks for it."""
    monkeypatch.setattr(precision, "_is_ill_conditioned", lambda _: False)
    ours: dict[tuple[str, int], Counted] = {}
    theirs: dict[tuple[str, int], Counted] = {}
    with simulated_gpu(monkeypatch), torch.autocast("cuda", torch.bfloat16):
        detector = build("mobilenet_v3_large_fpn", anchors={"straddling": "keep"})
        peer = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=4)
        move(peer)
        for number in (1, 8):
            images, targets = batch(number, (80, 100), unlike=unlike)
            for network, counts in ((detector, ours), (peer, theirs)):
                for mode in ("train", "detect"):
                    network.train(mode == "train")
                    for _ in range(2):  # the first time there are no anchors yet
                        counts[mode, number] = Counted()
                        with torch.set_grad_enabled(mode == "train"), counts[mode, number]:
                            if network is peer:
                                peer([image / 255 for image in images], targets if mode == "train" else None)
                            elif mode == "train":
                                detector.losses(images, targets)
                            else:
                                detector(images)
    for mode, most in (("train", (14, 20)), ("detect", (8, 16))):
        further, of_peer = ((counts[mode, 8].launches - counts[mode, 1].launches) / 7 for counts in (ours, theirs))
        assert further < most[unlike] < of_peer / 4
        assert ours[mode, 1].launches < theirs[mode, 1].launches
        assert ours[mode, 8].waits.total() < theirs[mode, 8].waits.total() / 6


@pytest.mark.parametrize("images", [1, 8])
def test_metrics_wait_a_few_times_for_a_batch(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the ids of the images, what is wrong with boxes and labels, and how many objects are not difficult."""
    with simulated_gpu(monkeypatch):
        _, targets = batch(images, (80, 100))
        targets = [target | {"image_id": torch.zeros((), dtype=torch.int64, device="cuda")} for target in targets]
        found = {name: targets[0][name] for name in ("boxes", "labels")} | {"scores": torch.empty(2, device="cuda")}
        average, recall = DetectionAP(["cat"]), ProposalRecall(["cat"], [1, 2])
        average._device = recall._device = torch.device("cuda")
        for metric, predictions, checks in ((average, [found] * images, 4), (recall, [found["boxes"]] * images, 3)):
            with Counted() as counted:
                metric.update(predictions, targets)
            assert _positive(counted.waits) == {"to_cpu": 2 if metric is recall else 1, "item": checks}


def test_waits_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter above counts."""
    with simulated_gpu(monkeypatch):
        x = torch.arange(3.0, device="cuda")
        waiting: list[tuple[str, Callable[[], object]]] = [
            ("item", lambda: x[0].item()),
            ("item", lambda: bool(x[0] > 0)),
            ("to_cpu", lambda: x.cpu()),
            ("mask", lambda: x[x > 1]),
            ("nonzero", lambda: torch.where(x > 1)),
            ("masked_select", lambda: x.masked_select(x > 1)),
            ("repeat_interleave", lambda: x.repeat_interleave(x.long())),
            ("from_cpu", lambda: x.new_tensor([1.0])),
            ("from_cpu", lambda: torch.tensor([1.0], device="cuda")),
            ("from_cpu", lambda: torch.zeros(1).to(x.device)),
        ]
        for name, function in waiting:
            with Counted() as counted:
                function()
            assert _positive(counted.waits) == {name: 1}
        with Counted() as counted:
            constant([1.0], x)
            constant([1.0], x)
            torch.where(x > 1, x, x[0]).long()
        assert (_positive(counted.waits), counted.copies, counted.launches) == ({}, 1, 4)
        with Counted() as counted:
            found = true_indices([x > 1, x > 0])
        assert _positive(counted.waits) == {"to_cpu": 1}
        assert [len(indices) for indices in found] == [FOUND, 0]


def _sum(*counts: Counter[str]) -> dict[str, int]:
    return {key: number for key in ("item", "to_cpu", "nms") if (number := sum(count[key] for count in counts))}


def _positive(counts: Counter[str]) -> dict[str, int]:
    return {key: number for key, number in counts.items() if number}
