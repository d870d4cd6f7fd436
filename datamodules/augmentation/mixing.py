"""Augmentations that put objects of other training images into an image: mosaic, mixup, copy-paste of boxes.

The other images are drawn by the dataset from the same (seed, epoch, index) as everything else. The result has the
aspect ratio of the first image, so that batches grouped by aspect ratio stay grouped.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from datamodules.augmentation.samples import Sample, merge, place
from datamodules.augmentation.transforms import Partner, Step, check_share
from detector.errors import InputError

Part = tuple[int, int, int, int]
"""A part of an image: xyxy in whole pixels."""


def _resize(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    smaller = width * height < image.shape[0] * image.shape[1]
    how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=how), np.uint8)


class Mosaic(Step):
    """Four images in one (YOLOv4, Bochkovskiy et al. 2020, section 3.3).

    A point drawn in the middle of the canvas divides it into four tiles. Each is filled, without gaps, by a part of
    one image at a scale drawn anew; objects are cut at the tile's border.

    Args:
        canvas: Sides of the mosaic in those of the first image: at 1, objects would be shrunk to half their pixels and
            enlarged again by the network's resizing.
        centre: Range of the dividing point, as a share of each side.
        zoom: A tile shows its image enlarged by up to this factor over the smallest scale that fills it.
        p: Probability.
    """

    def __init__(
        self, canvas: float = 1.5, centre: Sequence[float] = (0.35, 0.65), zoom: float = 1.5, p: float = 0.5
    ) -> None:
        super().__init__(p)
        if not 0.5 <= canvas <= 4 or zoom < 1:
            raise InputError(f"Mosaic: canvas is {canvas}, zoom {zoom}; they must be 0.5 to 4, and at least 1")
        if len(centre) != 2 or not 0.1 <= centre[0] <= centre[1] <= 0.9:
            raise InputError(f"Mosaic: centre is {centre!r}; it must be [least, greatest] within 0.1 to 0.9")
        self.canvas, self.centre, self.zoom = canvas, centre, zoom

    def apply(self, sample: Sample, rng: Random, partner: Partner) -> Sample:
        """Return the mosaic of the sample and three partners."""
        height, width = (max(4, round(side * self.canvas)) for side in sample.size)
        x = min(max(1, round(width * rng.uniform(*self.centre))), width - 1)
        y = min(max(1, round(height * rng.uniform(*self.centre))), height - 1)
        tiles = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
        rng.shuffle(tiles)
        image = np.empty((height, width, 3), np.uint8)
        parts = []
        for tile, part in zip(tiles, [sample, partner(), partner(), partner()], strict=True):
            x1, y1, x2, y2 = tile
            left, top, right, bottom = window = self._window(part.size, (y2 - y1, x2 - x1), rng)
            image[y1:y2, x1:x2] = _resize(part.image[top:bottom, left:right], x2 - x1, y2 - y1)
            parts.append(part.take(image, *place(part.boxes, window, tile)))
        return merge(image, parts)

    def _window(self, size: tuple[int, int], tile: tuple[int, int], rng: Random) -> Part:
        """Draw a part of an image of `size` (height, width) that has the shape of the tile."""
        scale = max(tile[0] / size[0], tile[1] / size[1]) * rng.uniform(1, self.zoom)
        height, width = (min(side, max(1, round(out / scale))) for side, out in zip(size, tile, strict=True))
        left, top = rng.randint(0, size[1] - width), rng.randint(0, size[0] - height)
        return left, top, left + width, top + height


class MixUp(Step):
    """Two images blended, with the objects of both (Zhang et al. 2019, "Bag of Freebies", section 3.1).

    The second image is shrunk or enlarged until it fits into the first one, and laid over it at a drawn place. Both
    are about equally visible (the share follows a beta distribution), and all objects count fully: here losses have no
    weights per object.

    Args:
        beta: Both parameters of the beta distribution; the larger, the closer to one half.
        min_scale: The second image is drawn at this share of the largest size that fits, or more.
        p: Probability.
    """

    def __init__(self, beta: float = 32.0, min_scale: float = 0.7, p: float = 0.5) -> None:
        super().__init__(p)
        if beta <= 0:
            raise InputError(f"MixUp: beta is {beta}; it must be above 0")
        self.beta, self.min_scale = beta, check_share("MixUp: min_scale", min_scale)

    def apply(self, sample: Sample, rng: Random, partner: Partner) -> Sample:
        """Return the blend of the sample with a partner."""
        other = partner()
        (height, width), (h, w) = sample.size, other.size
        scale = min(height / h, width / w) * rng.uniform(self.min_scale, 1)
        new_h, new_w = max(1, min(height, round(h * scale))), max(1, min(width, round(w * scale)))
        left, top = rng.randint(0, width - new_w), rng.randint(0, height - new_h)
        target = (left, top, left + new_w, top + new_h)
        share = rng.betavariate(self.beta, self.beta)
        image = sample.image.copy()
        below = image[top : top + new_h, left : left + new_w]
        image[top : top + new_h, left : left + new_w] = cv2.addWeighted(
            below, share, _resize(other.image, new_w, new_h), 1 - share, 0
        )
        return merge(image, [sample, other.take(image, *place(other.boxes, (0, 0, w, h), target))])


class CopyPasteBoxes(Step):
    """Objects of another image pasted in with their boxes (after Dwibedi et al. 2017, "Cut, Paste and Learn").

    A patch is an object's box with a margin over which it is blended in, so that the seam is not the box. Other objects
    of which at least a quarter lies in the patch come along, cut to it. A place is taken only if no object there loses
    more than `max_cover` of its area over all pastes; where none is found, nothing is pasted.

    Args:
        objects: At most this many are pasted.
        max_side: A patch is shrunk to at most this share of the image's sides.
        scale: Range of the factor by which a patch is enlarged before that.
        max_cover: Largest share of any object that is covered.
        margin: Width of the blended margin in shares of the box's sides.
        trials: Places tried for each object.
        p: Probability.
    """

    def __init__(
        self,
        objects: int = 3,
        max_side: float = 0.6,
        scale: Sequence[float] = (0.6, 1.2),
        max_cover: float = 0.3,
        margin: float = 0.1,
        trials: int = 20,
        p: float = 0.5,
    ) -> None:
        super().__init__(p)
        if objects < 1 or len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise InputError(f"CopyPasteBoxes: objects is {objects}, scale {scale!r}; they must be positive")
        self.objects, self.scale, self.trials = objects, scale, trials
        self.max_side = check_share("CopyPasteBoxes: max_side", max_side)
        self.max_cover = check_share("CopyPasteBoxes: max_cover", max_cover)
        self.margin = check_share("CopyPasteBoxes: margin", margin)

    def apply(self, sample: Sample, rng: Random, partner: Partner) -> Sample:
        """Return the sample with some of a partner's objects pasted in."""
        other = partner()
        count = min(len(other.boxes), rng.randint(1, self.objects))
        image, parts, covered = sample.image.copy(), [sample], np.zeros(len(sample.boxes))
        for index in rng.sample(range(len(other.boxes)), count):
            window = self._window(other, index)
            (rows, columns), width, height = sample.size, window[2] - window[0], window[3] - window[1]
            scale = min(rng.uniform(*self.scale), self.max_side * columns / width, self.max_side * rows / height)
            patch = max(1, int(height * scale)), max(1, int(width * scale))
            boxes = np.concatenate([part.boxes for part in parts])
            place_at = self._find_place(patch, sample.size, boxes, covered, rng)
            if place_at is None:
                continue
            target, covered = place_at
            pasted = other.take(image, *place(other.boxes, window, target))
            _blend(image, other, window, target, pasted.boxes)
            parts.append(pasted)
            covered = np.concatenate([covered, np.zeros(len(pasted.boxes))])
        return merge(image, parts)

    def _window(self, other: Sample, index: int) -> Part:
        """Return the part of the other image that shows a box and its margin."""
        height, width = other.size
        x1, y1, x2, y2 = (float(value) for value in other.boxes[index])
        dx, dy = self.margin * (x2 - x1), self.margin * (y2 - y1)
        left, top = max(0, int(x1 - dx)), max(0, int(y1 - dy))
        right, bottom = max(left + 1, math.ceil(x2 + dx)), max(top + 1, math.ceil(y2 + dy))
        return left, top, min(width, right), min(height, bottom)

    def _find_place(
        self,
        patch: tuple[int, int],
        size: tuple[int, int],
        boxes: NDArray[np.float32],
        covered: NDArray[np.float64],
        rng: Random,
    ) -> tuple[Part, NDArray[np.float64]] | None:
        """Draw a place for a patch (height, width); return it, and how much of each object is covered then."""
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        for _ in range(self.trials):
            left, top = rng.randint(0, size[1] - patch[1]), rng.randint(0, size[0] - patch[0])
            target = (left, top, left + patch[1], top + patch[0])
            inner = np.minimum(boxes[:, 2:], target[2:]) - np.maximum(boxes[:, :2], target[:2])
            then = covered + np.clip(inner, 0, None).prod(1) / areas
            if (then <= self.max_cover).all():
                return target, then
        return None


def _blend(image: NDArray[np.uint8], other: Sample, window: Part, target: Part, boxes: NDArray[np.float32]) -> None:
    """Paste the window of `other` at `target`: fully within the boxes, fading out towards the patch's border."""
    left, top, right, bottom = target
    patch = _resize(other.image[window[1] : window[3], window[0] : window[2]], right - left, bottom - top)
    x, y = np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5
    edges: Sequence[float] = [*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist()] if len(boxes) else target
    weight = np.outer(_ramp(y, top, edges[1], edges[3], bottom), _ramp(x, left, edges[0], edges[2], right))[..., None]
    below = image[top:bottom, left:right]
    image[top:bottom, left:right] = np.rint(weight * patch + (1 - weight) * below).astype(np.uint8)


def _ramp(at: NDArray[np.floating], start: float, full: float, end: float, stop: float) -> NDArray[np.floating]:
    """Return 1 from `full` to `end`, falling to 0 at `start` and `stop`; a margin of no width is no ramp."""
    rise = (at - start) / max(full - start, 1e-6)
    fall = (stop - at) / max(stop - end, 1e-6)
    weights: NDArray[np.floating[Any]] = np.clip(np.minimum(rise, fall), 0, 1)
    return weights
