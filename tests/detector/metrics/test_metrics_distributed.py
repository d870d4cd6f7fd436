"""Both metrics over 2 and 4 processes: uneven shares, shares of nothing, repeated images."""

import json
import multiprocessing
import time
import zlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from detector.metrics import DetectionAP, ProposalRecall
from detector.metrics.curves import curves_of
from detector.training.callbacks.anchor_telemetry import ShapesOfDetections

CLASSES = ("cat", "dog", "cow")
LIMIT_S = 120
# World size -> the images of each rank. Image 2 is repeated, image 0 is given to two ranks.
SHARES: dict[int, list[list[int]]] = {
    2: [[], [7, 2, 0, 4, 1, 2, 3, 6, 5]],
    4: [[0, 5, 2, 4, 1], [], [7, 3, 2], [6, 0]],
}
Item = dict[str, Tensor]


def image_of(index: int, empty: bool) -> tuple[Item, Tensor, Item]:
    """Prediction, proposals and target of an image, the same in every process; image 3 has no objects."""
    rng = torch.Generator().manual_seed(index)
    objects = 0 if index == 3 else 1 + index % 4
    corner = torch.rand(objects, 2, generator=rng) * 100
    boxes = torch.cat([corner, corner + 20 + torch.rand(objects, 2, generator=rng) * 90], dim=1)
    labels = torch.randint(1, 3, (objects,), generator=rng)
    near = boxes.repeat(3, 1) + torch.randn(3 * objects, 4, generator=rng) * 3
    found = torch.cat([near, torch.tensor([[0.0, 0.0, 30.0, 30.0]])])[: 0 if empty else None]
    found_labels = torch.cat([labels.repeat(3), torch.tensor([1])])[: len(found)]
    scores = torch.randint(1, 6, (len(found),), generator=rng) / 6
    target = {"boxes": boxes, "labels": labels, "difficult": labels > 9, "image_id": torch.tensor(index)}
    if objects > 2:
        target["difficult"][0] = True
    return {"boxes": found, "labels": found_labels, "scores": scores}, found, target


def place_within(image_id: NDArray[Any]) -> NDArray[Any]:
    """The place of each row among those of its image, which stand together."""
    return np.arange(len(image_id)) - np.searchsorted(image_id, image_id)


def measured(images: list[int], empty: bool, group: dist.ProcessGroup | None = None) -> dict[str, float]:
    detection_ap, recall = DetectionAP(CLASSES), ProposalRecall(CLASSES, top_k=(1, 2, 300))
    detection_ap.process_group = recall.process_group = group
    for index in images:
        prediction, proposals, target = image_of(index, empty)
        detection_ap.update([prediction], [target])
        recall.update([proposals], [target])
    values = {name: value.item() for name, value in {**detection_ap.compute(), **recall.compute()}.items()}
    results = detection_ap.results()
    shapes = ShapesOfDetections()
    shapes.process_group = group
    for index in images:
        prediction, _, target = image_of(index, empty)
        shapes.update([10 * index + torch.arange(len(prediction["boxes"])) % 7], [target])
    shape = shapes.compute()["shape"].numpy()
    assert (shape == 10 * results["image_id"] + place_within(results["image_id"]) % 7).all()
    per_class = {f"recall/{name}": value for name, value in recall.recall_per_class().items()}
    values["curves"] = zlib.crc32(json.dumps(curves_of(detection_ap.of_chosen_classes(), CLASSES, recall)).encode())
    return {**values, **per_class, "detections": len(results["score"]), "last": float(results["image_id"].sum())}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=LIMIT_S), world_size=4, rank=rank)
    pair = dist.new_group([0, 1])
    outcome = {}
    for empty in (False, True):
        outcome[4, empty] = measured(SHARES[4][rank], empty)
        if isinstance(pair, dist.ProcessGroup):
            outcome[2, empty] = measured(SHARES[2][rank], empty, pair)
    torch.save(outcome, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_any_number_of_processes_gives_the_same_bits(tmp_path: Path) -> None:
    # One process imports torch, the four are forked from it.
    multiprocessing.set_forkserver_preload(["torch", "torchvision", "torchmetrics.detection", "faster_coco_eval"])
    processes = start_processes(work, (str(tmp_path),), nprocs=4, join=False, start_method="forkserver")
    try:
        deadline = time.monotonic() + LIMIT_S
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
    for empty in (False, True):
        expected = measured(list(range(8)), empty)
        assert (expected["detections"] == 0) == empty
        assert not empty or expected["AP50_voc"] == 0
        assert empty or 0 < expected["AP50_voc"] < 1
        for rank in range(4):
            outcome = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
            for world in (2, 4) if rank < 2 else (4,):
                got = outcome[world, empty]
                assert list(got) == list(expected)
                np.testing.assert_array_equal(list(got.values()), list(expected.values()))
