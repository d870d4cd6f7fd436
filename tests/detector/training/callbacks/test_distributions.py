"""Histograms of TensorBoard against the values that they are of, from the record of the same step."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from detector import boxes as box_ops
from detector.anchors import AnchorConfig
from detector.roi_heads import RoIConfig
from detector.step_record import ask
from detector.training.callbacks.distributions import BINS, RANGES, Distributions
from tests.detector.training.callbacks.test_anchor_telemetry import module, train
from tests.detector.training.small_detector import BATCH


@pytest.mark.parametrize("straddling", ["keep", "drop"])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_sums_equal_those_of_the_values(straddling: Any, class_agnostic: bool) -> None:
    anchors = AnchorConfig([1, 2], [0.5, 3], straddling=straddling)
    detector = module(anchors=anchors, roi=RoIConfig(samples_per_image=16, class_agnostic=class_agnostic))
    targets = [dict(target) for target in BATCH[1]]
    targets[0]["difficult"] = torch.tensor([True, False])
    targets[1]["labels"] = torch.tensor([2])
    with closing(ask()) as record:
        detector.model.losses(BATCH[0], targets)
    assert record.batch is not None
    values: dict[str, list[list[float]]] = {name: [] for name in RANGES}
    for truth, size in zip(record.truths, record.batch.sizes, strict=True):
        used = record.anchors[box_ops.is_inside(record.anchors, size)] if straddling == "drop" else record.anchors
        best = box_iou(truth.boxes[~truth.difficult], used).max(dim=1).values
        values["object_iou"].append(best.tolist())
    logits = record.roi_deltas.split([len(boxes) for boxes in record.rois])
    for image, (drawn, rois) in enumerate(zip(record.sampled_anchors, record.sampled_rois, strict=True)):
        objects = [place for place, label in enumerate(rois.labels.tolist()) if label > 0]
        own = [logits[image][place, 0 if class_agnostic else int(rois.labels[place]) - 1] for place in objects]
        for axis, name in enumerate(("dx", "dy", "dw", "dh")):
            values[f"rpn_target/{name}"].append(drawn.deltas[:, axis].tolist())
            values[f"rpn_prediction/{name}"].append(record.deltas[image, drawn.positives, axis].tolist())
            values[f"roi_target/{name}"].append(rois.deltas[objects, axis].tolist())
            values[f"roi_prediction/{name}"].append([float(row[axis]) for row in own])
    sums = Distributions().sums_of(detector, record).double().numpy()
    assert sums.shape == (17, BINS + 2)
    for row, (name, (low, high)) in zip(sums, RANGES.items(), strict=True):
        flat = np.array([value for image in values[name] for value in image])
        assert len(flat) > 0, name
        inside = np.clip(flat, low, high - 1e-6)
        assert row[:BINS].sum() == len(flat)
        cumulated = np.cumsum(np.histogram(inside, BINS, (low, high))[0])
        assert np.abs(np.cumsum(row[:BINS]) - cumulated).max() <= 1, name  # a value may lie on an edge
        assert row[BINS:] == pytest.approx([flat.sum(), (flat**2).sum()], rel=1e-4, abs=1e-4)


def test_histograms_and_moments_in_tensorboard(tmp_path: Path) -> None:
    """Each step sees three objects; every second step is seen, and three of them are logged together."""
    events = train(module(), tmp_path, Distributions(2, 6))
    assert set(events.Tags()["histograms"]) == {f"train_distributions/{name}" for name in RANGES}
    (histogram,) = events.Histograms("train_distributions/object_iou")
    value = histogram.histogram_value
    assert (histogram.step, value.num, sum(value.bucket)) == (5, 9, 9)
    assert 0 <= value.min < value.max <= 1 and value.min <= value.sum / 9 <= value.max
    for name in RANGES:
        value = events.Histograms(f"train_distributions/{name}")[0].histogram_value
        (mean,), (std,) = (events.Scalars(f"train_distributions/{name}_{kind}") for kind in ("mean", "std"))
        assert mean.value == pytest.approx(value.sum / value.num, rel=1e-5, abs=1e-6)
        variance = value.sum_squares / value.num - (value.sum / value.num) ** 2
        assert std.value == pytest.approx(max(variance, 0) ** 0.5, rel=1e-3, abs=1e-4)


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    plain, watched = module(), module()
    train(plain, tmp_path / "plain")
    train(watched, tmp_path / "watched", Distributions(1, 2))
    ours = watched.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in plain.state_dict().items())
