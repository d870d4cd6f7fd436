"""Evaluation of some classes alone: detections and objects of the others are left out, as if they did not exist."""

from collections.abc import Sequence

import numpy as np

from detector.errors import InputError
from detector.metrics.voc_ap import Detections, GroundTruth, IntArray


def check_classes(chosen: Sequence[str], class_names: Sequence[str]) -> None:
    """Raise InputError unless `chosen` holds at least one class and known ones alone."""
    unknown = [name for name in chosen if name not in class_names]
    if unknown or not chosen:
        what = f"{unknown[0]} is no class" if unknown else "names no class"
        raise InputError(f"--classes [{', '.join(chosen)}]: {what}; there are {', '.join(class_names)}")


def in_order(chosen: Sequence[str], class_names: Sequence[str]) -> tuple[str, ...]:
    """Return the chosen classes in the order of all, each once."""
    return tuple(name for name in class_names if name in chosen)


def detections_of(detections: Detections, class_names: Sequence[str], chosen: Sequence[str]) -> Detections:
    """Return the detections of the chosen classes, labelled 1, 2, ... in the order of `chosen`."""
    label = _new_labels(class_names, chosen)[detections.label]
    rows = label > 0
    return Detections(detections.image_id[rows], label[rows], detections.score[rows], detections.box[rows])


def objects_of(objects: GroundTruth, class_names: Sequence[str], chosen: Sequence[str]) -> GroundTruth:
    """Return the objects of the chosen classes, labelled 1, 2, ... in the order of `chosen`."""
    label = _new_labels(class_names, chosen)[objects.label]
    rows = label > 0
    return GroundTruth(objects.image_id[rows], label[rows], objects.box[rows], objects.difficult[rows])


def _new_labels(class_names: Sequence[str], chosen: Sequence[str]) -> IntArray:
    """By old label, (C + 1,): the new one, or 0."""
    labels = {name: label for label, name in enumerate(chosen, start=1)}
    return np.array([0, *(labels.get(name, 0) for name in class_names)], dtype=np.int64)
