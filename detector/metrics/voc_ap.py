"""PASCAL VOC average precision on plain arrays.

Shape legend: `D` detections, `G` ground-truth objects, `P` pairs of a detection and an object of its class and image.
Boxes are xyxy in continuous pixels, so plain IoU equals the "+1" IoU of the devkit on its inclusive integer boxes.

Source of the rules: the PASCAL VOC development kit, `VOCevaldet.m` for the matching, `VOCap.m` for the curve (11 points
up to VOC2009, area from VOC2010 on):

- the detections of a class are taken by descending score; equal scores are taken by image id, then in the order given;
- a detection looks only at the object of its class in its image that it overlaps most (the first of equals);
- IoU below the threshold: false positive. Else, object difficult: the detection is ignored. Else, object not yet
  found: true positive. Else: false positive (duplicate). A duplicate is never matched to another object instead,
  unlike in COCO;
- difficult objects do not count as objects to be found. There is no limit on detections.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from detector.errors import InputError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]
FlagArray = NDArray[np.int8]

TRUE_POSITIVE: Final = 1
FALSE_POSITIVE: Final = 0
IGNORED: Final = -1

# IoUs are computed for so many pairs at once, which bounds the memory on crowded images (about 0.1 GB)
_PAIRS_PER_CHUNK: Final = 1 << 20


class _Rows:
    """Columns of equal length, checked.

    Raises:
        InputError: Unequal lengths, a score that is not finite, or a box that is not finite or has a negative side.
    """

    image_id: IntArray
    what: ClassVar[str]

    def __post_init__(self) -> None:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        for name, column in columns.items():
            expected = (len(self), 4) if name == "box" else (len(self),)
            if column.shape != expected:
                text = f"{name} has shape {column.shape}; {len(self)} image ids need {expected}"
                raise InputError(f"{self.what}: {text}")
        box, score = columns["box"], columns.get("score", np.zeros(0))
        for bad, fault in (
            (~np.isfinite(score), "a score that is not finite"),
            (~np.isfinite(box).all(axis=-1), "a coordinate that is not finite"),
            ((box[:, 2:] < box[:, :2]).any(axis=1), "a box of negative size (boxes are x1, y1, x2, y2)"),
        ):
            if bad.any():
                rows = f"{bad.sum()} of {bad.size} rows do"
                raise InputError(f"{self.what}: row {bad.argmax()} has {fault}; {rows}")

    def __len__(self) -> int:
        return len(self.image_id)

    def take(self, rows: NDArray[Any]) -> Self:
        """Return the entries of some rows, given as indices or as a mask."""
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Detections(_Rows):
    """Detections of a whole split as flat arrays, in any order.

    Attributes:
        image_id: (D,) integers.
        label: (D,) integers, not negative.
        score: (D,) finite.
        box: (D, 4) xyxy in pixels, finite, `x2 >= x1` and `y2 >= y1`.
    """

    what = "detections"

    image_id: IntArray
    label: IntArray
    score: FloatArray
    box: FloatArray


@dataclass(frozen=True, eq=False)
class GroundTruth(_Rows):
    """Objects of a whole split as flat arrays, in any order.

    Attributes:
        image_id: (G,) integers.
        label: (G,) integers, not negative.
        box: (G, 4) xyxy in pixels, finite, `x2 >= x1` and `y2 >= y1`.
        difficult: (G,) bool.
    """

    what = "ground truth"

    image_id: IntArray
    label: IntArray
    box: FloatArray
    difficult: BoolArray


@dataclass(frozen=True, eq=False)
class Assignment:
    """The object that each detection looks at; one assignment serves every IoU threshold.

    Attributes:
        best_object: (D,) index into the ground truth of the object of the same class and image with the highest IoU,
            the first of equals; -1 where the image has no object of the class.
        best_iou: (D,) that IoU; -1 where there is no object.
    """

    best_object: IntArray
    best_iou: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ClassAP:
    """Average precision of one class.

    Attributes:
        label: The class.
        npos: Number of objects that are not difficult.
        ap_voc07: 11-point average precision; nan if `npos` is 0.
        ap_area: Area under the precision envelope; nan if `npos` is 0.
        order: (N,) indices into the detections of all of this class, ignored ones included, best score first.
        flags: (N,) `TRUE_POSITIVE`, `FALSE_POSITIVE` or `IGNORED`, parallel to `order`.
        precision, recall, scores: (M,) one point of the curve for each detection that is not ignored, best score
            first. Recall is nan if `npos` is 0.
    """

    label: int
    npos: int
    ap_voc07: float
    ap_area: float
    order: IntArray
    flags: FlagArray
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    scores: FloatArray


@dataclass(frozen=True, eq=False)
class VOCResult:
    """Average precision of all classes at one IoU threshold.

    Attributes:
        per_class: One entry per label, in the order asked for.
        flags: (D,) `TRUE_POSITIVE`, `FALSE_POSITIVE` or `IGNORED`, in the order of the detections.
        assignment: The object that each detection looks at.
    """

    per_class: tuple[ClassAP, ...]
    flags: FlagArray
    assignment: Assignment

    @property
    def ap_voc07(self) -> float:
        """Return the mean 11-point average precision over the classes that have objects; nan if none has."""
        return nan_mean([result.ap_voc07 for result in self.per_class])

    @property
    def ap_area(self) -> float:
        """Return the mean area under the curve over the classes that have objects; nan if none has."""
        return nan_mean([result.ap_area for result in self.per_class])


def evaluate_voc(
    detections: Detections,
    ground_truth: GroundTruth,
    labels: Sequence[int],
    iou_threshold: float = 0.5,
    assignment: Assignment | None = None,
) -> VOCResult:
    """Evaluate detections of some classes by the rules of the VOC devkit (see the top of the module).

    `assignment` is what `assign` returned for the same arguments, to evaluate several thresholds at the cost of one.

    Raises:
        InputError: `iou_threshold` outside (0, 1].
    """
    if not 0 < iou_threshold <= 1:
        raise InputError(f"iou_threshold is {iou_threshold}; it must be above 0 and at most 1")
    assignment = assign(detections, ground_truth) if assignment is None else assignment
    order = canonical_order(detections)
    flags = judge(ground_truth, assignment, order, iou_threshold)
    counted_label = ground_truth.label[~ground_truth.difficult]
    npos = [int((counted_label == label).sum()) for label in labels]
    return VOCResult(class_aps(detections, order, flags, labels, npos), flags, assignment)


def class_aps(
    detections: Detections, order: IntArray, flags: FlagArray, labels: Sequence[int], npos: Sequence[int]
) -> tuple[ClassAP, ...]:
    """Return the average precision of each class, of which `npos` objects are to be found.

    `order` (D,) is the `canonical_order` of the detections, `flags` (D,) how they are judged, in their own order.
    """
    first, last = (np.searchsorted(detections.label[order], list(labels), side=side) for side in ("left", "right"))
    results = []
    for label, number, start, stop in zip(labels, npos, first.tolist(), last.tolist(), strict=True):
        mine = order[start:stop]
        counted = mine[flags[mine] != IGNORED]
        is_true = flags[counted] == TRUE_POSITIVE
        found = np.cumsum(is_true)
        precision = found / np.arange(1, len(is_true) + 1)
        recall = found / number if number else np.full(len(is_true), np.nan)
        aps = average_precisions(is_true, number)
        results.append(ClassAP(label, number, *aps, mine, flags[mine], precision, recall, detections.score[counted]))
    return tuple(results)


def canonical_order(detections: Detections) -> IntArray:
    """Return the indices (D,) that sort by class, then descending score, then image id, then the order given.

    Equal scores therefore fall in the same order however the images were divided among processes.
    """
    order: IntArray = np.lexsort((detections.image_id, -detections.score, detections.label))
    return order


def assign(detections: Detections, ground_truth: GroundTruth) -> Assignment:
    """Find for each detection the object of its class in its image with the highest IoU, the first of equals."""
    best_object = np.full(len(detections), -1, dtype=np.int64)
    best_iou = np.full(len(detections), -1.0)
    detection_key, object_key = _group_keys(detections, ground_truth)
    by_key = np.argsort(object_key, kind="stable")
    sorted_key = object_key[by_key]
    first = np.searchsorted(sorted_key, detection_key, side="left")
    count = np.searchsorted(sorted_key, detection_key, side="right") - first
    paired = np.flatnonzero(count)
    for chunk in _chunks(paired, count):
        number = count[chunk]
        starts = np.cumsum(number) - number
        detection = np.repeat(chunk, number)
        target = by_key[np.arange(len(detection)) + np.repeat(first[chunk] - starts, number)]
        iou = pairwise_iou(detections.box[detection], ground_truth.box[target])
        highest = np.maximum.reduceat(iou, starts)
        at_highest = np.flatnonzero(iou == np.repeat(highest, number))
        _, first_at_highest = np.unique(detection[at_highest], return_index=True)
        best_object[chunk] = target[at_highest[first_at_highest]]
        best_iou[chunk] = highest
    return Assignment(best_object, best_iou)


def judge(ground_truth: GroundTruth, assignment: Assignment, order: IntArray, iou_threshold: float) -> FlagArray:
    """Flag each detection (D,), in the order of the detections; `order` says who comes first to an object."""
    flags = np.full(len(order), FALSE_POSITIVE, dtype=np.int8)
    overlapping = order[assignment.best_iou[order] >= iou_threshold]
    target = assignment.best_object[overlapping]
    difficult = ground_truth.difficult[target]
    flags[overlapping[difficult]] = IGNORED
    overlapping, target = overlapping[~difficult], target[~difficult]
    _, first_of_object = np.unique(target, return_index=True)
    flags[overlapping[first_of_object]] = TRUE_POSITIVE
    return flags


def average_precisions(is_true: BoolArray, npos: int) -> tuple[float, float]:
    """Return the 11-point average precision and the area under the precision envelope of one class.

    Args:
        is_true: (M,) whether each detection is a true positive, best score first, without the ignored ones.
        npos: Number of objects to be found.

    Returns:
        Both as fractions; nan if `npos` is 0.
    """
    if npos == 0:
        return float("nan"), float("nan")
    found = np.cumsum(is_true)
    precision = found / np.arange(1, len(is_true) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # The detection at which recall reaches k/10, compared in integers: found * 10 >= k * npos. A recall of 0.3 that
    # was reached exactly would be lost to rounding otherwise.
    needed = -(-np.arange(11) * npos // 10)
    reached = np.searchsorted(found, needed, side="left")
    eleven_points = np.append(envelope, 0.0)[reached]
    # Recall grows by 1/npos at each true positive and nowhere else.
    return float(eleven_points.sum() / 11), float(envelope[is_true].sum() / npos)


def pairwise_iou(boxes: FloatArray, others: FloatArray) -> NDArray[np.float64]:
    """Return the IoU (P,) of row i of `boxes` (P, 4) with row i of `others` (P, 4) in float64; 0 of empty boxes."""
    a, b = boxes.astype(np.float64), others.astype(np.float64)
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    intersection = np.maximum(sides, 0.0).prod(axis=1)
    union = (a[:, 2:] - a[:, :2]).prod(axis=1) + (b[:, 2:] - b[:, :2]).prod(axis=1) - intersection
    iou: NDArray[np.float64] = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return iou


def nan_mean(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Return the mean of the values that are not nan; nan, without a warning, if there are none."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")


def _group_keys(detections: Detections, ground_truth: GroundTruth) -> tuple[IntArray, IntArray]:
    """Return one integer per (image, class) of each detection and object; -1 of detections in images without any."""
    images = np.unique(ground_truth.image_id)
    if len(images) == 0:
        return np.full(len(detections), -1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    classes = 1 + max(int(ground_truth.label.max()), int(detections.label.max(initial=0)))
    position = np.minimum(np.searchsorted(images, detections.image_id), len(images) - 1)
    known = images[position] == detections.image_id
    detection_key = np.where(known, position * classes + detections.label, -1)
    return detection_key, np.searchsorted(images, ground_truth.image_id) * classes + ground_truth.label


def _chunks(paired: IntArray, count: IntArray) -> Iterator[IntArray]:
    """Split the detections that have pairs into runs of about `_PAIRS_PER_CHUNK` pairs."""
    if len(paired) == 0:
        return
    chunk = np.cumsum(count[paired]) // _PAIRS_PER_CHUNK
    yield from np.split(paired, np.flatnonzero(np.diff(chunk)) + 1)
