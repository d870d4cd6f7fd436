"""What is wrong on an image: missed objects and each kind of wrong detection, in a picture."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from torch import Tensor

from detector.metrics.error_breakdown import KINDS, ErrorBreakdown
from detector.metrics.voc_ap import BoolArray, Detections, GroundTruth
from detector.training.callbacks.validation_pictures import DIFFICULT, Outline, sketch
from detector.use.drawing import GROUND_TRUTH_COLOR, LegendEntry

RIGHT: Final = LegendEntry("right", (0, 210, 120))
LOOKS: Final = {
    "classification": LegendEntry("wrong class", (255, 150, 0)),
    "localisation": LegendEntry("badly placed", (255, 240, 60)),
    "both": LegendEntry("wrong class and place", (60, 120, 255)),
    "duplicate": LegendEntry("duplicate", (110, 215, 255)),
    "background": LegendEntry("background", (255, 60, 40)),
    "missed": LegendEntry("missed", (235, 110, 235)),
}
"""How the kinds of the error breakdown look and are called in pictures."""
_FOUND: Final = LegendEntry("object", GROUND_TRUTH_COLOR, thin=True)


def draw_mistakes(
    image: Tensor,
    detections: Detections,
    objects: GroundTruth,
    errors: ErrorBreakdown,
    shown: BoolArray,
    class_names: Sequence[str],
    title: str = "",
) -> Tensor:
    """Return a picture (3, H', W') of an image with its objects and the detections `shown` (D,), coloured by kind.

    The legend counts what is drawn; a detection that is no error, also one of a difficult object, counts as right.

    Args:
        image: Its pixels, (3, H, W) uint8.
        detections: Those of the image, D.
        objects: Those of the image, G.
        errors: What `break_down_errors` says of these.
        shown: Which detections to draw.
        class_names: Of labels 1..C.
        title: A text above the legend.
    """
    names = [class_names[label - 1] for label in objects.label.tolist()]
    outlines: list[Outline] = []
    wrong: list[Outline] = []  # lies on top
    for box, name, difficult, missed in zip(objects.box.tolist(), names, objects.difficult, errors.missed, strict=True):
        look = LOOKS["missed"] if missed else DIFFICULT if difficult else _FOUND
        (wrong if missed else outlines).append(Outline(box, look, name if missed else ""))
    drawn = np.flatnonzero(shown)
    for index in drawn[np.argsort(detections.score[drawn], kind="stable")].tolist():
        kind, target = int(errors.kind[index]), int(errors.target[index])
        look = RIGHT if kind < 0 else LOOKS[KINDS[kind]]
        caption = f"{class_names[detections.label[index] - 1]} {detections.score[index]:.2f}"
        if look is LOOKS["classification"]:
            caption += f", is {names[target]}"
        (outlines if kind < 0 else wrong).append(Outline(detections.box[index].tolist(), look, caption))
    outlines += wrong
    numbers = [(look, sum(outline.look is look for outline in outlines)) for look in (RIGHT, *LOOKS.values())]
    counted = [look._replace(text=f"{look.text} {number}") for look, number in numbers]
    return sketch(image, outlines, [*counted, _FOUND, DIFFICULT], title)
