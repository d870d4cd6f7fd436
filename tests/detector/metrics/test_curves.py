"""Curves and matrices by hand, and against torchmetrics."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error, binary_precision_recall_curve

from detector.errors import InputError
from detector.metrics import ProposalRecall
from detector.metrics.curves import SCORE_THRESHOLDS, confusion_matrix, curves_of, precision_recall, score_statistics
from detector.metrics.detection_ap import EvaluatedSplit
from detector.metrics.error_breakdown import KINDS, break_down_errors
from detector.metrics.voc_ap import Detections, GroundTruth, class_aps

Row = tuple[int, int, float, list[float]]  # image, label, score, box
Object = tuple[int, int, list[float], bool]  # image, label, box, difficult

WHOLE = [0.0, 0.0, 100.0, 100.0]
PART = [0.0, 0.0, 100.0, 40.0]  # IoU 0.4 with WHOLE
FAR = [300.0, 0.0, 400.0, 100.0]


def split_of(found: list[Row], objects: list[Object]) -> EvaluatedSplit:
    images, labels, scores, boxes = zip(*found, strict=True) if found else ((), (), (), ())
    detections = Detections(
        np.array(images, np.int64),
        np.array(labels, np.int64),
        np.array(scores, np.float32),
        np.array(boxes).reshape(-1, 4),
    )
    images, labels, boxes, difficult = zip(*objects, strict=True)
    truth = GroundTruth(
        np.array(images, np.int64), np.array(labels, np.int64), np.array(boxes), np.array(difficult, np.bool_)
    )
    return EvaluatedSplit(np.arange(9), detections, truth)


def test_each_detection_and_each_missed_object_has_its_cell() -> None:
    found: list[Row] = [
        (0, 1, 0.9, WHOLE),  # found
        (0, 1, 0.8, WHOLE),  # duplicate
        (1, 2, 0.7, WHOLE),  # class 1 taken for 2
        (2, 2, 0.5, PART),  # badly placed, at the threshold
        (3, 1, 0.95, WHOLE),  # difficult: ignored
        (4, 2, 0.6, WHOLE),  # another class on a difficult object
        (5, 1, 0.49, WHOLE),  # below the threshold
        (6, 2, 0.6, FAR),  # background
    ]
    objects: list[Object] = [(image, 1, WHOLE, image in (3, 4)) for image in (0, 1, 3, 4, 5)] + [(2, 2, WHOLE, False)]
    matrix = confusion_matrix(split_of(found, objects), 2)
    assert matrix.counts.tolist() == [[1, 2, 1], [0, 0, 1], [1, 2, 0]]
    assert matrix.row.tolist() == [0, 2, 0, 2, -1, 0, -1, 2]
    assert matrix.column.tolist() == [0, 0, 1, 1, -1, 1, -1, 1]
    assert matrix.target.tolist() == [0, 0, 1, 5, -1, 3, -1, -1]
    assert matrix.missed.tolist() == [False, False, False, False, True, True]
    assert confusion_matrix(split_of(found, objects), 2, 0.4).counts.tolist() == [[2, 2, 0], [0, 0, 1], [1, 2, 0]]
    assert confusion_matrix(split_of([], objects), 2).counts.tolist() == [[0, 0, 3], [0, 0, 1], [0, 0, 0]]
    with pytest.raises(InputError, match=r"score_threshold is 1\.5"):
        confusion_matrix(split_of(found, objects), 2, 1.5)


def random_split(number: int) -> EvaluatedSplit:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (number, 2))
    boxes = np.hstack([corner, corner + rng.uniform(20, 60, (number, 2))])
    images, labels = rng.integers(0, 9, number), rng.integers(1, 4, number)
    truth = GroundTruth(images, labels, boxes, rng.random(number) < 0.2)
    order = rng.permutation(np.repeat(np.arange(number), 3))
    moved = np.repeat(boxes[order, :2] + rng.normal(0, 6, (len(order), 2)), 2, axis=0).reshape(-1, 4)
    moved[:, 2:] = moved[:, :2] + boxes[order, 2:] - boxes[order, :2]
    wrong = rng.random(len(order)) < 0.3
    found = np.where(wrong, rng.integers(1, 4, len(order)), labels[order])
    return EvaluatedSplit(
        np.arange(9), Detections(images[order], found, rng.random(len(order), np.float32), moved), truth
    )


def test_matrix_adds_up_to_the_breakdown_of_errors() -> None:
    split = random_split(60)
    kept = split.detections.take(split.detections.score >= 0.3)
    errors = break_down_errors(kept, split.ground_truth, [1, 2, 3])
    counts = confusion_matrix(split, 3, 0.3).counts
    confused = counts[:3, :3].sum(axis=0) - counts.diagonal()[:3]
    assert confused.tolist() == errors.count["classification"].tolist() and confused.min() > 0
    others = sum(errors.count[kind] for kind in KINDS if kind not in ("classification", "missed"))
    assert counts[3, :3].tolist() == np.asarray(others).tolist()
    assert counts.diagonal()[:3].tolist() == [(one.flags == 1).sum() for one in errors.matched.per_class]


def test_precision_and_recall_at_fixed_thresholds_are_those_of_torchmetrics() -> None:
    # Of 40 detections with 12 objects, those with an even index are right until 10 objects are found; two are ignored.
    scores = np.sort(np.random.default_rng(1).random(40).astype(np.float32))[::-1].copy()
    scores[5] = np.float32(0.7)  # float32(0.7) is below 0.7
    scores = np.sort(scores)[::-1].copy()
    flags = np.array([1 if i % 2 == 0 and i < 20 else 0 for i in range(40)], np.int8)
    flags[[7, 30]] = -1
    zeros = np.zeros(40, np.int64)
    detections = Detections(zeros, zeros + 1, scores, np.zeros((40, 4)))
    (one,) = class_aps(detections, np.arange(40), flags, [1], [12])
    curve = precision_recall(one)
    counted = flags >= 0
    reference, share, _ = binary_precision_recall_curve(
        torch.from_numpy(scores[counted]),
        torch.from_numpy(flags[counted] == 1).long(),
        torch.from_numpy(SCORE_THRESHOLDS),
    )
    there = np.flatnonzero(scores[0] >= SCORE_THRESHOLDS)
    np.testing.assert_allclose(curve["precision"][there], reference.numpy()[there], rtol=1e-6)
    np.testing.assert_allclose(curve["recall"][there], share.numpy()[there] * 10 / 12, rtol=1e-6)
    assert np.isnan(curve["precision"][there[-1] + 1 :]).all() and len(curve["recall"]) == 101
    assert (curve["true_positives"][0], curve["false_positives"][0], curve["objects"]) == (10, 28, 12)
    (nothing,) = class_aps(detections.take(zeros > 0), np.arange(0), flags[:0], [1], [0])
    assert np.isnan(precision_recall(nothing)["recall"]).all()


def test_reliability_is_that_of_torchmetrics_and_leaves_ignored_detections_out() -> None:
    rng = np.random.default_rng(2)
    scores, flags = rng.random(500, np.float32), rng.integers(-1, 2, 500).astype(np.int8)
    found = score_statistics(scores, flags)
    counted = flags >= 0
    reference = binary_calibration_error(
        torch.from_numpy(scores[counted]), torch.from_numpy(flags[counted]).long(), n_bins=20, norm="l1"
    )
    assert found["calibration_error"] == pytest.approx(float(reference), abs=1e-6)
    edges = np.linspace(0, 1, 21)
    assert found["true"].tolist() == np.histogram(scores[flags == 1], edges)[0].tolist()
    assert found["false"].tolist() == np.histogram(scores[flags == 0], edges)[0].tolist()


def test_scores_by_hand() -> None:
    found = score_statistics(np.array([1.0, 0.96, 0.97, 0.03, 0.5]), np.array([1, 0, 1, 0, -1], np.int8))
    assert (found["true"][19], found["false"][19], found["false"][0], sum(found["true"])) == (2, 1, 1, 2)
    assert found["precision"][19] == pytest.approx(2 / 3) and found["mean_score"][19] == pytest.approx(2.93 / 3)
    assert found["precision"][0] == 0 and math.isnan(found["precision"][10])
    assert found["calibration_error"] == pytest.approx((2.93 - 2 + 0.03) / 4)
    assert math.isnan(score_statistics(np.zeros(0), np.zeros(0, np.int8))["calibration_error"])


def test_the_whole_is_in_lists_with_recall_of_proposals() -> None:
    recall = ProposalRecall(("cat", "dog"), top_k=(1, 2))
    boxes = torch.tensor([WHOLE, FAR])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "difficult": torch.zeros(2), "image_id": torch.tensor(0)}
    recall.update([torch.tensor([[0.0, 0.0, 100.0, 70.0], FAR])], [target])
    recall.compute()
    made = curves_of(split_of([(0, 2, 0.9, WHOLE)], [(0, 1, WHOLE, False)]), ("cat", "dog"), recall, 0.25)
    assert made["proposal_recall"]["iou"] == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert made["proposal_recall"]["recall"] == {"1": [0.5] * 5 + [0] * 5, "2": [1] * 5 + [0.5] * 5}
    assert made["confusion"] == [[0, 1, 0], [0, 0, 0], [0, 0, 0]] and made["score_threshold"] == 0.25
    assert made["errors"]["gain"]["classification"] == 1 and made["errors"]["count"]["classification"] == 1
    assert made["precision_recall"]["dog"]["false_positives"] == [1] * 91 + [0] * 10
    assert sum(made["scores"]["false"]) == 1 and made["score_thresholds"][35] == 0.35
