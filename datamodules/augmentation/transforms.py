"""Augmentations of one image: flip, colours, crop, scale, jitter of scale.

Written out, because albumentations' `Compose` takes longer for a flip with its boxes than decoding the JPEG does. Each
is called with a sample, its source of randomness, and a function that draws another image (not needed here).
"""

from collections.abc import Callable, Sequence
from random import Random

import cv2
import numpy as np
from numpy.typing import NDArray

from datamodules.augmentation.samples import Sample, place
from detector.errors import InputError

Partner = Callable[[], Sample]

cv2.setNumThreads(0)  # data loading runs in worker processes; threads inside them only get in each other's way


def check_share(name: str, value: float) -> float:
    """Return the value, or raise InputError unless it is a number in 0..1."""
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}; it must be a number from 0 to 1")
    return value


class Step:
    """One step of an augmentation.

    Args:
        p: Probability that it is applied.
    """

    def __init__(self, p: float = 1.0) -> None:
        self.p = check_share(f"{type(self).__name__}: p", p)

    def __call__(self, sample: Sample, rng: Random, partner: Partner) -> Sample:
        """Return the sample or a changed one, as a function of the arguments alone."""
        return self.apply(sample, rng, partner) if rng.random() < self.p else sample

    def apply(self, sample: Sample, rng: Random, partner: Partner) -> Sample:
        """Return a changed sample."""
        raise NotImplementedError


class HorizontalFlip(Step):
    """Mirror left and right: x becomes W - x."""

    def apply(self, sample: Sample, rng: Random, partner: Partner) -> Sample:
        """Return the mirrored sample."""
        boxes = sample.boxes.copy()
        boxes[:, [0, 2]] = sample.size[1] - sample.boxes[:, [2, 0]]
        return sample._replace(image=np.asarray(cv2.flip(sample.image, 1), np.uint8), boxes=boxes)


class ColorJitter(Step):
    """Brightness, contrast, saturation and hue, in an order drawn anew each time, as torchvision's `ColorJitter`.

    Args:
        brightness: Range of the factor.
        contrast: Range of the factor, about the image's mean grey.
        saturation: Range of the factor, about each pixel's grey.
        hue: Range of the shift, in turns.
        p: Probability that it is applied.
    """

    def __init__(
        self,
        brightness: Sequence[float] = (0.75, 1.25),
        contrast: Sequence[float] = (0.6, 1.4),
        saturation: Sequence[float] = (0.6, 1.4),
        hue: Sequence[float] = (-0.05, 0.05),
        p: float = 0.8,
    ) -> None:
        super().__init__(p)
        self.ranges = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        for name, values in self.ranges.items():
            if len(values) != 2 or values[0] > values[1]:
                raise InputError(f"ColorJitter: {name} is {values!r}; it must be [least, greatest]")

    def apply(self, sample: Sample, rng: Random, partner: Partner) -> Sample:
        """Return the sample with other colours."""
        factors = {name: rng.uniform(*values) for name, values in self.ranges.items()}
        image = sample.image
        for name in rng.sample(list(factors), len(factors)):
            image = _COLOR_STEPS[name](image, factors[name])
        return sample._replace(image=image)


def _linear(image: NDArray[np.uint8], factor: float, shift: float = 0.0) -> NDArray[np.uint8]:
    return np.asarray(cv2.addWeighted(image, factor, image, 0, shift), np.uint8)  # rounded, and kept in 0..255


def _contrast(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    return _linear(image, factor, mean * (1 - factor))


def _saturation(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.asarray(cv2.addWeighted(image, factor, grey, 1 - factor, 0), np.uint8)


def _hue(image: NDArray[np.uint8], turns: float) -> NDArray[np.uint8]:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)  # hue in 0..179
    table = np.mod(np.rint(np.arange(256) + 180 * turns), 180).astype(np.uint8)
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, 0), table), hsv, 0)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


_COLOR_STEPS: dict[str, Callable[[NDArray[np.uint8], float], NDArray[np.uint8]]] = {
    "brightness": _linear,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
}


class MinIoUCrop(Step):
    """Random crop that keeps a minimum overlap with some object (SSD, Liu et al. 2016, section 2.2).

    Draws the minimum IoU from {whole image, 0.1, 0.3, 0.5, 0.7, 0.9, 0}; then up to `trials` patches whose sides are
    `min_scale`..1 of the image's and whose aspect ratio (height / width) is in 0.5..2; the first patch whose best IoU
    with an object reaches the minimum is taken. The image stays whole when none does or when it has no objects.

    Args:
        min_scale: Shortest patch side as a share of the image's.
        trials: Patches tried.
        p: Probability of cropping at all.
    """

    OVERLAPS: tuple[float | None, ...] = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)

    def __init__(self, min_scale: float = 0.3, trials: int = 50, p: float = 1.0) -> None:
        super().__init__(p)
        self.min_scale = check_share("MinIoUCrop: min_scale", min_scale)
        self.trials = trials

    def apply(self, sample: Sample, rng: Random, partner: Partner) -> Sample:
        """Return a crop, in whole pixels."""
        patch = self._draw(sample, rng)
        if patch is None:
            return sample
        x1, y1, x2, y2 = patch
        boxes, which = place(sample.boxes, patch, (0, 0, x2 - x1, y2 - y1))
        return sample.take(np.ascontiguousarray(sample.image[y1:y2, x1:x2]), boxes, which)

    def _draw(self, sample: Sample, rng: Random) -> tuple[int, int, int, int] | None:
        overlap = rng.choice(self.OVERLAPS)
        if overlap is None or not len(sample.boxes):
            return None
        boxes, (height, width) = sample.boxes.astype(np.float64), sample.size
        for _ in range(self.trials):
            w, h = (max(1, round(side * rng.uniform(self.min_scale, 1.0))) for side in (width, height))
            if 0.5 <= h / w <= 2.0:
                left, top = rng.randint(0, width - w), rng.randint(0, height - h)
                patch = left, top, left + w, top + h
                if _best_iou(patch, boxes) >= max(overlap, 1e-6):
                    return patch
        return None


def _best_iou(patch: tuple[int, int, int, int], boxes: NDArray[np.float64]) -> float:
    top_left = np.maximum(boxes[:, :2], patch[:2])
    bottom_right = np.minimum(boxes[:, 2:], patch[2:])
    inter = np.clip(bottom_right - top_left, 0, None).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return float((inter / (areas + (patch[2] - patch[0]) * (patch[3] - patch[1]) - inter)).max())


class LargeScaleJitter(Step):
    """Large-scale jitter (Ghiasi et al. 2021): resize by a factor of a wide range, then crop or pad to a square.

    At factor 1 the longer side fills the square. What does not fit is cut off at a random place; what is left of the
    square, below and to the right, has ImageNet's mean colour, which the network sees as its own padding.

    Args:
        size: Side of the square in pixels; null: the image's longer side. The paper: 1024. The network resizes squares
            by `image.shortest_side` like any image: give it the same number.
        scales: Range of the factor, drawn uniformly.
        p: Probability that it is applied.
    """

    PADDING = (124, 116, 104)

    def __init__(self, size: int | None = None, scales: Sequence[float] = (0.1, 2.0), p: float = 1.0) -> None:
        super().__init__(p)
        if size is not None and not (isinstance(size, int) and 1 <= size <= 16384):
            raise InputError(f"LargeScaleJitter: size is {size!r}; it must be a number of pixels, or null")
        if len(scales) != 2 or not 0.01 <= scales[0] <= scales[1] <= 10:
            raise InputError(f"LargeScaleJitter: scales is {scales!r}; it must be [least, greatest] from 0.01 to 10")
        self.size, self.scales = size, (float(scales[0]), float(scales[1]))

    def apply(self, sample: Sample, rng: Random, partner: Partner) -> Sample:
        """Return the square."""
        height, width = sample.size
        size = self.size or max(height, width)
        factor = rng.uniform(*self.scales) * size / max(height, width)
        wide, high = max(1, round(width * factor)), max(1, round(height * factor))
        left, top = (rng.randint(0, max(side - size, 0)) for side in (wide, high))
        seen_wide, seen_high = min(wide, size), min(high, size)
        interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        resized = np.asarray(cv2.resize(sample.image, (wide, high), interpolation=interpolation), np.uint8)
        image = np.full((size, size, 3), self.PADDING, np.uint8)
        image[:seen_high, :seen_wide] = resized[top : top + seen_high, left : left + seen_wide]
        x, y = wide / width, high / height
        window = left / x, top / y, (left + seen_wide) / x, (top + seen_high) / y
        boxes, which = place(sample.boxes, window, (0, 0, seen_wide, seen_high))
        return sample.take(image, boxes, which)


class MultiScale:
    """Draw how large the network sees an image, as a factor of `--model.image.shortest_side`.

    The pixels stay as they are: `detector/image_batch.py` resizes, and reads the factor from the target's `scale`.
    Images with a factor of at most 1 need no more memory than without.

    Args:
        factors: Drawn with equal probability. Default: the sides 480, 512, ..., 800 of detectron2's VOC
            experiments as shares of the last one, with which they evaluate.
    """

    FACTORS = tuple(side / 800 for side in (*range(480, 800, 32), 800))

    def __init__(self, factors: Sequence[float] = FACTORS) -> None:
        if not factors or not all(isinstance(factor, int | float) and 0.1 <= factor <= 4 for factor in factors):
            raise InputError(f"MultiScale: factors is {factors!r}; it must list numbers from 0.1 to 4")
        self.factors = [float(factor) for factor in factors]

    def draw(self, rng: Random) -> float:
        """Draw one of the factors."""
        return rng.choice(self.factors)
