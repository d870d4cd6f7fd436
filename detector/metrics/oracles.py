"""What a part of a detector costs: its detections, had they the right labels or the right boxes.

Each oracle corrects one thing and leaves the rest: scores are never changed, NMS does not run again, and the detector's
own duplicates stay what they are. The practice is that of Bolya et al., "TIDE: A General Toolbox for Identifying Object
Detection Errors" (ECCV 2020), section 2, whose corrections these are, on top of VOC's matching (`voc_ap.py`); the idea
is that of Hoiem et al., "Diagnosing Error in Object Detectors" (ECCV 2012), section 2.

An object is found if the detector itself has a true positive of it at IoU 0.5. A detection that is corrected would
often be one more of an object that is found: it is removed instead, and so is one that points at a difficult object.
Of several that could be corrected to one object, the best scored is, and the others are removed. Hence neither oracle
lowers a class's AP50, by 11 points or by area: a correction takes away false positives and adds true ones. COCO's AP
over higher IoUs may fall by `right_labels`, because a box that is good enough for IoU 0.5 may be none for 0.9.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from detector.metrics.error_breakdown import first_to_each, nearest_of_other_class
from detector.metrics.voc_ap import TRUE_POSITIVE, BoolArray, Detections, GroundTruth, IntArray, VOCResult, evaluate_voc

FOUND_IOU = 0.5
TOUCHED_IOU = 0.1


def right_labels(detections: Detections, ground_truth: GroundTruth, labels: Sequence[int]) -> Detections:
    """Return the detections with the label of the object that each lies on.

    A detection with IoU 0.5 or more with an object of its own class, difficult or not, has the right label. Any other
    that has it with objects of other classes gets the label of the one with the highest IoU, or is removed; see the
    top of the module.

    Args:
        detections: Of the classes `labels`.
        ground_truth: Likewise.
        labels: Of all classes.
    """
    result = evaluate_voc(detections, ground_truth, labels, FOUND_IOU)
    other = nearest_of_other_class(detections, ground_truth, labels)
    wrong = (result.assignment.best_iou < FOUND_IOU) & (other.best_iou >= FOUND_IOU)
    corrected = _corrected(detections, ground_truth, result, wrong, other.best_object)
    label = detections.label.copy()
    label[corrected] = ground_truth.label[other.best_object[corrected]]
    return _without(replace(detections, label=label), wrong, corrected)


def right_boxes(detections: Detections, ground_truth: GroundTruth, labels: Sequence[int]) -> Detections:
    """Return the detections with the box of the object of their class that each lies on, or near.

    A detection whose highest IoU with an object of its class, difficult or not, is 0.5 or more gets exactly its box.
    From 0.1 up to 0.5 it gets the box, too, or is removed; see the top of the module. Below 0.1 it stays what it is.

    Args:
        detections: Of the classes `labels`.
        ground_truth: Likewise.
        labels: Of all classes.
    """
    result = evaluate_voc(detections, ground_truth, labels, FOUND_IOU)
    iou, target = result.assignment.best_iou, result.assignment.best_object
    wrong = (iou >= TOUCHED_IOU) & (iou < FOUND_IOU)
    corrected = _corrected(detections, ground_truth, result, wrong, target)
    box, near = detections.box.copy(), iou >= TOUCHED_IOU
    box[near] = ground_truth.box[target[near]]
    return _without(replace(detections, box=box), wrong, corrected)


def _corrected(
    detections: Detections, ground_truth: GroundTruth, result: VOCResult, wrong: BoolArray, target: IntArray
) -> IntArray:
    """Return the indices of the wrong detections that become true positives of their targets."""
    closed = ground_truth.difficult.copy()
    closed[result.assignment.best_object[result.flags == TRUE_POSITIVE]] = True
    return first_to_each(detections, np.flatnonzero(wrong), target, closed)


def _without(detections: Detections, wrong: BoolArray, corrected: IntArray) -> Detections:
    kept = ~wrong
    kept[corrected] = True
    return detections.take(kept)
