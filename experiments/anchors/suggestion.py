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
from experiments.anchors.options import Form
from experiments.anchors.views import TrainingView

STEPS = (1.3, 1.15, 1.07, 1.03)
"""Factors by which the search changes one side or ratio at a time."""
FITTED_OBJECTS = 2000
"""Most objects that a search looks at; drawn at random."""
JUDGED_OBJECTS = 20_000
"""Most objects, over all folds, on which the gain is measured; drawn at random."""
FITTING_STRIDES = 8
"""Strides of its level that an object's side should have: as in an FPN, where 32 pixels go with stride 4."""
OBJECTS_PER_SIZE = 10
"""Fewest objects of a level for each of its free sizes, but for the first."""
LEAST_USE = 1e-4
"""A free size by which the mean best IoU of its level's objects rises less is left out."""


@dataclass(frozen=True)
class Suggestion:
    """Anchors found by search.

    Attributes:
        scales, aspect_ratios, sizes: As `AnchorConfig` takes them.
        options: The same as command line options.
        folds: Parts of the images; the gain on each is that of anchors fitted to the others.
        given_mean_best_iou, given_share_iou_50: Of the configured anchors, over the objects of all folds.
        mean_best_iou, share_iou_50: Of anchors fitted to the other folds, over the same objects.
        gains: Gain in mean best IoU on each fold.
    """

    scales: list[Any]
    aspect_ratios: list[Any]
    sizes: list[Any] | None
    options: str
    folds: int
    given_mean_best_iou: float
    given_share_iou_50: float
    mean_best_iou: float
    share_iou_50: float
    gains: list[float]

    def applied(self, given: AnchorConfig) -> AnchorConfig:
        """Return the configured anchors with those that were found."""
        return replace(given, scales=self.scales, aspect_ratios=self.aspect_ratios, sizes=self.sizes)


def suggest_anchors(
    given: AnchorConfig,
    strides: Sequence[int],
    views: Sequence[TrainingView],
    number: int,
    folds: int = 5,
    form: Form | None = None,
) -> Suggestion:
    """Search for the anchors with the highest mean best IoU, under the grid and the straddling rule of training.

    Starts from k-means over the logarithms of sides and ratios (and from the given scales and ratios where they are as
    many), then changes one value at a time while that helps. The result is a function of the input alone.

    Args:
        given: The configured anchors: all that is not searched for, and what the gain is measured against.
        strides: Pixels per cell of the levels.
        views: The objects, at each size of training.
        number: Of scales, in each level's list where they are listed per level; of sizes, most of a level.
        folds: At most; fewer where fewer images have objects.
        form: What to search for: `grid` (scales times as many aspect ratios as are configured, each per level where the
            configured ones are) or `sizes` (on several levels those of each); None: what is configured.

    Raises:
        InputError: Fewer than two images with objects.
    """
    form = form or ("grid" if given.sizes is None else "sizes")
    search = _grid if form == "grid" else _sizes
    rng = np.random.default_rng(0)
    images = rng.permutation(np.unique(views[0].image))
    folds = min(folds, len(images))
    if folds < 2:
        raise InputError(f"--suggest: needs two images with objects, the splits have {len(images)}")
    fold_of_image = np.zeros(len(views[0].sizes), np.int64)
    fold_of_image[images] = np.arange(len(images)) % folds
    fold = fold_of_image[views[0].image]

    def fit(objects: Array) -> AnchorConfig:
        return search(given, strides, _pool(views, _draw(rng, objects, FITTED_OBJECTS)), number)

    before, after, gains = [], [], []
    for part in range(folds):
        judged = _pool(views, _draw(rng, np.flatnonzero(fold == part), JUDGED_OBJECTS // folds))
        before.append(judged.best_ious(given, strides))
        after.append(judged.best_ious(fit(np.flatnonzero(fold != part)), strides))
        gains.append(float(after[-1].mean() - before[-1].mean()))
    found = fit(np.arange(len(fold)))
    old, new = np.concatenate(before), np.concatenate(after)
    keys = ("sizes",) if form == "sizes" else ("scales", "aspect_ratios")
    return Suggestion(
        scales=found.scales,
        aspect_ratios=found.aspect_ratios,
        sizes=found.sizes,
        options=" ".join(f'--model.anchors.{key} "{_text(getattr(found, key))}"' for key in keys),
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


def _grid(given: AnchorConfig, strides: Sequence[int], objects: TrainingView, number: int) -> AnchorConfig:
    """Search scales times ratios."""
    scales: list[Any] = given.scales if given.is_per_level("scales") else [given.scales]
    ratios: list[Any] = given.aspect_ratios if given.is_per_level("aspect_ratios") else [given.aspect_ratios]
    ends = np.cumsum([number] * len(scales) + [len(level) for level in ratios])

    def build(values: Array) -> AnchorConfig:
        """Return anchors from logarithms of sides, by level, followed by those of ratios."""
        lists = np.split(np.exp(values), ends[:-1])
        sides = [sorted(_short(side / given.base_size) for side in level) for level in lists[: len(scales)]]
        shapes = [sorted(map(_short, level)) for level in lists[len(scales) :]]
        return replace(
            given,
            scales=sides if given.is_per_level("scales") else sides[0],
            aspect_ratios=shapes if given.is_per_level("aspect_ratios") else shapes[0],
            sizes=None,
        )

    log_side, log_ratio = _log_side_and_ratio(objects).T
    levels = _levels(log_side, strides) if len(ratios) > 1 else np.zeros(len(log_side))
    of_ratios = [
        _k_means(own if len(own) >= len(level) else log_ratio, len(level))
        for level, own in ((level, log_ratio[levels == place]) for place, level in enumerate(ratios))
    ]
    starts = [np.concatenate((_k_means(log_side, number * len(scales)), *of_ratios))]
    if all(len(each) == number for each in scales):
        flat = np.concatenate([np.array(level, np.float64) for level in (*scales, *ratios)])
        flat[: number * len(scales)] *= given.base_size
        starts.append(np.log(flat))
    climbed = [
        _climb(start, lambda values: float(objects.best_ious(build(values), strides).mean())) for start in starts
    ]
    return build(max(climbed, key=lambda found: found[1])[0])


def _sizes(given: AnchorConfig, strides: Sequence[int], objects: TrainingView, number: int) -> AnchorConfig:
    """Search free sizes for each level: those of the objects that fit its stride."""
    fitting = _levels(_log_side_and_ratio(objects)[:, 0], strides)
    levels = [
        _sizes_of_level(given, stride, objects.take(np.flatnonzero(fitting == place)), number)
        for place, stride in enumerate(strides)
    ]
    return replace(given, sizes=levels if len(levels) > 1 else levels[0])


def _sizes_of_level(given: AnchorConfig, stride: int, objects: TrainingView, number: int) -> list[list[float]]:
    """Search sizes, `number` of them at most, without those that the objects do not need; a square for no objects."""
    if not len(objects.boxes):
        return [[float(FITTING_STRIDES * stride)] * 2]

    def score(sizes: list[list[float]]) -> float:
        return float(objects.best_ious(replace(given, sizes=sizes), [stride]).mean())

    shapes, count = _log_side_and_ratio(objects), int(np.clip(len(objects.boxes) // OBJECTS_PER_SIZE, 1, number))
    start = np.stack((np.full(count, shapes[:, 0].mean()), _k_means(shapes[:, 1], count)), 1)
    values, best = _climb(_means(shapes, start).reshape(-1), lambda values: score(_pairs(values)))
    found = _pairs(values)
    for size in [*found]:
        rest = [other for other in found if other != size]
        if rest and score(rest) >= best - LEAST_USE:
            found = rest
    return found


def _pairs(values: Array) -> list[list[float]]:
    """Return widths and heights, ascending, from the logarithms of side and ratio of each."""
    side, ratio = np.exp(values).reshape(-1, 2).T
    pairs = np.stack((side / np.sqrt(ratio), side * np.sqrt(ratio)), 1)
    return sorted([_short(width), _short(height)] for width, height in pairs)


def _log_side_and_ratio(objects: TrainingView) -> Array:
    """Return the logarithms (M, 2) of the square root of each object's area and of its height / width."""
    width, height = (objects.boxes[:, 2:] - objects.boxes[:, :2]).astype(np.float64).T
    return np.stack((0.5 * np.log(width * height), np.log(height / width)), 1)


def _levels(log_side: Array, strides: Sequence[int]) -> Array:
    """Return the level (M,) of whose stride each object's side is nearest to `FITTING_STRIDES`."""
    levels: Array = np.abs(log_side[:, None] - np.log(FITTING_STRIDES * np.array(strides))).argmin(1)
    return levels


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
    return np.sort(_means(values[:, None], np.quantile(values, (np.arange(k) + 0.5) / k)[:, None])[:, 0])


def _means(values: Array, centers: Array) -> Array:
    """Return the centres (k, d) of k-means of values (n, d) from given ones."""
    for _ in range(100):
        nearest = ((values[:, None] - centers) ** 2).sum(2).argmin(1)
        count = np.bincount(nearest, minlength=len(centers))[:, None]
        sums = np.stack([np.bincount(nearest, weights=each, minlength=len(centers)) for each in values.T], 1)
        moved = np.where(count > 0, sums / np.maximum(count, 1), centers)
        if np.allclose(moved, centers):
            break
        centers = moved
    return centers


def _short(value: float) -> float:
    """Round to three significant digits, which a person would paste."""
    return float(f"{value:.3g}")


def _text(values: Sequence[Any]) -> str:
    return "[" + ", ".join(_text(value) if isinstance(value, list) else f"{value:g}" for value in values) + "]"
