"""Training-time augmentation recipes by name, built on albumentations, and their seeding.

Boxes are (G, 4) xyxy, continuous pixels. Images are not resized here: `detector/image_batch.py` does that.
"""

from __future__ import annotations

import os
import random

# albumentations asks PyPI for its newest version when it is imported; nothing here touches the network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
from albumentations.augmentations.crops.transforms import BaseCrop
from numpy.typing import NDArray

from detector.errors import InputError

AUGMENTATIONS = ("none", "flip", "photometric", "ssd_crop")
MIN_VISIBLE = 0.25  # of an object's area; less than this left in the crop and the object is dropped
MIN_SIDE = 1.0  # pixels

cv2.setNumThreads(0)  # data loading runs in worker processes; threads inside them only get in each other's way


class MinIoUCrop(BaseCrop):  # type: ignore[misc]
    """Random crop that keeps a minimum overlap with some object (SSD, Liu et al. 2016, section 2.2).

    Draws the minimum IoU from {whole image, 0.1, 0.3, 0.5, 0.7, 0.9, 0}; then up to `trials` patches whose sides are
    `min_scale`..1 of the image's and whose aspect ratio (height / width) is in 0.5..2; the first patch whose best IoU
    with an object reaches the minimum is taken. The image stays whole when none does or when it has no objects.

    Args:
        min_scale: shortest patch side as a share of the image's.
        trials: patches tried.
        p: probability of cropping at all.
    """

    OVERLAPS: tuple[float | None, ...] = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)

    def __init__(self, min_scale: float = 0.3, trials: int = 50, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.min_scale = min_scale
        self.trials = trials

    @property
    def targets_as_params(self) -> list[str]:
        return ["bboxes"]

    def get_params_dependent_on_data(
        self, params: dict[str, tuple[int, ...]], data: dict[str, NDArray[np.float32]]
    ) -> dict[str, tuple[int, int, int, int]]:
        """The crop as {"crop_coords": (x1, y1, x2, y2)}, whole pixels; boxes in `data` are normalised to 0..1."""
        height, width = params["shape"][:2]
        boxes = np.asarray(data["bboxes"], dtype=np.float64)
        overlap = self.py_random.choice(self.OVERLAPS)
        whole = (0, 0, width, height)
        if overlap is None or not len(boxes):
            return {"crop_coords": whole}
        boxes = boxes[:, :4] * (width, height, width, height)
        for _ in range(self.trials):
            patch = self._patch(height, width)
            if patch is not None and _best_iou(patch, boxes) >= max(overlap, 1e-6):
                return {"crop_coords": patch}
        return {"crop_coords": whole}

    def _patch(self, height: int, width: int) -> tuple[int, int, int, int] | None:
        patch_w = max(1, round(width * self.py_random.uniform(self.min_scale, 1.0)))
        patch_h = max(1, round(height * self.py_random.uniform(self.min_scale, 1.0)))
        if not 0.5 <= patch_h / patch_w <= 2.0:
            return None
        left, top = self.py_random.randint(0, width - patch_w), self.py_random.randint(0, height - patch_h)
        return left, top, left + patch_w, top + patch_h


def _best_iou(patch: tuple[int, int, int, int], boxes: NDArray[np.float64]) -> float:
    top_left = np.maximum(boxes[:, :2], patch[:2])
    bottom_right = np.minimum(boxes[:, 2:], patch[2:])
    inter = np.clip(bottom_right - top_left, 0, None).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return float((inter / (areas + (patch[2] - patch[0]) * (patch[3] - patch[1]) - inter)).max())


def build_augmentation(name: str) -> A.Compose | None:
    """The recipe of that name, or None for "none".

    - `none`: the image as it is.
    - `flip`: horizontal flip with probability 0.5 (the Faster R-CNN paper's only augmentation).
    - `photometric`: flip, and with probability 0.8 brightness x 0.75..1.25, contrast and saturation x 0.6..1.4,
      hue +- 0.05 of a turn.
    - `ssd_crop`: `MinIoUCrop`, then `photometric`.

    Raises:
        InputError: for any other name.
    """
    flip = A.HorizontalFlip(p=0.5)
    jitter = A.ColorJitter(
        brightness=(0.75, 1.25), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.05, 0.05), p=0.8
    )
    recipes: dict[str, list[A.BasicTransform]] = {
        "none": [],
        "flip": [flip],
        "photometric": [flip, jitter],
        "ssd_crop": [MinIoUCrop(), flip, jitter],
    }
    if name not in recipes:
        raise InputError(f"augmentation {name!r} is unknown; choose one of {', '.join(AUGMENTATIONS)}")
    if not recipes[name]:
        return None
    # Objects are dropped by `augment`, which knows their full size; here only what is wholly outside goes.
    return A.Compose(recipes[name], bbox_params=A.BboxParams(format="pascal_voc", min_area=1e-2, clip=True))


def augment(
    compose: A.Compose, image: NDArray[np.uint8], boxes: NDArray[np.float32], seed: np.random.SeedSequence
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]:
    """Apply a recipe; the outcome depends on the arguments alone, not on what was drawn before.

    An object is dropped when less than a quarter of its area is left, or a side of less than one pixel (an object
    that was smaller than that before is kept if it was not cut). None may be left.

    Args:
        compose: from `build_augmentation`; its random state is overwritten.
        image: uint8 (H, W, 3).
        boxes: float32 (G, 4) xyxy pixels within the image, of positive area.
        seed: source of all randomness; not changed.

    Returns:
        image uint8 (H', W', 3), boxes float32 (K, 4), and int64 (K,) which of the G objects each box belongs to.
    """
    # One generator shared by all transforms. `Compose.set_random_seed` would give each transform its own generator
    # with the same seed: "flip" and "jitter" would then draw the same numbers and happen together.
    words = seed.generate_state(8)
    python_random = random.Random(int.from_bytes(words[:4].tobytes(), "little"))
    compose.set_random_state(np.random.default_rng(words[4:]), python_random)
    rows = np.concatenate([boxes, np.arange(len(boxes), dtype=np.float32)[:, None]], axis=1, dtype=np.float32)
    result = compose(image=image, bboxes=rows)
    out_image: NDArray[np.uint8] = result["image"]
    found = np.asarray(result["bboxes"], dtype=np.float32)
    if not len(found):
        return out_image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    out_height, out_width = out_image.shape[:2]
    limit = np.array([out_width, out_height, out_width, out_height], dtype=np.float32)
    out_boxes = np.clip(found[:, :4], 0, limit)
    which = np.rint(found[:, 4]).astype(np.int64)
    before = (boxes[:, 2:] - boxes[:, :2])[which]
    after = out_boxes[:, 2:] - out_boxes[:, :2]
    # The slack is far above float32 rounding and far below anything visible.
    keep = (after.prod(1) >= MIN_VISIBLE * before.prod(1) - 1e-3) & (after >= np.minimum(MIN_SIDE, before) - 1e-2).all(
        1
    )
    return out_image, out_boxes[keep], which[keep]
