"""Scales and aspect ratios that fit the objects of a dataset, and how much they gain on images they were not fitted to.

The structure stays that of Faster R-CNN: K scales times as many aspect ratios as are configured, equal area over
ratios, the same ratios on all levels. Where scales are listed per level, every level gets K of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from detector.anchors import AnchorConfig
from detector.errors import InputError
from experiments.anchors.coverage import Array
from experiments.anchors.views import TrainingView

STEPS = (1.3, 1.15, 1.07, 1.03)
"""Factors by which the search changes one side or ratio at a time."""
FITTED_OBJECTS = 2000
"""Most objects that a search looks at; drawn at random."""
JUDGED_OBJECTS = 20_000
"""Most objects, over all folds, on which the gain is measured; drawn at random."""


@dataclass(frozen=True)
class Suggestion:
    """Anchors found by search.

    Attributes:
        scales: In units of `anchors.base_size`, as `AnchorConfig` takes them.
        aspect_ratios: Height / width.
        options: The same as command line options.
        folds: Parts of the images; the gain on each is that of anchors fitted to the others.
        given_mean_best_iou, given_share_iou_50: Of the configured anchors, over the objects of all folds.
        mean_best_iou, share_iou_50: Of anchors fitted to the other folds, over the same objects.
        gains: Gain in mean best IoU on each fold.
    """

    scales: list[Any]
    aspect_ratios: list[Any]
    options: str
    folds: int
    given_mean_best_iou: float
    given_share_iou_50: float
    mean_best_iou: float
    share_iou_50: float
    gains: list[float]


def suggest_anchors(
    given: AnchorConfig, strides: Sequence[int], views: Sequence[TrainingView], scales: int, folds: int = 5
) -> Suggestion:
    """Search for the anchors with the highest mean best IoU, under the grid and the straddling rule of training.

    Starts from k-means over the logarithms of sides and ratios (and from the given anchors where they are as many),
    then changes one value at a time while that helps. The result is a function of the input alone.

    Args:
        given: The configured anchors: all that is not searched for, and what the gain is measured against.
        strides: Pixels per cell of the levels.
        views: The objects, at each size of training.
        scales: K, at least 1.
        folds: At most; fewer where fewer images have objects.

    Raises:
        InputError: Fewer than two images with objects, or anchors of another structure.
    """
    if given.sizes is not None or given.is_per_level("aspect_ratios"):
        raise InputError("--suggest: is for anchors of scales and one list of aspect_ratios, without anchors.sizes")
    rng = np.random.default_rng(0)
    images = rng.permutation(np.unique(views[0].image))
    folds = min(folds, len(images))
    if folds < 2:
        raise InputError(f"--suggest: needs two images with objects, the splits have {len(images)}")
    fold_of_image = np.zeros(len(views[0].sizes), np.int64)
    fold_of_image[images] = np.arange(len(images)) % folds
    fold = fold_of_image[views[0].image]

    def fit(objects: Array) -> AnchorConfig:
        return _search(given, strides, _pool(views, _draw(rng, objects, FITTED_OBJECTS)), scales)

    before, after, gains = [], [], []
    for number in range(folds):
        judged = _pool(views, _draw(rng, np.flatnonzero(fold == number), JUDGED_OBJECTS // folds))
        before.append(judged.best_ious(given, strides))
        after.append(judged.best_ious(fit(np.flatnonzero(fold != number)), strides))
        gains.append(float(after[-1].mean() - before[-1].mean()))
    found = fit(np.arange(len(fold)))
    old, new = np.concatenate(before), np.concatenate(after)
    return Suggestion(
        scales=found.scales,
        aspect_ratios=found.aspect_ratios,
        options=f'--model.anchors.scales "{_text(found.scales)}" '
        f'--model.anchors.aspect_ratios "{_text(found.aspect_ratios)}"',
        folds=folds,
        given_mean_best_iou=float(old.mean()),
        given_share_iou_50=float((old >= 0.5).mean()),
        mean_best_iou=float(new.mean()),
        share_iou_50=float((new >= 0.5).mean()),
        gains=gains,
    )


def _draw(rng: np.random.Generator, objects: Array, limit: int) -> Array:
    return objects if len(objects) <= limit else np.sort(rng.choice(objects, limit, replace=False))


def _pool(views: Sequence[TrainingView], objects: Array) -> TrainingView:
    """Return the objects at all sizes of training; of several sizes each object takes one, in turn."""
    parts = [view.take(objects[index :: len(views)]) for index, view in enumerate(views)]
    sizes, boxes = np.concatenate([p.sizes for p in parts]), np.concatenate([p.boxes for p in parts])
    return TrainingView(sizes, boxes, np.arange(len(boxes)))


def _search(given: AnchorConfig, strides: Sequence[int], objects: TrainingView, scales: int) -> AnchorConfig:
    levels = len(strides) if isinstance(given.scales[0], list) else 0

    def build(values: Array) -> AnchorConfig:
        """Return anchors from logarithms of sides, by level, followed by those of ratios."""
        ratios = len(given.aspect_ratios)
        sides = [_short(np.exp(value) / given.base_size) for value in values[:-ratios]]
        lists = [sorted(sides[start : start + scales]) for start in range(0, len(sides), scales)]
        return replace(
            given,
            scales=lists if levels else lists[0],
            aspect_ratios=sorted(_short(np.exp(value)) for value in values[-ratios:]),
        )

    def score(values: Array) -> float:
        return float(objects.best_ious(build(values), strides).mean())

    width, height = (objects.boxes[:, 2:] - objects.boxes[:, :2]).astype(np.float64).T
    log_ratio = np.log(height / width)
    sides = _k_means(0.5 * np.log(width * height), scales * max(levels, 1))
    starts = [np.concatenate((sides, _k_means(log_ratio, len(given.aspect_ratios))))]
    listed: list[Any] = given.scales if levels else [given.scales]
    if all(len(each) == scales for each in listed):
        flat = np.array(listed, np.float64).reshape(-1) * given.base_size
        starts.append(np.log(np.concatenate((flat, given.aspect_ratios))))
    climbed = [_climb(start, score) for start in starts]
    return build(max(climbed, key=lambda found: found[1])[0])


def _climb(values: Array, score: Callable[[Array], float]) -> tuple[Array, float]:
    """Change one value at a time, in smaller and smaller steps, while the score rises."""
    best = score(values)
    for step in np.log(STEPS):
        improved = True
        while improved:
            improved = False
            for index in range(len(values)):
                for move in (step, -step):
                    changed = values.copy()
                    changed[index] += move
                    value = score(changed)
                    if value > best + 1e-5:
                        values, best, improved = changed, value, True
                        break
    return values, best


def _k_means(values: Array, k: int) -> Array:
    """Return the centres (k,), ascending, of one-dimensional k-means that starts from quantiles."""
    centers = np.quantile(values, (np.arange(k) + 0.5) / k)
    for _ in range(100):
        nearest = np.searchsorted(0.5 * (centers[1:] + centers[:-1]), values)
        count = np.bincount(nearest, minlength=k)
        sums = np.bincount(nearest, weights=values, minlength=k)
        moved = np.where(count > 0, sums / np.maximum(count, 1), centers)
        if np.allclose(moved, centers):
            break
        centers = moved
    return np.sort(centers)


def _short(value: float) -> float:
    """Round to three significant digits, which a person would paste."""
    return float(f"{value:.3g}")


def _text(values: Sequence[Any]) -> str:
    return "[" + ", ".join(_text(value) if isinstance(value, list) else f"{value:g}" for value in values) + "]"
