"""`frcnn benchmark evaluate`: our metrics beside torchmetrics' on as many images and detections as VOC2007 test has."""

import importlib.util
import multiprocessing
from collections.abc import Callable

import torch
from torch import Tensor

from detector.errors import InputError
from detector.metrics import DetectionAP, ProposalRecall
from experiments.benchmark.cases import Benchmark, Case, median_times, processor, resident_memory, start_peak, timed

CLASSES = 20
BATCH = 8
PROPOSALS = 300
PEER = "torchmetrics (pycocotools, class_metrics)"
Item = dict[str, Tensor]
Measured = tuple[list[dict[str, float]], float | None]


def benchmark_evaluate(images: int = 4952, detections: int = 100, repeats: int = 3) -> Benchmark:
    """Time `update` and `compute` of our metrics and of torchmetrics' `MeanAveragePrecision` on the same random input.

    Each is measured in a process of its own, one after the other, so that peak memory is its own too. The peer, which
    takes long, runs once; ours is the median of `repeats`.

    Raises:
        InputError: A number below 1, or pycocotools is not installed.
    """
    for name, value in (("images", images), ("detections", detections), ("repeats", repeats)):
        if value < 1:
            raise InputError(f"--{name} {value}: must be at least 1")
    if importlib.util.find_spec("pycocotools") is None:
        raise InputError("the peer of this benchmark needs pycocotools: pip install pycocotools")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        voc, voc_mb = pool.apply(_measure, (_voc_parts, images, detections, repeats))
        whole, whole_mb = pool.apply(_measure, (_whole_parts, images, detections, repeats))
        peer, peer_mb = pool.apply(_measure, (_peer_parts, images, detections, 1))
    peer_ms, _ = median_times(peer)
    cases = []
    for name, times, megabytes in (("VOC", voc, voc_mb), ("VOC + COCO + proposal recall", whole, whole_mb)):
        total, parts = median_times(times)
        cases.append(Case(name, total, peer_ms, parts, PEER, megabytes, peer_mb))
    return Benchmark(
        f"evaluation of {images} images with {detections} detections each, {CLASSES} classes",
        f"cpu: {processor()}, {torch.get_num_threads()} threads",
        cases,
        ("torch", "torchmetrics", "pycocotools", "faster-coco-eval", "numpy"),
    )


Parts = list[tuple[str, Callable[[], object]]]


def _measure(build: Callable[[list[Item], list[Item]], Parts], images: int, detections: int, repeats: int) -> Measured:
    predictions, targets = random_split(images, detections)
    before = start_peak()
    times = [timed(build(predictions, targets)) for _ in range(repeats)]
    peak = resident_memory("VmHWM")
    return times, None if peak is None or before is None else peak - before


def _voc_parts(predictions: list[Item], targets: list[Item]) -> Parts:
    metric = DetectionAP(_class_names(), coco=False)
    return [("update", lambda: _update(metric, predictions, targets)), ("compute", metric.compute)]


def _whole_parts(predictions: list[Item], targets: list[Item]) -> Parts:
    metric, recall = DetectionAP(_class_names()), ProposalRecall(_class_names())
    proposals = [item["boxes"].repeat(-(-PROPOSALS // len(item["boxes"])), 1)[:PROPOSALS] for item in predictions]
    return [
        ("update", lambda: _update(metric, predictions, targets)),
        ("compute", metric.compute),
        ("recall update", lambda: _update(recall, proposals, targets)),
        ("recall compute", recall.compute),
    ]


def _peer_parts(predictions: list[Item], targets: list[Item]) -> Parts:
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(class_metrics=True, backend="pycocotools")
    theirs = [
        {"boxes": item["boxes"], "labels": item["labels"], "iscrowd": item["difficult"].long()} for item in targets
    ]
    return [("update", lambda: _update(metric, predictions, theirs)), ("compute", metric.compute)]


def _update(metric: torch.nn.Module, found: list[Item] | list[Tensor], targets: list[Item]) -> None:
    update: Callable[[object, object], None] = metric.update  # type: ignore[assignment]
    for start in range(0, len(targets), BATCH):
        update(found[start : start + BATCH], targets[start : start + BATCH])


def random_split(images: int, detections: int, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """Predictions and targets with as many objects per image, and as many difficult ones, as VOC2007 test has: half of
    the detections are jittered objects, one in ten of them of another class; the others are background."""
    rng = torch.Generator().manual_seed(seed)
    predictions, targets = [], []
    for index in range(images):
        number = 1 + int(torch.poisson(torch.tensor(2.0), generator=rng))
        boxes = _random_boxes(number, rng)
        labels = torch.randint(1, CLASSES + 1, (number,), generator=rng)
        difficult = torch.rand(number, generator=rng) < 0.2
        targets.append({"boxes": boxes, "labels": labels, "difficult": difficult, "image_id": torch.tensor(index)})
        origin = torch.randint(0, number, (detections // 2,), generator=rng)
        near = boxes[origin] + 15 * torch.randn(len(origin), 4, generator=rng)
        near = torch.cat([near[:, :2].minimum(near[:, 2:]), near[:, :2].maximum(near[:, 2:])], dim=1)
        background = _random_boxes(detections - len(origin), rng)
        other = torch.randint(1, CLASSES + 1, (detections,), generator=rng)
        found = other.clone()
        found[: len(origin)] = torch.where(
            torch.rand(len(origin), generator=rng) < 0.1, found[: len(origin)], labels[origin]
        )
        scores = torch.rand(detections, generator=rng)
        scores[len(origin) :] *= 0.6
        order = scores.argsort(descending=True)
        predictions.append(
            {"boxes": torch.cat([near, background])[order], "labels": found[order], "scores": scores[order]}
        )
    return predictions, targets


def _random_boxes(number: int, rng: torch.Generator) -> Tensor:
    corner = torch.rand(number, 2, generator=rng) * torch.tensor([300.0, 200.0])
    return torch.cat([corner, corner + 10 + 190 * torch.rand(number, 2, generator=rng) ** 2], dim=1)


def _class_names() -> list[str]:
    return [f"class {label}" for label in range(1, CLASSES + 1)]
