"""Evaluation of some classes alone: detections and objects of the others are left out, as if they did not exist."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from detector.errors import InputError
from detector.metrics.voc_ap import Detections, GroundTruth

Labelled = TypeVar("Labelled", Detections, GroundTruth)


def chosen_classes(chosen: Sequence[str], class_names: Sequence[str]) -> tuple[str, ...]:
    """Return the chosen classes in the order of all, each once.

    Raises:
        InputError: There is none, or one that is unknown.
    """
    unknown = [name for name in chosen if name not in class_names]
    if unknown or not chosen:
        what = f"{unknown[0]} is no class" if unknown else "names no class"
        raise InputError(f"classes [{', '.join(chosen)}]: {what}; there are {', '.join(class_names)}")
    return tuple(name for name in class_names if name in chosen)


def of_classes(items: Labelled, class_names: Sequence[str], chosen: Sequence[str]) -> Labelled:
    """Return the detections or objects of the chosen classes, labelled 1, 2, ... in the order of `chosen`."""
    new_label: dict[str, int] = {name: label for label, name in enumerate(chosen, start=1)}
    label = np.array([0, *(new_label.get(name, 0) for name in class_names)], dtype=np.int64)[items.label]
    return replace(items.take(label > 0), label=label[label > 0])
