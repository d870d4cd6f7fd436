"""One image with its objects while it is being augmented, and the rule by which cut objects are dropped.

Shape legend: `G` objects of an image, `H`, `W` its size in pixels.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_VISIBLE: Final = 0.25  # of an object's area; less than this left by a cut and the object is dropped
MIN_SIDE: Final = 1.0  # pixels


class Sample(NamedTuple):
    """An image and its objects; no step of an augmentation changes the arrays it is given.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        boxes: float32 (G, 4) xyxy pixels within the image, of positive area.
        labels: int64 (G,).
        difficult: bool (G,).
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width)."""
        return self.image.shape[0], self.image.shape[1]

    def take(self, image: NDArray[np.uint8], boxes: NDArray[np.float32], which: NDArray[np.intp]) -> Sample:
        """Return another image with the objects `which` (indices or a mask) of this one at new `boxes`."""
        return Sample(image, boxes, self.labels[which], self.difficult[which])


def place(
    boxes: NDArray[np.float32], window: tuple[float, float, float, float], target: tuple[float, float, float, float]
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Move boxes of an image of which `window` is shown at `target`, and `cut` them to what is seen.

    Args:
        boxes: (G, 4) xyxy pixels of the image.
        window: A part of the image, xyxy.
        target: The place of that part in another image, xyxy.

    Returns:
        Boxes float32 (K, 4) in the other image, and (K,) which of the G objects they belong to.
    """
    factors = (target[2] - target[0]) / (window[2] - window[0]), (target[3] - target[1]) / (window[3] - window[1])
    scale, shift = np.tile(factors, 2), np.tile(target[:2], 2)
    return cut(boxes, (boxes.astype(np.float64) - np.tile(window[:2], 2)) * scale + shift, target)


def cut(
    boxes: NDArray[np.float32], whole: NDArray[np.floating], target: tuple[float, float, float, float]
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Cut boxes to the part of an image that is seen.

    An object is dropped when less than a quarter of its area is seen, or a side of less than one pixel is left; one
    that was thinner than that in its own image stays as long as it is neither cut nor shrunk. None may be left.

    Args:
        boxes: (G, 4) xyxy pixels, as they were.
        whole: (G, 4) where they are now, uncut.
        target: The part, xyxy.

    Returns:
        Boxes float32 (K, 4), and (K,) which of the G objects they belong to.
    """
    whole = whole.astype(np.float64)
    seen = np.clip(whole, np.tile(target[:2], 2), np.tile(target[2:], 2))
    before, after = whole[:, 2:] - whole[:, :2], seen[:, 2:] - seen[:, :2]
    # The slack is far above rounding and far below anything visible.
    enough = after.prod(1) >= MIN_VISIBLE * before.prod(1) - 1e-3
    least = np.minimum(MIN_SIDE, boxes[:, 2:] - boxes[:, :2]) - 1e-2
    keep = enough & (after >= least).all(1) & (after > 0).all(1)
    return seen[keep].astype(np.float32), np.flatnonzero(keep)


def merge(image: NDArray[np.uint8], parts: list[Sample]) -> Sample:
    """Return `image` with the objects of all parts, whose boxes are already in its pixels."""
    return Sample(
        image,
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.difficult for part in parts]),
    )
