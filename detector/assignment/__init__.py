"""Assignment: which candidates (anchors, or RoIs) are of which object, which are background, and which are not used."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from detector.assignment.adaptive import ATSSMatcher, SimOTAMatcher
from detector.assignment.dynamic import DynamicMatcher
from detector.assignment.matching import Around, IoUMatcher, Matcher, NWDMatcher, PairMatcher, match
from detector.errors import InputError
from detector.parts import chosen

__all__ = [
    "ATSSMatcher",
    "Around",
    "DynamicMatcher",
    "IoUMatcher",
    "Matcher",
    "NWDMatcher",
    "PairMatcher",
    "SimOTAMatcher",
    "match",
]

AnchorMatcherName = Literal["iou", "nwd", "atss", "simota"]
RoIMatcherName = Literal["iou", "dynamic"]


def anchor_matcher(
    option: AnchorMatcherName | Matcher,
    positive_iou: float,
    negative_iou: float,
    best_per_object: bool | Literal["one"],
) -> Matcher:
    """Return the matcher of `rpn.matcher`, ours with the thresholds of the RPN's options.

    Raises:
        InputError: It is one of RoIs.
    """
    rules = positive_iou, (0.0, negative_iou), best_per_object
    ours: dict[str, Callable[[], Matcher]] = {
        "iou": partial(IoUMatcher, *rules),
        "nwd": partial(NWDMatcher, *rules),
        "atss": partial(ATSSMatcher, near=negative_iou),
        "simota": partial(SimOTAMatcher, near=negative_iou),
    }
    matcher = chosen(option, ours)
    if isinstance(matcher, DynamicMatcher):
        raise InputError("rpn.matcher: DynamicMatcher follows the RoIs of a training; give it as roi.matcher")
    return matcher


def roi_matcher(
    option: RoIMatcherName | Matcher, positive_iou: float, background_iou: Sequence[float], reg_beta: float
) -> Matcher:
    """Return the matcher of `roi.matcher`, ours with the thresholds of the RoI heads' options.

    Raises:
        InputError: It is one of anchors.
    """
    low, high = background_iou
    ours: dict[str, Callable[[], Matcher]] = {
        "iou": partial(IoUMatcher, positive_iou, (low, high)),
        "dynamic": partial(DynamicMatcher, initial_beta=reg_beta, background_from=low),
    }
    matcher = chosen(option, ours)
    if matcher.needs_predictions:
        raise InputError(
            f"roi.matcher: {type(matcher).__name__} looks at what the RPN predicts; give it as rpn.matcher"
        )
    return matcher
