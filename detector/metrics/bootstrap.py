"""Confidence intervals of average precision: a bootstrap over images.

A resample draws as many images as there are, with replacement; an image drawn twice counts twice, with its objects and
its detections. How detections are judged does not depend on which images are drawn (VOC and COCO both match image by
image), so a resample is a vector of image counts, and its AP follows from counts of flags that are computed once.

The intervals are percentiles: they say how far AP moves with the choice of test images, not with the training seed.
Equal scores of several detections in an image that is drawn twice are taken detection by detection rather than image by
image, which no other rule of the metrics depends on.

Shape legend: `N` images, `R` resamples, `T` true positives of a class.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.errors import InputError
from detector.metrics.coco_matching import AREAS, IOU_THRESHOLDS, match_coco
from detector.metrics.voc_ap import (
    IGNORED,
    TRUE_POSITIVE,
    BoolArray,
    Detections,
    FlagArray,
    GroundTruth,
    IntArray,
    evaluate_voc,
)

Samples = NDArray[np.float64]

_RESAMPLES_AT_ONCE: Final = 250
_COCO_RECALLS: Final = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Interval:
    """The range of a metric, or of a difference, over the resamples; nan where it is undefined in all of them."""

    low: float
    high: float


def bootstrap(
    detections: Detections,
    ground_truth: GroundTruth,
    image_ids: IntArray,
    class_names: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
    coco: bool = True,
) -> dict[str, Samples]:
    """Return every AP of `DetectionAP` in each of R resamples of the images.

    The images drawn depend on `seed`, `resamples` and the number of images alone, so the samples of two detectors on
    the same images are paired.

    Args:
        detections: Detections, all in images of `image_ids`.
        ground_truth: Objects, all in images of `image_ids`.
        image_ids: (N,) all images.
        class_names: Of labels 1..C.
        resamples: R.
        seed: Seed of the resampling.
        coco: Compute COCO's numbers too; they take most of the time.

    Returns:
        (R,) by metric name: `AP50_voc07`, `AP50_voc`, `AP50_voc_class/<name>`, and with `coco` `AP`, `AP50`, `AP75`,
        `AP_small`, `AP_medium`, `AP_large`. A class without objects in a resample is left out of that resample's
        means; nan where no class has any.

    Raises:
        InputError: `resamples` below 2, or no images.
    """
    image_ids = np.unique(image_ids)
    if resamples < 2 or len(image_ids) == 0:
        raise InputError(f"{resamples} resamples of {len(image_ids)} images: at least 2 of at least 1 are needed")
    drawn = torch.from_numpy(draw_images(len(image_ids), resamples, seed))
    names = ["AP50_voc07", "AP50_voc", *(["AP", "AP50", "AP75", *(f"AP{area}" for area in AREAS if area)] * coco)]
    by_class: dict[str, list[Samples]] = {name: [] for name in names}
    labels = range(1, len(class_names) + 1)
    voc = evaluate_voc(detections, ground_truth, labels)
    object_image = np.searchsorted(image_ids, ground_truth.image_id)
    for result in voc.per_class:
        mine = object_image[(ground_truth.label == result.label) & ~ground_truth.difficult]
        objects = np.bincount(mine, minlength=len(image_ids))
        image = np.searchsorted(image_ids, detections.image_id[result.order])
        eleven, area = _resampled(image, result.flags, objects, drawn, [_eleven_points, _area])
        by_class["AP50_voc07"].append(eleven)
        by_class["AP50_voc"].append(area)
    for matches in match_coco(detections, ground_truth, image_ids, labels) if coco else ():
        for name, flags, objects in zip(AREAS, matches.flags, matches.objects, strict=True):
            aps = [_resampled(matches.image, row, objects, drawn, [_coco_points])[0] for row in flags]
            by_class[f"AP{name}"].append(np.mean(aps, axis=0))
            if not name:
                by_class["AP50"].append(aps[0])
                by_class["AP75"].append(aps[int(np.searchsorted(IOU_THRESHOLDS, 0.75 - 1e-9))])
    samples = {name: _mean_over_classes(np.stack(values)) for name, values in by_class.items()}
    per_class = zip(class_names, by_class["AP50_voc"], strict=True)
    return samples | {f"AP50_voc_class/{name}": values for name, values in per_class}


def draw_images(images: int, resamples: int, seed: int) -> NDArray[np.float32]:
    """Draw how often each image is in each resample: (N, R), every column sums to N."""
    rng = np.random.default_rng(seed)
    rows = [np.bincount(rng.integers(0, images, images), minlength=images) for _ in range(resamples)]
    return np.stack(rows, axis=1).astype(np.float32)


def interval(samples: Samples, level: float = 0.95) -> Interval:
    """Return the middle `level` of the samples (R,); undefined ones are left out."""
    known = samples[~np.isnan(samples)]
    if len(known) == 0:
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def share_above_zero(differences: Samples) -> float:
    """Return the share of resamples (R,) whose difference is above 0, ties counted half; nan if all are undefined."""
    known = differences[~np.isnan(differences)]
    return float(((known > 0) + 0.5 * (known == 0)).mean()) if len(known) else float("nan")


def _mean_over_classes(values: Samples) -> Samples:
    """Return the mean (R,) of values (C, R) over the classes that have one."""
    known = ~np.isnan(values)
    number = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    mean: Samples = np.divide(total, number, out=np.full(len(total), np.nan), where=number > 0)
    return mean


Rule = Callable[[Samples, Samples, Samples, Samples], Samples]


def _resampled(
    image: IntArray, flags: FlagArray, objects: IntArray, drawn: Tensor, rules: Sequence[Rule]
) -> list[Samples]:
    """Return the AP (R,) of one class by each rule.

    Args:
        image: (D,) position of the image of each detection, best score first.
        flags: (D,) how the detection is judged.
        objects: (N,) objects to be found in each image.
        drawn: (N, R) how often each image is drawn.
        rules: From precision envelope, gain, found (all (T, R)) and number of objects (R,) to AP (R,).
    """
    counted = flags != IGNORED
    image, is_true = image[counted], flags[counted] == TRUE_POSITIVE
    segments = _segments(image, is_true, len(objects))
    numbers = torch.from_numpy(objects.astype(np.float32)) @ drawn
    parts: list[list[Samples]] = [[] for _ in rules]
    for start in range(0, drawn.shape[1], _RESAMPLES_AT_ONCE):
        columns = slice(start, start + _RESAMPLES_AT_ONCE)
        number = numbers[columns].numpy().astype(np.float64)
        at_least_one = np.maximum(number, 1.0)
        envelope, gain, found = _curve(segments, image[is_true], drawn[:, columns].contiguous())
        for part, rule in zip(parts, rules, strict=True):
            part.append(np.where(number > 0, rule(envelope, gain, found, at_least_one), np.nan))
    return [np.concatenate(part) for part in parts]


def _segments(image: IntArray, is_true: BoolArray, images: int) -> Tensor:
    """Count the detections of each image after the previous and up to each true positive: sparse (T, N).

    Detections between two true positives matter only by how many they are, so one sparse product counts them for all
    resamples. Those after the last one do not matter.
    """
    true_positives = int(is_true.sum())
    last = int(np.flatnonzero(is_true)[-1]) + 1 if true_positives else 0
    segment: IntArray = np.cumsum(is_true[:last]) - is_true[:last]
    indices = torch.from_numpy(np.stack([segment, image[:last]]))
    shape = (true_positives, images)
    return torch.sparse_coo_tensor(indices, torch.ones(last), shape, check_invariants=False).coalesce()


def _curve(segments: Tensor, true_image: IntArray, drawn: Tensor) -> tuple[Samples, Samples, Samples]:
    """Return precision envelope, objects gained and objects found so far at each true positive, all (T, R)."""
    seen = torch.sparse.mm(segments, drawn).numpy().cumsum(axis=0, dtype=np.float64)
    gain = drawn[torch.from_numpy(true_image)].numpy().astype(np.float64)
    found = gain.cumsum(axis=0)
    precision = found / np.maximum(seen, 1.0)
    return np.maximum.accumulate(precision[::-1], axis=0)[::-1], gain, found


def _area(envelope: Samples, gain: Samples, found: Samples, number: Samples) -> Samples:
    area: Samples = np.einsum("tr,tr->r", envelope, gain) / number
    return area


def _eleven_points(envelope: Samples, gain: Samples, found: Samples, number: Samples) -> Samples:
    reached = np.floor(10 * found / number) + 1  # exact: a quotient of integers is rounded to an integer only if it is
    return _mean_at_points(envelope, reached, 11)


def _coco_points(envelope: Samples, gain: Samples, found: Samples, number: Samples) -> Samples:
    reached = np.floor(100 * found / number) + 1
    # COCO compares rounded numbers: a recall of 35/100 does not reach its point 35 * 0.01, which is a little more.
    beyond = _COCO_RECALLS[np.maximum(reached, 1).astype(np.int64) - 1] > found / number
    return _mean_at_points(envelope, reached - beyond, 101)


def _mean_at_points(envelope: Samples, reached: Samples, points: int) -> Samples:
    """Return the mean precision at recall points of which each true positive reaches `reached` (T, R)."""
    new = np.diff(reached, axis=0, prepend=0.0)
    mean: Samples = np.einsum("tr,tr->r", envelope, new) / points
    return mean
