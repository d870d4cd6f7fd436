"""The metrics at full size: all annotations of VOC2007 test under synthetic detections, against independent code.

For VOC that is a transcription of the devkit's description: no maintained package handles difficult objects
(mean-average-precision 2024.1.5 counts them as objects to be found).
"""

import contextlib
import io
from collections import defaultdict

import numpy as np
import pytest

from datamodules.ground_truth import SplitTruth, read_ground_truth
from datamodules.voc.reader import VOCFormat
from detector.metrics.bootstrap import bootstrap
from detector.metrics.coco_ap import NAMES, evaluate_coco
from detector.metrics.voc_ap import Detections, evaluate_voc

pytestmark = pytest.mark.real_data
LABELS = range(1, 21)


@pytest.fixture(scope="module")
def truth(genuine_voc) -> SplitTruth:
    return read_ground_truth(VOCFormat(genuine_voc("voc2007-annotations.tar.xz")), ["2007_test"])


@pytest.fixture(scope="module")
def detections(truth: SplitTruth) -> Detections:
    """For every object three jittered detections, some of the wrong class; and background. No two scores or IoUs are
    equal, so that no rule for ties, which packages choose differently, decides anything."""
    rng = np.random.default_rng(0)
    objects = truth.objects
    origin = np.repeat(np.arange(len(objects)), 3)
    origin = origin[rng.random(len(origin)) < 0.8]
    side = (objects.box[origin, 2:] - objects.box[origin, :2]).astype(np.float64)
    near = objects.box[origin] + rng.normal(0, 0.1, (len(origin), 4)) * np.tile(side, 2)
    background = 10_000
    corner = rng.uniform(0, 300, (background, 2))
    box = np.vstack([near, np.hstack([corner, corner + rng.uniform(20, 200, (background, 2))])])
    box[:, 2:] = np.maximum(box[:, 2:], box[:, :2] + 1)
    label = np.concatenate([objects.label[origin], rng.integers(1, 21, background)])
    label = np.where(rng.random(len(label)) < 0.1, rng.integers(1, 21, len(label)), label)
    image = np.concatenate([objects.image_id[origin], rng.integers(0, len(truth.image_names), background)])
    return Detections(image, label, rng.permutation(len(label)) / len(label), box)


def test_the_split_is_whole(truth: SplitTruth) -> None:
    """Counted in the files as text: 14,976 objects, 2,945 of them difficult."""
    assert len(truth.image_names) == 4952
    assert len(truth.objects) == 14976
    assert truth.objects.difficult.sum() == 2945
    assert (truth.objects.box.min(), truth.objects.image_id.max()) == (0, 4951)


def literal_devkit(found: Detections, truth: SplitTruth, label: int) -> tuple[float, float]:
    """The devkit's description step by step, on its own boxes, which count pixels from 1 and include the last one."""
    objects: dict[int, list[list[float]]] = defaultdict(list)
    difficult: dict[int, list[bool]] = defaultdict(list)
    taken: dict[int, list[bool]] = defaultdict(list)
    npos = 0
    for j in np.flatnonzero(truth.objects.label == label):
        image = int(truth.objects.image_id[j])
        x1, y1, x2, y2 = truth.objects.box[j].tolist()
        objects[image].append([x1 + 1, y1 + 1, x2, y2])
        difficult[image].append(bool(truth.objects.difficult[j]))
        taken[image].append(False)
        npos += not truth.objects.difficult[j]
    mine = np.flatnonzero(found.label == label)
    tp: list[int] = []
    fp: list[int] = []
    for i in sorted(mine.tolist(), key=lambda i: -found.score[i]):
        image = int(found.image_id[i])
        x1, y1, x2, y2 = found.box[i].tolist()
        x1, y1 = x1 + 1, y1 + 1
        best, best_overlap = -1, -np.inf
        for j, (a1, b1, a2, b2) in enumerate(objects[image]):
            width = min(x2, a2) - max(x1, a1) + 1
            height = min(y2, b2) - max(y1, b1) + 1
            if width > 0 and height > 0:
                union = (x2 - x1 + 1) * (y2 - y1 + 1) + (a2 - a1 + 1) * (b2 - b1 + 1) - width * height
                if width * height / union > best_overlap:
                    best, best_overlap = j, width * height / union
        if best_overlap >= 0.5 and difficult[image][best]:
            right = wrong = 0
        elif best_overlap >= 0.5 and not taken[image][best]:
            taken[image][best] = True
            right, wrong = 1, 0
        else:
            right, wrong = 0, 1
        tp.append(right)
        fp.append(wrong)
    right_so_far, wrong_so_far = np.cumsum(tp), np.cumsum(fp)
    recall = right_so_far / npos
    precision = right_so_far / np.maximum(right_so_far + wrong_so_far, 1)
    eleven = 0.0
    for threshold in np.arange(11) / 10:
        reached = precision[recall >= threshold]
        eleven += (reached.max() if len(reached) else 0.0) / 11
    mrec = np.concatenate([[0.0], recall, [1.0]])
    mpre = np.concatenate([[0.0], precision, [0.0]])
    for k in range(len(mpre) - 2, -1, -1):
        mpre[k] = max(mpre[k], mpre[k + 1])
    steps = np.flatnonzero(mrec[1:] != mrec[:-1]) + 1
    return eleven, float(((mrec[steps] - mrec[steps - 1]) * mpre[steps]).sum())


def test_voc_equals_the_literal_rules(truth: SplitTruth, detections: Detections) -> None:
    result = evaluate_voc(detections, truth.objects, LABELS)
    expected = [literal_devkit(detections, truth, label) for label in LABELS]
    for ours, (eleven, area) in zip(result.per_class, expected, strict=True):
        assert ours.ap_voc07 == pytest.approx(eleven, abs=1e-6)
        assert ours.ap_area == pytest.approx(area, abs=1e-6)
    assert result.ap_voc07 == pytest.approx(np.mean([one[0] for one in expected]), abs=1e-6)
    assert result.ap_area == pytest.approx(np.mean([one[1] for one in expected]), abs=1e-6)
    assert 0.2 < result.ap_area < 0.8
    assert set(np.unique(result.flags)) == {-1, 0, 1}


def test_coco_equals_pycocotools(truth: SplitTruth, detections: Detections) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entries(image: np.ndarray, label: np.ndarray, box: np.ndarray) -> list[dict[str, object]]:
        box = box.astype(np.float64)
        sides = box[:, 2:] - box[:, :2]
        columns = zip(image.tolist(), label.tolist(), np.hstack([box[:, :2], sides]).tolist(), strict=True)
        return [
            {"id": n, "image_id": i + 1, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
            for n, (i, c, b) in enumerate(columns, start=1)
        ]

    objects = truth.objects
    annotations = entries(objects.image_id, objects.label, objects.box)
    for entry, difficult in zip(annotations, objects.difficult.tolist(), strict=True):
        entry["iscrowd"] = int(difficult)
    found = entries(detections.image_id, detections.label, detections.box)
    for entry, score in zip(found, detections.score.tolist(), strict=True):
        entry["score"] = score
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {
            "info": {},
            "images": [{"id": int(i) + 1} for i in truth.image_ids],
            "categories": [{"id": label, "name": str(label)} for label in LABELS],
            "annotations": annotations,
        }
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = evaluate_coco(detections, objects, truth.image_ids, LABELS)
    np.testing.assert_allclose([values[name] for name in NAMES], evaluation.stats[:9], atol=1e-6)
    assert 0.05 < values["AP"] < values["AP50"] < 0.9


def test_bootstrap_is_centred_on_the_metric(truth: SplitTruth, detections: Detections) -> None:
    samples = bootstrap(detections, truth.objects, truth.image_ids, truth.class_names, 100, coco=False)
    result = evaluate_voc(detections, truth.objects, LABELS)
    for name, value in (("AP50_voc07", result.ap_voc07), ("AP50_voc", result.ap_area)):
        assert samples[name].mean() == pytest.approx(value, abs=2 * samples[name].std())
        assert 0.001 < samples[name].std() < 0.01
