import contextlib
import io
import math

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from detector.errors import InputError
from detector.metrics import DetectionAP

COCO_NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR@1", "AR@10", "AR@100")
Item = dict[str, Tensor]


def prediction(boxes: list[list[float]], labels: list[int], scores: list[float]) -> Item:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
    }


def target(image_id: int, boxes: list[list[float]], labels: list[int], difficult: list[bool] | None = None) -> Item:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(difficult or [False] * len(labels), dtype=torch.bool),
        "image_id": torch.tensor(image_id),
    }


def random_split(seed: int, images: int = 25, classes: int = 4) -> tuple[list[Item], list[Item]]:
    """Jittered objects, wrong classes, duplicates and background, in images some of which are empty of either."""
    rng = np.random.default_rng(seed)
    predictions, targets = [], []
    for image in range(images):
        g = int(rng.integers(0, 6)) if image % 5 else 0
        corner, side = rng.uniform(0, 200, (g, 2)), rng.choice([12.0, 32.0, 60.0, 96.0, 160.0], (g, 2))
        boxes = np.hstack([corner, corner + side]).round()
        labels = rng.integers(1, classes, g)  # the last class has no objects
        targets.append(target(image * 3, boxes.tolist(), labels.tolist(), (rng.random(g) < 0.25).tolist()))
        chosen = rng.integers(0, g, 3 * g) if g else np.zeros(0, dtype=np.int64)
        near = boxes[chosen] + rng.normal(0, 6, (len(chosen), 4)).round()
        far = rng.uniform(0, 150, (4 if image % 4 else 0, 4))
        found = np.vstack([near, np.hstack([far[:, :2], far[:, :2] + far[:, 2:]])])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
        right = np.where(rng.random(len(chosen)) < 0.8, labels[chosen], rng.integers(1, classes + 1, len(chosen)))
        found_labels = np.concatenate([right, rng.integers(1, classes + 1, len(found) - len(chosen))])
        scores = np.sort(rng.integers(1, 12, len(found)) / 12)[::-1]  # many equal scores
        predictions.append(prediction(found.tolist(), found_labels.tolist(), scores.tolist()))
    return predictions, targets


def evaluate(predictions: list[Item], targets: list[Item], classes: int = 4, coco: bool = True) -> dict[str, float]:
    metric = DetectionAP([f"c{i}" for i in range(1, classes + 1)], coco=coco)
    for i in range(0, len(targets), 4):
        metric.update(predictions[i : i + 4], targets[i : i + 4])
    return {name: value.item() for name, value in metric.compute().items()}


def by_pycocotools(predictions: list[Item], targets: list[Item], classes: int) -> list[float]:
    objects: list[dict[str, object]] = []
    found: list[dict[str, object]] = []
    for item in targets:
        for box, label, difficult in zip(
            item["boxes"].tolist(), item["labels"].tolist(), item["difficult"].tolist(), strict=True
        ):
            w, h = box[2] - box[0], box[3] - box[1]
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": int(item["image_id"]),
                    "category_id": label,
                    "bbox": [box[0], box[1], w, h],
                    "area": w * h,
                    "iscrowd": int(difficult),
                }
            )
    for item, truth in zip(predictions, targets, strict=True):
        for box, label, score in zip(
            item["boxes"].tolist(), item["labels"].tolist(), item["scores"].tolist(), strict=True
        ):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            found.append({"image_id": int(truth["image_id"]), "category_id": label, "bbox": bbox, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth_api = COCO()
        truth_api.dataset = {
            "info": {},
            "images": [{"id": int(item["image_id"])} for item in targets],
            "annotations": objects,
            "categories": [{"id": i, "name": str(i)} for i in range(1, classes + 1)],
        }
        truth_api.createIndex()
        evaluation = COCOeval(truth_api, truth_api.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[:9]]


@pytest.mark.parametrize("seed", range(4))
def test_coco_numbers_equal_pycocotools(seed: int) -> None:
    predictions, targets = random_split(seed)
    expected = by_pycocotools(predictions, targets, classes=4)
    got = evaluate(predictions, targets)
    np.testing.assert_allclose([got[name] for name in COCO_NAMES], expected, atol=1e-6)
    assert 0.1 < got["AP50"] < 0.99
    assert got["AR@1"] < got["AR@10"]


def test_coco_matches_again_where_voc_does_not() -> None:
    objects = target(0, [[0, 0, 100, 100], [0, 40, 100, 140]], [1, 1])
    found = prediction([[0, 0, 100, 100], [0, 19, 100, 119]], [1, 1], [0.9, 0.8])
    got = evaluate([found], [objects], classes=1)
    assert got["AP50"] == pytest.approx(1.0)
    assert got["AP50_voc07"] == pytest.approx(6 / 11)
    assert got["AP50_voc"] == pytest.approx(0.5)


def test_coco_forgives_detections_inside_a_difficult_object_and_voc_does_not() -> None:
    objects = target(0, [[0, 0, 100, 100], [200, 0, 300, 100]], [1, 1], [True, False])
    found = prediction([[0, 0, 50, 50], [200, 0, 300, 100]], [1, 1], [0.9, 0.8])
    got = evaluate([found], [objects], classes=1)
    assert got["AP50"] == pytest.approx(1.0)
    assert got["AP50_voc"] == pytest.approx(0.5)


def test_names_and_types() -> None:
    predictions, targets = random_split(0)
    metric = DetectionAP(["cat", "dog", "cow", "bus"])
    metric.update(predictions, targets)
    values = metric.compute()
    classes = [f"AP50_voc_class/{name}" for name in ("cat", "dog", "cow", "bus")]
    assert list(values) == ["AP50_voc07", "AP50_voc", *COCO_NAMES, *classes]
    assert all(value.shape == () and value.dtype == torch.float32 for value in values.values())
    known = [values[name].item() for name in classes[:3]]
    assert math.isnan(values["AP50_voc_class/bus"])
    assert values["AP50_voc"].item() == pytest.approx(np.mean(known), abs=1e-6)


def test_without_coco_only_voc_numbers_and_the_same_ones() -> None:
    predictions, targets = random_split(0)
    short, full = evaluate(predictions, targets, coco=False), evaluate(predictions, targets)
    assert set(full) - set(short) == set(COCO_NAMES)
    np.testing.assert_array_equal([short[name] for name in short], [full[name] for name in short])


def test_repeated_images_count_once() -> None:
    predictions, targets = random_split(1)
    again = [3, 0, 7]
    repeated = evaluate([*predictions, *(predictions[i] for i in again)], [*targets, *(targets[i] for i in again)])
    once = evaluate(predictions, targets)
    np.testing.assert_array_equal(list(repeated.values()), list(once.values()))


def test_order_of_images_does_not_matter() -> None:
    predictions, targets = random_split(2)
    order = np.random.default_rng(0).permutation(len(targets)).tolist()
    shuffled = evaluate([predictions[i] for i in order], [targets[i] for i in order])
    np.testing.assert_array_equal(list(shuffled.values()), list(evaluate(predictions, targets).values()))


def test_empty_image_with_a_detection_lowers_the_precision() -> None:
    good = (prediction([[0, 0, 50, 50]], [1], [0.5]), target(1, [[0, 0, 50, 50]], [1]))
    empty = (prediction([[0, 0, 50, 50]], [1], [0.9]), target(0, [], []))
    nothing = (prediction([], [], []), target(2, [], []))
    got = evaluate([good[0], empty[0], nothing[0]], [good[1], empty[1], nothing[1]], classes=1)
    assert got["AP50_voc"] == pytest.approx(0.5)
    assert got["AP50"] == pytest.approx(0.5)


def test_no_detections_is_zero() -> None:
    got = evaluate([prediction([], [], [])], [target(0, [[0, 0, 50, 50]], [1])], classes=1)
    assert [got[name] for name in ("AP50_voc07", "AP50_voc", "AP", "AP50", "AP_medium", "AR@100")] == [0.0] * 6
    assert math.isnan(got["AP_small"])


@pytest.mark.parametrize("difficult", [False, True])
def test_no_objects_to_be_found_is_nan(difficult: bool) -> None:
    truth = target(0, [[0, 0, 9, 9]], [1], [True]) if difficult else target(0, [], [])
    got = evaluate([prediction([[0, 0, 9, 9]], [1], [0.5])], [truth], classes=1)
    assert all(math.isnan(value) for value in got.values())


def test_nothing_at_all_is_nan() -> None:
    metric = DetectionAP(["cat"])
    metric.update([], [])
    assert all(math.isnan(value) for value in metric.compute().values())


def test_results_are_sorted_and_free_of_repeats() -> None:
    metric = DetectionAP(["cat", "dog"])
    first = (prediction([[0, 0, 9, 9], [1, 1, 5, 5]], [2, 1], [0.9, 0.25]), target(4, [[0, 0, 9, 9]], [2]))
    second = (prediction([[2, 2, 3, 3]], [1], [0.5]), target(1, [], []))
    for found, truth in (first, second, first):
        metric.update([found], [truth])
    metric.compute()
    results = metric.results()
    assert results["image_id"].tolist() == [1, 4, 4]
    assert results["label"].tolist() == [1, 2, 1]
    assert results["score"].tolist() == pytest.approx([0.5, 0.9, 0.25])
    assert results["box"].tolist() == [[2, 2, 3, 3], [0, 0, 9, 9], [1, 1, 5, 5]]
    assert metric.evaluated().image_id.tolist() == [1, 4]
    assert metric.evaluated().ground_truth.label.tolist() == [2]
    metric.reset()
    with pytest.raises(RuntimeError, match="compute"):
        metric.results()


def test_an_update_makes_earlier_results_stale() -> None:
    metric = DetectionAP(["cat"])
    metric.update([prediction([[0, 0, 9, 9]], [1], [0.9])], [target(0, [[0, 0, 9, 9]], [1])])
    assert metric.compute()["AP50_voc"].item() == 1.0
    metric.update([prediction([], [], [])], [target(1, [[0, 0, 9, 9]], [1])])
    with pytest.raises(RuntimeError, match="compute"):
        metric.results()
    assert metric.compute()["AP50_voc"].item() == 0.5


NAN = float("nan")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (prediction([[0, 0, 1, 1], [0, 0, 2, 2]], [1, 1], [0.5, NAN]), r"detection 1 of image 7: .*score nan \(1 bad"),
        (prediction([[0, 0, NAN, 1]], [1], [0.5]), "detection 0 of image 7"),
        (prediction([[5, 0, 4, 1]], [1], [0.5]), r"detection 0 of image 7: box \[5.0, 0.0, 4.0, 1.0\]"),
        (prediction([[0, 0, 1, 1]], [3], [0.5]), r"detection 0 of image 7: label 3; labels must be in 1\.\.2"),
        (prediction([[0, 0, 1, 1]], [0], [0.5]), "label 0"),
        (prediction([[0, 0, 1, 1]], [1, 1], [0.5]), "predictions of image 7: shapes"),
    ],
)
def test_bad_predictions_name_image_and_index(found: Item, message: str) -> None:
    metric = DetectionAP(["cat", "dog"])
    good = prediction([[0, 0, 1, 1]] * 3, [1, 1, 2], [0.9, 0.8, 0.7])
    with pytest.raises(InputError, match=message):
        metric.update([good, prediction([], [], []), found], [target(5, [], []), target(6, [], []), target(7, [], [])])


def test_bad_targets_and_unequal_batches_are_named() -> None:
    metric = DetectionAP(["cat"])
    with pytest.raises(InputError, match="object 0 of image 3: box"):
        metric.update([prediction([], [], [])], [target(3, [[4, 0, 2, 1]], [1])])
    with pytest.raises(InputError, match="predictions of 0 images for 1 targets"):
        metric.update([], [target(3, [], [])])


@pytest.mark.gpu
def test_gpu_equals_cpu(gpu: torch.device) -> None:
    predictions, targets = random_split(3)
    metric = DetectionAP([f"c{i}" for i in range(1, 5)]).to(gpu)
    predictions_there = [{name: value.to(gpu) for name, value in item.items()} for item in predictions]
    metric.update(predictions_there, [{name: value.to(gpu) for name, value in item.items()} for item in targets])
    values = metric.compute()
    assert all(value.device.type == gpu.type for value in values.values())
    np.testing.assert_array_equal(
        [value.item() for value in values.values()], list(evaluate(predictions, targets).values())
    )
