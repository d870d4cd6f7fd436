"""COCO average precision and recall on plain arrays, through the compiled evaluation of faster_coco_eval.

VOC's difficult objects are passed as COCO's crowds, the nearest thing COCO has: not to be found, and detections inside
them are forgiven. The two differ: for a crowd, overlap is measured against the detection's own area, and a crowd
absorbs any number.

torchmetrics' `MeanAveragePrecision` feeds the same package, but takes its thresholds from float32, which moves a
recall reached exactly to the next of the 101 points, evaluates anew for each class, and builds its input tensor by
tensor.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from detector.metrics.voc_ap import Detections, FloatArray, GroundTruth, IntArray, nan_mean

NAMES: Final = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR@1", "AR@10", "AR@100")
SIZES: Final = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e5**2)}
MAX_DETECTIONS: Final = (1, 10, 100)


def evaluate_coco(
    detections: Detections, ground_truth: GroundTruth, image_ids: IntArray, labels: Sequence[int]
) -> dict[str, float]:
    """Return COCO's numbers over IoU .50:.05:.95, under the names of `NAMES`, as fractions; nan where no object is.

    Args:
        detections: Detections, all in images of `image_ids`.
        ground_truth: Objects, all in images of `image_ids`; their area is that of the box.
        image_ids: (N,) the images that are evaluated, those without objects included.
        labels: The classes; those without objects are left out of every mean.
    """
    if len(image_ids) == 0 or not np.isin(ground_truth.label, labels).any():
        return dict.fromkeys(NAMES, float("nan"))
    # Here, so that VOC numbers alone do not need the package.
    from faster_coco_eval import COCO, COCOeval_faster

    # Positions instead of ids: the compiled part holds ids as floating-point numbers. Ids start at 1, because 0 means
    # "not matched".
    images = np.unique(image_ids)
    header = {
        "info": {},
        "images": [{"id": position} for position in range(1, len(images) + 1)],
        "categories": [{"id": int(label), "name": str(label)} for label in labels],
    }
    objects = _annotations(images, ground_truth.image_id, ground_truth.label, ground_truth.box)
    for entry, crowd in zip(objects, ground_truth.difficult.tolist(), strict=True):
        entry["iscrowd"] = int(crowd)
    found = _annotations(images, detections.image_id, detections.label, detections.box)
    for entry, score in zip(found, detections.score.tolist(), strict=True):
        entry["score"] = score
    evaluation = COCOeval_faster(
        COCO({**header, "annotations": objects}), COCO({**header, "annotations": found}), iouType="bbox"
    )
    evaluation.params.maxDets = list(MAX_DETECTIONS)
    evaluation.evaluate()
    evaluation.accumulate()
    return _summary(np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"]))


def _annotations(images: IntArray, image_id: IntArray, label: IntArray, box: FloatArray) -> list[dict[str, object]]:
    corner = box[:, :2].astype(np.float64)
    side = box[:, 2:].astype(np.float64) - corner
    columns = zip(
        (np.searchsorted(images, image_id) + 1).tolist(),
        label.tolist(),
        np.hstack([corner, side]).tolist(),
        side.prod(axis=1).tolist(),
        strict=True,
    )
    return [
        {"id": index, "image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": 0}
        for index, (image, category, bbox, area) in enumerate(columns, start=1)
    ]


def _summary(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> dict[str, float]:
    """Take means of precision (10 IoUs, 101 recalls, classes, 4 sizes, 3 limits) and recall (without the 101).

    Both are -1 where there is no object.
    """
    at_100 = precision[..., -1]
    values = [
        at_100[:, :, :, 0],
        at_100[0, :, :, 0],
        at_100[5, :, :, 0],
        *(at_100[:, :, :, size] for size in (1, 2, 3)),
        *(recall[:, :, 0, limit] for limit in (0, 1, 2)),
    ]
    return {name: nan_mean(value[value > -1]) for name, value in zip(NAMES, values, strict=True)}
