"""The audit of anchors on the objects of a dataset, before any training: plain arrays, no images, no network.

Augmentation is left out, and so is the padding of a batch: it adds locations beyond the right and lower border, whose
anchors take part in training only if straddling ones are kept.

Shapes: `S` anchor shapes (levels times anchors per location), `N` images, `M` objects. Sizes are (height, width).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from detector.anchors import AnchorConfig
from detector.assignment import IoUMatcher, anchor_matcher
from detector.files import without_nan
from detector.image_batch import ImageConfig
from detector.metrics.coco_ap import SIZES
from detector.rpn import RPNConfig
from experiments.anchors.coverage import (
    AnchorLattices,
    Array,
    ObjectMatches,
    all_locations,
    legal_locations,
    match_objects,
)
from experiments.anchors.views import training_views
from experiments.output import percent

RATIO_EDGES = [2**power for power in (-1.5, -0.5, 0.5, 1.5)]
"""Bounds of the groups of aspect ratios: around 1/2, 1 and 2, and beyond."""
NEARLY_DEAD = 0.05
"""Share of locations below which an anchor is called nearly dead."""
MANY_RESCUED = 2 / 3
"""Share of rescued objects above which there is a warning; the paper's anchors rescue 0.63 on VOC2007 trainval."""


@dataclass(frozen=True)
class Coverage:
    """The coverage of some objects by anchors; shares are fractions of these objects, nan where there are none.

    Attributes:
        objects: How many; where images are trained at several sizes, the mean over these.
        mean_best_iou: Mean over objects of the highest IoU with an anchor that is used.
        share_iou_50, share_iou_70: Objects whose best IoU is at least 0.5, 0.7.
        share_rescued: Objects that have positive anchors only by the rule that an object's best anchors are positive.
        share_without_positive: Objects without any positive anchor.
        share_without_anchor: Objects that overlap no anchor that is used.
    """

    objects: float
    mean_best_iou: float
    share_iou_50: float
    share_iou_70: float
    share_rescued: float
    share_without_positive: float
    share_without_anchor: float


@dataclass(frozen=True)
class AnchorAudit:
    """One anchor shape at one feature level.

    Attributes:
        level, stride: Feature level, counted from 0, and its pixels per cell.
        scale, aspect_ratio: As configured; aspect ratio is height / width; scale is nan where sizes are configured.
        width, height: Sides in pixels of the resized image.
        legal_share: Share of all locations of all images at which it does not cross the border.
        images_without: Images with no such location, at none of the sizes that they are trained at.
        best_match_share: Share of objects whose best anchor has this shape; where shapes tie they share equally.
        positive_share: Its share of all positive anchors.
    """

    level: int
    stride: int
    scale: float
    aspect_ratio: float
    width: float
    height: float
    legal_share: float
    images_without: int
    best_match_share: float
    positive_share: float

    @property
    def name(self) -> str:
        """Return scale, ratio, sides and stride, for messages."""
        where = f"{self.width:.0f} x {self.height:.0f} pixels, stride {self.stride}"
        if math.isnan(self.scale):
            return where
        return f"scale {self.scale:g}, ratio {self.aspect_ratio:g} ({where})"


@dataclass(frozen=True)
class AuditResult(Coverage):
    """The audit of a dataset: the coverage of all objects, and more.

    Attributes:
        images: Images, those without objects included.
        anchors: Every shape, by level and in the order of the RPN's outputs.
        straddling: Whether straddling anchors are used: drop or keep.
        positive_iou: IoU from which an anchor is positive.
        rule: What makes anchors positive in this audit, in words.
        other_matcher: `rpn.matcher` where it has another rule, and so other numbers of positives; else None.
        wanted_positives: Most positives that an image contributes to the RPN's losses.
        positives_per_image: Mean number of positive anchors of an image.
        sampled_positives_per_image: The same, where what is above `wanted_positives` does not count.
        share_images_wanted: Images that have `wanted_positives` or more.
        by_class: Coverage by class, of classes that have objects.
        by_size: By area after resizing: COCO's small (below 32 x 32), medium, large (from 96 x 96 on).
        by_original_size: The same by area in the original image.
        by_aspect_ratio: By height / width after resizing.
    """

    images: int
    anchors: tuple[AnchorAudit, ...]
    straddling: str
    positive_iou: float
    rule: str
    other_matcher: str | None
    wanted_positives: int
    positives_per_image: float
    sampled_positives_per_image: float
    share_images_wanted: float
    by_class: Mapping[str, Coverage]
    by_size: Mapping[str, Coverage]
    by_original_size: Mapping[str, Coverage]
    by_aspect_ratio: Mapping[str, Coverage]

    @property
    def warnings(self) -> list[str]:
        """List what may spoil a training, in one short line each."""
        return [*_dead_anchors(self), *_neglected_objects(self)]

    def to_dict(self) -> dict[str, Any]:
        """Return all of the above and `warnings`, with None for nan, for JSON."""
        values: dict[str, Any] = without_nan({**asdict(self), "warnings": self.warnings})
        return {"images": values.pop("images"), **values}


def audit(
    anchors: AnchorConfig,
    strides: Sequence[int],
    image_config: ImageConfig,
    sizes: Array,
    boxes: Array,
    image: Array,
    labels: Array | None = None,
    class_names: Sequence[str] = (),
    rpn: RPNConfig = RPNConfig(),
) -> AuditResult:
    """Audit anchors on the objects that training uses: select by `difficult` before.

    Args:
        anchors: The anchors.
        strides: Pixels per cell of the backbone's levels, fine to coarse.
        image_config: Gives the sizes after resizing; where there are several, each has an equal part in all numbers.
        sizes: (N, 2) height and width of the original images, those without objects included.
        boxes: (M, 4) xyxy in pixels of the original images.
        image: (M,) position of each object's image in `sizes`.
        labels: (M,) in 1..C, for `by_class`.
        class_names: Of labels 1..C.
        rpn: Gives the thresholds by which anchors are positive, and how many are wanted.

    Raises:
        InputError: The anchors do not fit the number of levels.
    """
    order = np.argsort(image, kind="stable")
    boxes, image = boxes.reshape(-1, 4)[order], np.asarray(image, np.int64)[order]
    views = training_views(image_config, sizes, boxes, image)
    rule, about = _rule(rpn)
    lattices, matches = [], []
    for view in views:
        own, used = view.lattices_and_windows(anchors, strides)
        lattices.append(own)
        matches.append(match_objects(own, used, view.boxes, view.image, rule.positive_iou, bool(rule.best_per_object)))
    best = np.concatenate([found.best_iou for found in matches])
    positives = np.concatenate([found.positives for found in matches])
    wanted = int(rpn.samples_per_image * rpn.positive_fraction)
    resized = np.concatenate([view.boxes for view in views])
    names = np.array([*class_names])[np.asarray(labels)[order] - 1] if labels is not None and len(boxes) else None
    classes = {} if names is None else {name: names == name for name in class_names if (names == name).any()}

    def cover(masks: Mapping[str, Array]) -> dict[str, Coverage]:  # of the objects of all views, or of one: repeated
        return {name: _coverage(best[np.resize(mask, len(best))], len(views), rule) for name, mask in masks.items()}

    return AuditResult(
        **(asdict(_coverage(best, len(views), rule)) | about),
        images=len(sizes),
        anchors=_anchors(lattices, [view.sizes for view in views], matches),
        straddling=anchors.straddling,
        wanted_positives=wanted,
        positives_per_image=_mean(positives),
        sampled_positives_per_image=_mean(np.minimum(positives, wanted)),
        share_images_wanted=_mean(positives >= wanted),
        by_class=cover(classes),
        by_size=cover(_by_size(resized)),
        by_original_size=cover(_by_size(boxes)),
        by_aspect_ratio=cover(_by_aspect_ratio(resized)),
    )


def _rule(rpn: RPNConfig) -> tuple[IoUMatcher, dict[str, Any]]:
    """Return the thresholds of IoU to audit by, also where the training has another rule, and what is told of them."""
    matcher = anchor_matcher(rpn.matcher, rpn.positive_iou, rpn.negative_iou, rpn.best_per_object)
    by_iou = type(matcher) is IoUMatcher
    rule = matcher if by_iou else IoUMatcher(rpn.positive_iou, (0.0, rpn.negative_iou), rpn.best_per_object)
    assert isinstance(rule, IoUMatcher)
    text = f"IoU from {rule.positive_iou:g} on" + (", or an object's best" if rule.best_per_object else "")
    other = rpn.matcher if isinstance(rpn.matcher, str) else type(matcher).__name__
    return rule, {"positive_iou": rule.positive_iou, "rule": text, "other_matcher": None if by_iou else other}


def _anchors(
    lattices: Sequence[AnchorLattices], sizes: Sequence[Array], matches: Sequence[ObjectMatches]
) -> tuple[AnchorAudit, ...]:
    """Return what is told about each shape over all views."""
    names = lattices[0]
    legal = np.stack([legal_locations(own, size).count() for own, size in zip(lattices, sizes, strict=True)])
    locations = np.stack([all_locations(own, size).count() for own, size in zip(lattices, sizes, strict=True)])
    parts = [found.is_best / np.maximum(found.is_best.sum(axis=1, keepdims=True), 1) for found in matches]
    positives = np.sum([found.positives_of_shape for found in matches], axis=0)
    columns = {
        "level": names.level,
        "stride": names.stride,
        "scale": names.scale,
        "aspect_ratio": names.aspect_ratio,
        "width": names.width,
        "height": names.height,
        "legal_share": _ratio(legal.sum(axis=(0, 1)), locations.sum(axis=(0, 1))),
        "images_without": (legal == 0).all(axis=0).sum(axis=0),
        "best_match_share": _ratio(sum(part.sum(axis=0) for part in parts), sum(len(part) for part in parts)),
        "positive_share": _ratio(positives, np.sum(positives)),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return tuple(AnchorAudit(**dict(zip(columns, row, strict=True))) for row in rows)


def _coverage(best: Array, repeats: int, rule: IoUMatcher) -> Coverage:
    low = best < np.float32(rule.positive_iou)
    count = len(best) / repeats
    return Coverage(
        objects=int(count) if count == int(count) else count,
        mean_best_iou=_mean(best),
        share_iou_50=_mean(best >= np.float32(0.5)),
        share_iou_70=_mean(best >= np.float32(0.7)),
        share_rescued=_mean(low & (best > 0) & bool(rule.best_per_object)),
        share_without_positive=_mean(best == 0 if rule.best_per_object else low),
        share_without_anchor=_mean(best == 0),
    )


def _mean(values: Array) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else math.nan


def _ratio(part: Array, whole: Array | int) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(part, np.float64) / whole


def _sides(boxes: Array) -> Array:
    """Return widths and heights, (2, M) float64."""
    sides: Array = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64).T
    return sides


def _by_size(boxes: Array) -> dict[str, Array]:
    width, height = _sides(boxes)
    return {name: (width * height >= low) & (width * height < high) for name, (low, high) in SIZES.items()}


def _by_aspect_ratio(boxes: Array) -> dict[str, Array]:
    width, height = _sides(boxes)
    edges = [0.0, *RATIO_EDGES, math.inf]
    texts = [f"{edge:.2f}" for edge in edges]
    names = [f"below {texts[1]}", *(f"{a} to {b}" for a, b in pairwise(texts[1:-1]))]
    names.append(f"from {texts[-2]}")
    groups = np.searchsorted(RATIO_EDGES, height / width, side="right")
    return {name: groups == index for index, name in enumerate(names)}


def _dead_anchors(result: AuditResult) -> list[str]:
    lines, kept = [], result.straddling == "keep"
    for anchor in result.anchors:
        where = f"{anchor.images_without} of {result.images} images"
        if anchor.images_without == result.images and not kept:
            lines.append(f"dead anchor: {anchor.name} fits into no image, so it is never trained")
        elif anchor.positive_share == 0 and result.objects and not result.other_matcher:
            lines.append(f"dead anchor: {anchor.name} is positive for no object, so it only learns background")
        elif not kept and (anchor.legal_share < NEARLY_DEAD or 2 * anchor.images_without >= result.images):
            lines.append(
                f"nearly dead anchor: {anchor.name} is inside the image at {_share(anchor.legal_share)} of "
                f"locations, at none in {where}"
            )
    return lines


def _neglected_objects(result: AuditResult) -> list[str]:
    lines = []
    if result.share_without_anchor > 0:
        lines.append(
            f"{_share(result.share_without_anchor)} of objects overlap no anchor that is used: the region proposal "
            "network never learns from them"
        )
    if result.share_without_positive - result.share_without_anchor > 0.1 and not result.other_matcher:
        lines.append(
            f"{_share(result.share_without_positive)} of objects have no positive anchor (rpn.positive_iou "
            f"{result.positive_iou:g}, rpn.best_per_object false)"
        )
    if result.share_rescued > MANY_RESCUED and not result.other_matcher:
        lines.append(
            f"{_share(result.share_rescued)} of objects have positive anchors only because their best ones count, at "
            f"an IoU below {result.positive_iou:g}"
        )
    if result.share_iou_50 < 0.75:
        lines.append(f"{_share(1 - result.share_iou_50)} of objects overlap no anchor by an IoU of 0.5")
    return lines


def _share(share: float) -> str:
    return percent(share, ".1f" if share >= 0.01 else ".2f")
