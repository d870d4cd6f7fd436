"""Which detections COCO's evaluation counts as right, for every IoU threshold and size.

`coco_ap.py` gets COCO's numbers from a compiled package that does not tell how single detections were judged. That is
what resampling images needs, because COCO matches image by image: with it, a resample costs a sum and no matching.

Source of the rules: the reference implementation (`pycocotools.cocoeval`). In an image, the 100 best scored detections
of a class are taken by descending score. Each takes the object that it overlaps most (the last of equals) among those
not taken that reach the threshold; an ignored object (a crowd, or of another size) only where no other is left, and a
crowd any number of times. A detection is left out if its object is ignored, or if it has none and is itself of
another size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from detector.metrics.coco_ap import MAX_DETECTIONS, SIZES
from detector.metrics.voc_ap import (
    FALSE_POSITIVE,
    IGNORED,
    TRUE_POSITIVE,
    BoolArray,
    Detections,
    FlagArray,
    GroundTruth,
    IntArray,
)

IOU_THRESHOLDS: Final = np.linspace(0.5, 0.95, 10)
AREAS: Final = {"": (0.0, 1e5**2), **{f"_{size}": area for size, area in SIZES.items()}}


@dataclass(frozen=True, eq=False)
class ClassMatches:
    """How COCO judges the detections of one class.

    Attributes:
        label: The class.
        image: (D,) position of each detection's image, best score first.
        flags: (4, 10, D) `TRUE_POSITIVE`, `FALSE_POSITIVE` or `IGNORED` by size (of `AREAS`) and IoU threshold.
        objects: (4, N) number of objects to be found in each image, by size.
    """

    label: int
    image: IntArray
    flags: FlagArray
    objects: IntArray


def match_coco(
    detections: Detections, ground_truth: GroundTruth, image_ids: IntArray, labels: Sequence[int]
) -> Iterator[ClassMatches]:
    """Match the detections of each class; all are in images of `image_ids` (N,), which ascend.

    Difficult objects are crowds, as in `evaluate_coco`.
    """
    for label in labels:
        mine = _best_of_each_image(detections, np.flatnonzero(detections.label == label))
        theirs = np.flatnonzero(ground_truth.label == label)
        theirs = theirs[np.argsort(ground_truth.image_id[theirs], kind="stable")]
        image = np.searchsorted(image_ids, detections.image_id[mine])
        object_image = np.searchsorted(image_ids, ground_truth.image_id[theirs])
        box, object_box = detections.box[mine].astype(np.float64), ground_truth.box[theirs].astype(np.float64)
        crowd = ground_truth.difficult[theirs]
        ignored = crowd | _outside(object_box)
        matched = np.zeros((len(AREAS), len(IOU_THRESHOLDS), len(mine)), dtype=np.bool_)
        flags = np.where(_outside(box)[:, None], IGNORED, FALSE_POSITIVE).repeat(len(IOU_THRESHOLDS), 1)
        flags = flags.astype(np.int8)
        first, last = (np.searchsorted(image, object_image, side=side) for side in ("left", "right"))
        changes = np.flatnonzero(np.diff(object_image, prepend=-1))
        for start, stop in zip(changes, [*changes[1:], len(theirs)][: len(changes)], strict=True):
            found = slice(first[start], last[start])
            if found.start < found.stop:
                objects = slice(start, stop)
                iou = _iou(box[found], object_box[objects], crowd[objects])
                matched[..., found], to_ignored = _match(iou, crowd[objects], ignored[:, objects])
                flags[..., found] = np.where(matched[..., found], np.where(to_ignored, IGNORED, TRUE_POSITIVE),
                                             flags[..., found])  # fmt: skip
        by_score = np.lexsort((image, -detections.score[mine]))
        number = [np.bincount(object_image[~row], minlength=len(image_ids)) for row in ignored]
        yield ClassMatches(label, image[by_score], flags[..., by_score], np.stack(number))


def _best_of_each_image(detections: Detections, mine: IntArray) -> IntArray:
    """Sort by image, then descending score, then the order given, and keep the best 100 of each image."""
    mine = mine[np.lexsort((-detections.score[mine], detections.image_id[mine]))]
    image = detections.image_id[mine]
    rank = np.arange(len(mine)) - np.searchsorted(image, image, side="left")
    kept: IntArray = mine[rank < MAX_DETECTIONS[-1]]
    return kept


def _outside(box: NDArray[np.float64]) -> BoolArray:
    """Return whether the area of each box (n, 4) is outside each of `AREAS`: (4, n)."""
    area = (box[:, 2:] - box[:, :2]).prod(axis=1)
    outside: BoolArray = np.stack([(area < low) | (area > high) for low, high in AREAS.values()])
    return outside


def _iou(boxes: NDArray[np.float64], objects: NDArray[np.float64], crowd: BoolArray) -> NDArray[np.float64]:
    """Return the IoU (D, G); with a crowd, the share of the detection that is inside it."""
    sides = np.minimum(boxes[:, None, 2:], objects[:, 2:]) - np.maximum(boxes[:, None, :2], objects[:, :2])
    intersection = np.maximum(sides, 0.0).prod(axis=2)
    area, object_area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), (objects[:, 2:] - objects[:, :2]).prod(axis=1)
    union = np.where(crowd, area[:, None], area[:, None] + object_area - intersection)
    iou: NDArray[np.float64] = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return iou


def _match(iou: NDArray[np.float64], crowd: BoolArray, ignored: BoolArray) -> tuple[BoolArray, BoolArray]:
    """Match the detections of an image, best score first, from IoU (D, G), crowd (G,) and ignored (4, G) by size.

    Returns:
        Whether each detection has an object, and whether that is ignored, both (4, 10, D).
    """
    sizes, number = len(ignored), iou.shape[1]
    matched = np.zeros((sizes, len(IOU_THRESHOLDS), len(iou)), dtype=np.bool_)
    to_ignored = np.zeros_like(matched)
    taken = np.zeros((sizes, len(IOU_THRESHOLDS), number), dtype=np.bool_)
    size, threshold = np.ogrid[:sizes, : len(IOU_THRESHOLDS)]
    for index in np.flatnonzero(iou.max(axis=1) >= IOU_THRESHOLDS[0]):
        free = (~taken | crowd) & (iou[index] >= IOU_THRESHOLDS[:, None])
        regular = free & ~ignored[:, None, :]
        free = np.where(regular.any(axis=2, keepdims=True), regular, free)
        best = number - 1 - np.where(free, iou[index], -1.0)[..., ::-1].argmax(axis=2)
        hit = free.any(axis=2)
        matched[..., index] = hit
        to_ignored[..., index] = hit & ignored[size, best]
        taken[size, threshold, best] |= hit
    return matched, to_ignored
