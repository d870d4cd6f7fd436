"""`frcnn benchmark evaluate`: our metrics beside torchmetrics' on as many images and detections as VOC2007 test has."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detector.errors import InputError
from detector.metrics import DetectionAP, ProposalRecall
from experiments.benchmark.cases import Benchmark, Case
from experiments.benchmark.measuring import (
    CPU,
    Clock,
    Parts,
    device_name,
    median_parts,
    peak_memory,
    shares,
    used_memory,
)
from experiments.benchmark.options import MetricsOptions
from experiments.benchmark.processes import run_processes

CLASSES = 20
BATCH = 8
PROPOSALS = 300
PEER = "torchmetrics (pycocotools, class_metrics)"
Item = dict[str, Tensor]


def benchmark_evaluate(options: MetricsOptions) -> Benchmark:
    """Time `update` and `compute` of our metrics and of torchmetrics' `MeanAveragePrecision` on the same random input.

    Each is measured in a process of its own, one after the other, so that peak memory is its own too. The peer, which
    takes long, runs once; ours is the median of several repeats.

    Raises:
        InputError: pycocotools is not installed.
        ProcessFailed: A process failed.
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise InputError("the peer of this benchmark needs pycocotools: pip install pycocotools")
    images, detections = options.images, options.detections
    names = ("VOC", "VOC + COCO + proposal recall")
    repeats = {name: options.repeats for name in names} | {PEER: 1}
    found = {name: run_processes(measure, [(name, images, detections, often)])[0] for name, often in repeats.items()}
    peer, peer_mb = found.pop(PEER)
    title = f"evaluation of {images} images with {detections} detections each, {CLASSES} classes"
    packages = ("torch", "torchmetrics", "pycocotools", "faster-coco-eval", "numpy")
    benchmark = Benchmark(title, device_name(CPU), packages)
    for name, (parts, megabytes) in found.items():
        times = sum(parts.values()), sum(peer.values())
        benchmark.add(Case(name, *times, shares(parts), PEER, ours_peak_mb=megabytes, peer_peak_mb=peer_mb))
    return benchmark


def measure(name: str, images: int, detections: int, repeats: int) -> tuple[Parts, float | None]:
    """Return the median time of each part of an evaluation, and the peak memory beyond the input."""
    predictions, targets = random_split(images, detections)
    before = used_memory(CPU)
    times: list[Parts] = []
    peak = peak_memory(lambda: times.extend(_evaluate(name, predictions, targets) for _ in range(repeats)), CPU)
    return median_parts(times), None if peak is None or before is None else peak - before


def _evaluate(name: str, predictions: list[Item], targets: list[Item]) -> Parts:
    classes = [f"class {label}" for label in range(1, CLASSES + 1)]
    metric: Any = DetectionAP(classes, coco=name != "VOC")
    if name == PEER:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(class_metrics=True, backend="pycocotools")
        targets = [{**item, "iscrowd": item["difficult"].long()} for item in targets]
    runs: list[tuple[str, Any, Sequence[Any]]] = [("", metric, predictions)]
    if name.endswith("recall"):
        proposals = [item["boxes"].repeat(-(-PROPOSALS // len(item["boxes"])), 1)[:PROPOSALS] for item in predictions]
        runs.append(("recall ", ProposalRecall(classes), proposals))
    clock = Clock()
    for prefix, run, found in runs:
        with clock(f"{prefix}update"):
            for start in range(0, len(targets), BATCH):
                run.update(found[start : start + BATCH], targets[start : start + BATCH])
        with clock(f"{prefix}compute"):
            run.compute()
    return clock.times


def random_split(images: int, detections: int, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """Return predictions and targets like those of VOC2007 test in objects per image, and how many are difficult.

    Half of the detections are jittered objects, one in ten of them of another class; the others are background.
    """
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
