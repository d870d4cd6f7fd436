"""What is missing from a perfect AP50: six kinds of errors, and what AP would be without each.

Source: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors" (ECCV 2020), section 2, on top
of VOC's matching (`voc_ap.py`) and its area under the curve. With `own` the highest IoU of a false positive with an
object of its class and `other` that with an object of another class, both in its image, it is the first of

- localisation: 0.1 <= own < 0.5;
- classification: other >= 0.5;
- duplicate: own >= 0.5 (the object has been found by a better scored detection);
- both: 0.1 <= other < 0.5, the wrong class in the wrong place;
- background: all else.

An object is missed if no detection finds it and no localisation or classification error points at it.

Each kind is corrected alone. A localisation or classification error becomes a true positive of the object it points at;
if the object has been found already, or a better scored error of the kind points at it, the detection is removed
instead. Duplicates, both and background are removed. Missed objects are no longer to be found.

Difficult objects count as objects when a false positive is put into its kind (half of a difficult object is not
background), but nothing is gained by finding one, and none is missed: an error that points at one is removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from detector.errors import InputError
from detector.metrics.voc_ap import (
    FALSE_POSITIVE,
    IGNORED,
    TRUE_POSITIVE,
    Assignment,
    BoolArray,
    Detections,
    FlagArray,
    FloatArray,
    GroundTruth,
    IntArray,
    VOCResult,
    assign,
    canonical_order,
    class_aps,
    evaluate_voc,
    nan_mean,
)

KINDS: Final = ("classification", "localisation", "both", "duplicate", "background", "missed")


@dataclass(frozen=True, eq=False)
class ErrorBreakdown:
    """The errors of C classes, by the names of `KINDS`.

    Attributes:
        ap: (C,) area under the curve at the IoU threshold, nan for a class without objects.
        gain: By kind (C,): what correcting the errors of this kind alone adds to `ap`.
        count: By kind (C,): number of detections of the class, or of its objects for "missed".
        kind: (D,) index into `KINDS` of each detection, -1 for those that are no error.
        missed: (G,) whether each object is missed.
        target: (D,) the object that a true positive finds, or a localisation, classification or duplicate error points
            at; -1 for all other detections.
        matched: The matching that the kinds are built on.
    """

    ap: NDArray[np.float64]
    gain: dict[str, NDArray[np.float64]]
    count: dict[str, IntArray]
    kind: FlagArray
    missed: BoolArray
    target: IntArray
    matched: VOCResult

    def mean_gain(self) -> dict[str, float]:
        """Return by kind the gain in mean AP over the classes that have objects; nan if none has."""
        return {kind: nan_mean(self.gain[kind]) for kind in KINDS}


def break_down_errors(
    detections: Detections,
    ground_truth: GroundTruth,
    labels: Sequence[int],
    iou_threshold: float = 0.5,
    background_iou: float = 0.1,
) -> ErrorBreakdown:
    """Sort the errors of a detector on C classes into kinds; see the top of the module. Other classes are left out.

    An object is found from `iou_threshold` on, and touched at all from `background_iou` on.

    Raises:
        InputError: Not 0 < background_iou < iou_threshold <= 1.
    """
    if not 0 < background_iou < iou_threshold <= 1:
        raise InputError(
            f"background_iou {background_iou}, iou_threshold {iou_threshold}: they must rise, between 0 and 1"
        )
    result = evaluate_voc(detections, ground_truth, labels, iou_threshold)
    other = nearest_of_other_class(detections, ground_truth, labels)
    is_error = np.isin(detections.label, labels) & (result.flags == FALSE_POSITIVE)
    kind = _kinds(is_error, result.assignment.best_iou, other.best_iou, iou_threshold, background_iou)
    target = np.where(kind == KINDS.index("classification"), other.best_object, result.assignment.best_object)
    found = np.zeros(len(ground_truth), dtype=np.bool_)
    is_true = result.flags == TRUE_POSITIVE
    found[target[is_true]] = True
    pointing = np.isin(kind, [KINDS.index("classification"), KINDS.index("localisation")])
    missed = ~found & ~ground_truth.difficult & np.isin(ground_truth.label, labels)
    missed[target[pointing]] = False
    numbers = [int((~ground_truth.difficult & (ground_truth.label == label)).sum()) for label in labels]
    missed_numbers = [int(missed[ground_truth.label == label].sum()) for label in labels]
    ap = np.array([one.ap_area for one in result.per_class])
    gain, count = {}, {}
    for index, name in enumerate(KINDS[:-1]):
        mine = kind == index
        flags, label = np.where(mine, IGNORED, result.flags).astype(np.int8), detections.label
        if name in ("classification", "localisation"):
            corrected = first_to_each(detections, np.flatnonzero(mine), target, found | ground_truth.difficult)
            flags[corrected] = TRUE_POSITIVE
            label = label.copy()
            label[corrected] = ground_truth.label[target[corrected]]
        gain[name] = _areas(replace(detections, label=label), flags, labels, numbers) - ap
        count[name] = np.array([int((mine & (detections.label == label)).sum()) for label in labels])
    remaining = [number - lost for number, lost in zip(numbers, missed_numbers, strict=True)]
    after = _areas(detections, result.flags, labels, remaining)
    # With no object left to find, whatever there was to find is found.
    gain["missed"] = np.where(np.isnan(after) & ~np.isnan(ap), 1.0, after) - ap
    count["missed"] = np.array(missed_numbers)
    points = is_true | pointing | (kind == KINDS.index("duplicate"))
    return ErrorBreakdown(ap, gain, count, kind, missed, np.where(points, target, -1), result)


def nearest_of_other_class(detections: Detections, ground_truth: GroundTruth, labels: Sequence[int]) -> Assignment:
    """Find for each detection the object of another class in its image with the highest IoU."""
    best_object = np.full(len(detections), -1, dtype=np.int64)
    best_iou = np.full(len(detections), -1.0)
    for label in labels:
        mine = np.flatnonzero(detections.label == label)
        others = np.flatnonzero((ground_truth.label != label) & np.isin(ground_truth.label, labels))
        # One class for all, so that `assign` looks at every object of the image.
        nearest = assign(
            replace(detections.take(mine), label=np.zeros_like(mine)),
            replace(ground_truth.take(others), label=np.zeros_like(others)),
        )
        hit = nearest.best_object >= 0
        best_object[mine[hit]] = others[nearest.best_object[hit]]
        best_iou[mine] = nearest.best_iou
    return Assignment(best_object, best_iou)


def _kinds(
    is_error: BoolArray, own: FloatArray, other: FloatArray, iou_threshold: float, background_iou: float
) -> FlagArray:
    conditions = {
        "localisation": (own >= background_iou) & (own < iou_threshold),
        "classification": other >= iou_threshold,
        "duplicate": own >= iou_threshold,
        "both": other >= background_iou,
        "background": np.ones_like(is_error),
    }
    indices = [KINDS.index(name) for name in conditions]
    kinds: FlagArray = np.where(is_error, np.select(list(conditions.values()), indices), -1).astype(np.int8)
    return kinds


def costs_of_mistakes(result: VOCResult, ground_truth: GroundTruth) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what each detection (D,) and each object (G,) costs in mean AP, so that AP can be traced to images.

    Without the envelope, AP is the mean over a class's objects of the precision at which each is found, 0 if it is not.
    An object found at rank r behind f false positives lacks f/r, of which each of these false positives costs 1/r; an
    object that is not found costs 1. Divided by the number of the class's objects and by the number of classes that
    have any, all costs add up to 1 less the mean AP. Right detections and difficult objects cost nothing.
    """
    cost, object_cost = np.zeros(len(result.flags)), np.zeros(len(ground_truth))
    found = np.zeros(len(ground_truth), dtype=np.bool_)
    found[result.assignment.best_object[result.flags == TRUE_POSITIVE]] = True
    classes = [one for one in result.per_class if one.npos]
    for one in classes:
        share = 1 / (one.npos * len(classes))
        counted = one.order[one.flags != IGNORED]
        is_true = result.flags[counted] == TRUE_POSITIVE
        to_come = np.cumsum((is_true / np.arange(1, len(counted) + 1))[::-1])[::-1]
        cost[counted] = np.where(is_true, 0.0, to_come * share)
        object_cost[(ground_truth.label == one.label) & ~ground_truth.difficult & ~found] = share
    return cost, object_cost


def first_to_each(detections: Detections, errors: IntArray, target: IntArray, closed: BoolArray) -> IntArray:
    """Return the best scored of the detections `errors` for each object that is not closed."""
    errors = errors[~closed[target[errors]]]
    errors = errors[np.lexsort((detections.image_id[errors], -detections.score[errors]))]
    _, first = np.unique(target[errors], return_index=True)
    best: IntArray = errors[first]
    return best


def _areas(
    detections: Detections, flags: FlagArray, labels: Sequence[int], numbers: Sequence[int]
) -> NDArray[np.float64]:
    """Return the area under the curve (C,) of each class, for given flags and numbers of objects."""
    results = class_aps(detections, canonical_order(detections), flags, labels, numbers)
    return np.array([result.ap_area for result in results])
