"""A GPU computes what the CPU computes, in float32 within the bounds that stand here; and as cheaply as is promised.

With FRCNN_GPU_TESTS_ON=cpu the same tests compare the CPU with itself, which shows that they can pass.
"""

import copy
import gc
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from detector.faster_rcnn import LOSS_NAMES, FasterRCNN
from detector.training.compilation import compile_networks
from experiments.benchmark.measuring import CPU
from experiments.benchmark.models import Batch, Network, build_network, make_images, standard_network
from experiments.benchmark.programs import Setting, our_optimizer, our_program

pytestmark = pytest.mark.gpu

Tensors = dict[str, Tensor]
DETECTOR = str(Path(__file__).resolve().parents[2] / "detector")
SIZE = (96, 160)
HUGE = 10**6
FEATURES, LOSSES, GRADIENTS, SCORES = 1e-3, 1e-3, 1e-2, 1e-3
"""Bounds: of the largest difference to the largest value, of a loss, of the norm of a gradient, of scores."""

RECIPES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "pyramid": ("resnet18_fpn", {}, {}, {}),
    "torchvision's MobileNetV3": ("mobilenet_v3_large_320_fpn", {}, {}, {}),
    "MobileNetV2, agnostic": (
        "mobilenet_v2_c4",
        {"class_agnostic": True, "pooling": "roi_align"},
        {"reg_normalizer": "locations"},
        {"straddling": "drop"},
    ),
    "py-faster-rcnn": (
        "resnet18_c4",
        {"pooling": "roi_pool", "background_iou": [0.1, 0.5]},
        {"objectness": "softmax", "min_side": 16.0, "min_side_scales": True},
        {"straddling": "drop", "order": "ratio_major"},
    ),
    "adaptive, hard examples": (
        "small_c4",
        {"sampling_ratio": 0, "pooling": "roi_align", "ohem": True, "nms": "soft_linear"},
        {"best_per_object": "one"},
        {"spacing": "stride"},
    ),
    "vgg16": ("vgg16", {"class_weights": "balanced", "nms": "soft_gaussian"}, {}, {}),
}


def small_network(recipe: str) -> Network:
    """Everything is sampled, and nothing dropped, so that nothing is random."""
    name, roi, rpn, anchors = RECIPES[recipe]
    options = standard_network(name, SIZE)
    backbone = replace(options.backbone, dropout=0.0, box_head_channels=64 if "fpn" in name else None)
    if name in ("vgg16", "small_c4"):
        backbone = replace(backbone, weights="none", frozen_stages=0, norm="batch")
    numbers: dict[str, Any] = {"samples_per_image": HUGE, "positive_fraction": 1.0}
    return replace(
        options,
        backbone=backbone,
        anchors=replace(options.anchors, **anchors),
        rpn=replace(options.rpn, post_nms_train=100, post_nms_test=100, **numbers | rpn),
        roi=replace(options.roi, **numbers | roi),
        difficult="ignore",
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    images, targets = batch
    return [image.to(device) for image in images], [
        {name: value.to(device) for name, value in target.items()} for target in targets
    ]


@pytest.fixture(scope="module", params=list(RECIPES))
def built(request: pytest.FixtureRequest) -> tuple[FasterRCNN, Batch]:
    """A detector on the CPU, and two images of five objects; one of them is difficult."""
    options = small_network(request.param)
    batch = make_images(SIZE, 2, 5, CPU)
    batch[1][0]["difficult"][2] = True
    return build_network(options, batch)[0], batch


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, in units of the largest value that is expected."""
    return float((found.detach().cpu() - expected.detach()).abs().max() / expected.detach().abs().max().clamp(min=1e-6))


def gradients_of(model: FasterRCNN, batch: Batch, proposals: list[Tensor]) -> tuple[Tensors, Tensors]:
    """Losses of given proposals, and the gradients by parameter."""
    model.train().zero_grad()
    model.rpn.proposals = lambda *_: proposals  # type: ignore[method-assign]
    losses = model.losses(*batch)
    losses["loss"].backward()
    del model.rpn.proposals
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_losses_and_gradients(built: tuple[FasterRCNN, Batch], gpu: torch.device) -> None:
    model, batch = built
    there, batch_there = copy.deepcopy(model).to(gpu), to_device(batch, gpu)
    with torch.no_grad():
        features, image_batch = model.train().features(batch[0])
        proposals = model.proposals(features, image_batch)
        output = model.rpn(features)
        features_there, image_batch_there = there.train().features(batch_there[0])
        output_there = there.rpn(features_there)
    assert features_there[0].device.type == gpu.type
    assert difference(image_batch_there.tensors, image_batch.tensors) < 1e-5
    for found, expected in zip(features_there, features, strict=True):
        assert difference(found, expected) < FEATURES
    for found, expected in zip(
        (*output_there.logits, *output_there.deltas), (*output.logits, *output.deltas), strict=True
    ):
        assert difference(found, expected) < FEATURES
    losses, gradients = gradients_of(model, batch, proposals)
    losses_there, gradients_there = gradients_of(there, batch_there, [boxes.to(gpu) for boxes in proposals])
    for name in (*LOSS_NAMES, "loss"):
        assert losses_there[name].item() == pytest.approx(losses[name].item(), rel=LOSSES), name
    assert gradients_there.keys() == gradients.keys() and len(gradients) > 10
    largest = max(gradient.norm().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        off = (gradients_there[name].cpu() - gradient).norm().item()
        assert off < GRADIENTS * gradient.norm().item() + 1e-4 * largest, name


def test_detections(built: tuple[FasterRCNN, Batch], gpu: torch.device) -> None:
    """Of the CPU's proposals; nearly all of its own proposals are the GPU's, too."""
    model, batch = built
    there, images_there = copy.deepcopy(model).to(gpu).eval(), to_device(batch, gpu)[0]
    with torch.inference_mode():
        detections, proposals = model.eval()(batch[0])
        found, _ = there(images_there, [boxes.to(gpu) for boxes in proposals])
        _, own = there(images_there)
    assert sum(len(one["boxes"]) for one in detections) > 5
    for one, expected in zip(found, detections, strict=True):
        assert one["scores"].device.type == gpu.type and one["scores"].dtype == one["boxes"].dtype == torch.float32
        assert len(one["boxes"]) == pytest.approx(len(expected["boxes"]), abs=1)
        same = (box_iou(one["boxes"].cpu(), expected["boxes"]) > 0.99) & (
            one["labels"].cpu()[:, None] == expected["labels"]
        )
        same &= (one["scores"].cpu()[:, None] - expected["scores"]).abs() < SCORES
        assert same.any(dim=1).float().mean() >= 0.95
    for boxes, expected_boxes in zip(own, proposals, strict=True):
        assert (box_iou(boxes.cpu(), expected_boxes) > 0.99).any(dim=1).float().mean() >= 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_finite(built: tuple[FasterRCNN, Batch], gpu: torch.device, dtype: torch.dtype) -> None:
    model, batch = copy.deepcopy(built[0]).to(gpu).train(), to_device(built[1], gpu)
    with torch.autocast(gpu.type, dtype):
        losses = model.losses(*batch)
    losses["loss"].backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    with torch.inference_mode(), torch.autocast(gpu.type, dtype):
        detections, proposals = model.eval()(batch[0])
    for one, boxes in zip(detections, proposals, strict=True):
        assert one["boxes"].dtype == one["scores"].dtype == boxes.dtype == torch.float32
        assert one["boxes"].isfinite().all() and one["scores"].isfinite().all() and boxes.isfinite().all()


def test_vgg16_of_caffe_in_float16(gpu: torch.device) -> None:
    """Images of up to 255 in BGR, and activations of up to 10,000, as its weights make them."""
    options = small_network("vgg16")
    mean, std = [102.9801, 115.9465, 122.7717], [1.0, 1.0, 1.0]
    image = replace(options.image, channel_order="bgr", pixel_max=255, mean=mean, std=std)
    batch = to_device(make_images(SIZE, 1, 5, CPU), gpu)
    model = build_network(replace(options, image=image), batch)[0].to(gpu).train()
    largest = []
    for layer in model.backbone.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: largest.append(out.abs().max().item()))
    first = next(layer for layer in model.backbone.modules() if isinstance(layer, nn.Conv2d))
    with torch.no_grad():
        model.features(batch[0])
        first.weight *= 10000 / max(largest)
    largest.clear()
    with torch.autocast(gpu.type, torch.float16):
        losses = model.losses(*batch)
    assert 9000 < max(largest) < 11000
    assert all(loss.isfinite() for loss in losses.values())
    (losses["loss"] * 128).backward()  # the scaler's own scale adapts
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@contextmanager
def waits(device: torch.device) -> Iterator[Counter[str]]:
    """Count where the program waits for the GPU: in NMS, or at a line of the detector."""
    counts: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any) -> None:
        if "synchronizing" in str(message):
            stack = [frame for frame in traceback.extract_stack() if frame.filename.startswith(DETECTOR)]
            in_nms = any("nms" in str(frame.line) for frame in stack)
            counts["nms" if in_nms else f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "elsewhere"] += 1

    def set_mode(mode: str) -> None:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        set_mode("warn")
        try:
            yield counts
        finally:
            set_mode("default")


def test_waits_are_counted(gpu: torch.device) -> None:
    if gpu.type != "cuda":
        pytest.skip("the CPU is not waited for")
    with waits(gpu) as counts:
        torch.ones(2, device=gpu).sum().item()
    assert set(counts) == {"elsewhere"}, counts


@pytest.mark.parametrize(("recipe", "levels"), [("pyramid", 1), ("MobileNetV2, agnostic", 0)])
@pytest.mark.parametrize("number", [1, 3])
def test_a_step_waits_for_the_gpu_only_where_it_says(gpu: torch.device, recipe: str, levels: int, number: int) -> None:
    """In two NMS of the batch and two or three times beside; an inference in two NMS and once or twice beside."""
    batch = to_device(make_images(SIZE, number, 5, CPU), gpu)
    model = build_network(small_network(recipe), make_images(SIZE, 1, 5, CPU))[0].to(gpu).train()
    optimizer = our_optimizer(model)

    def step() -> None:
        optimizer.zero_grad()
        model.losses(*batch)["loss"].backward()
        optimizer.step()

    for _ in range(2):
        step()  # anchors of this size, and the optimiser's state
    with waits(gpu) as counts:
        step()
    nms = counts.pop("nms", 0)
    assert nms <= 4 and counts.total() <= 2 + levels, counts  # of one call CUDA tells two or three
    model.eval()
    with torch.inference_mode():
        model(batch[0])
        with waits(gpu) as counts:
            model(batch[0])
    nms = counts.pop("nms", 0)
    assert nms <= 8 and counts.total() <= 1 + levels, counts


def test_memory_stays_flat(gpu: torch.device) -> None:
    """Over 200 steps on images of three sizes."""
    model = build_network(small_network("pyramid"), make_images(SIZE, 1, 5, CPU))[0].to(gpu)
    setting = Setting("train", device=gpu)
    batches = [to_device(make_images(size, 1, 5, CPU), gpu) for size in (SIZE, (80, 112), (112, 96))]
    steps = [our_program(model.train(), batch, "32-true", setting) for batch in batches]

    def held(number: int) -> float:
        for index in range(number):
            steps[index % 3]()
        gc.collect()
        if gpu.type == "cuda":
            return torch.cuda.memory_allocated()
        tensors = {id(found): found for found in gc.get_objects() if isinstance(found, Tensor)}
        return sum(tensor.nbytes for tensor in tensors.values())

    cuda = gpu.type == "cuda"
    before = held(21)
    assert before > 0
    assert held(180 if cuda else 9) <= before + 2**16


def test_compiled_equals_eager(gpu: torch.device) -> None:
    model = build_network(small_network("adaptive, hard examples"), make_images(SIZE, 1, 5, CPU))[0]
    batch = to_device(make_images(SIZE, 2, 5, CPU), gpu)
    model = model.to(gpu).train()
    with torch.no_grad():
        features, image_batch = model.features(batch[0])
        proposals = model.proposals(features, image_batch)
    losses, gradients = gradients_of(model, batch, proposals)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    compile_networks((model.backbone, model.rpn.head, model.roi_heads.box_head), "default", gpu)
    losses_after, gradients_after = gradients_of(model, batch, proposals)
    for name in (*LOSS_NAMES, "loss"):
        assert losses_after[name].item() == pytest.approx(losses[name].item(), rel=LOSSES), name
    largest = max(gradient.norm().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        off = (gradients_after[name] - gradient).norm().item()
        assert off < GRADIENTS * gradient.norm().item() + 1e-4 * largest, name
