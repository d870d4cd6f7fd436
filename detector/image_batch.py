"""Images of different sizes -> one padded, normalised batch on the device, and boxes back to the original images.

B images. Resizing happens here, once, for training, evaluation and prediction alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detector import boxes as box_ops
from detector.errors import InputError, check_choices, check_numbers
from detector.kernels.parts import IMAGES, part
from detector.kernels.transfers import constant, one_by_one, rows_of_images, together
from detector.sampling import GroundTruth


@dataclass
class ImageConfig:
    """Size and normalisation of the images that the network sees.

    Args:
        shortest_side: Target length in pixels of an image's shorter side. Several values: training draws one for each
            image, evaluation uses the last. The paper: [600]; torchvision and detectron2 at test: 800.
        longest_side: Upper limit of the longer side in pixels, which wins over `shortest_side`. The paper: 1000;
            torchvision and detectron2: 1333.
        mean: Subtracted, per channel in the order of `channel_order`, after scaling to 0..`pixel_max`.
        std: Divided by, likewise.
        channel_order: `rgb` (torchvision's weights) or `bgr` (caffe's weights).
        pixel_max: Images are scaled to 0..`pixel_max`: 1 for torchvision's weights, 255 for caffe's.
        pad_multiple: Batches are padded at the bottom and right to a multiple of this many pixels.
        test_flip: In evaluation, also detect on the mirrored image, and merge the detections by NMS.
        test_shortest_sides: In evaluation, detect at each of these shortest sides, and merge the detections by NMS. The
            limit of the longer side grows and shrinks with them: where 600 goes up to 1000, 1200 goes up to 2000.
            Empty: `shortest_side` alone, as in the paper's tables.
    """

    shortest_side: list[int] = field(default_factory=lambda: [600])
    longest_side: int = 1000
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    channel_order: Literal["rgb", "bgr"] = "rgb"
    pixel_max: float = 1.0
    pad_multiple: int = 32
    test_flip: bool = False
    test_shortest_sides: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.shortest_side or min(self.shortest_side) < 16:
            raise InputError(f"image.shortest_side: {self.shortest_side} must list sides of at least 16 pixels")
        if self.longest_side < max(self.shortest_side):
            raise InputError(
                f"image.longest_side: {self.longest_side} is below the largest shortest_side {max(self.shortest_side)}"
            )
        if len(self.mean) != 3 or len(self.std) != 3:
            raise InputError(f"image.mean and image.std: got {len(self.mean)} and {len(self.std)} numbers; give 3 each")
        check_choices("image", self)
        allowed = {"(0, inf]": "std", "[1, inf]": "pad_multiple", "[16, inf]": "test_shortest_sides"}
        check_numbers("image", self, allowed)


class ImageBatch(NamedTuple):
    """A batch for the backbone.

    tensors: (B, 3, H, W) float, channels last in memory. sizes: (height, width) of each image within it, without
    padding.
    original_sizes: (height, width) before resizing.
    """

    tensors: Tensor
    sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]


def resized_size(size: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    """Return (height, width) scaled to a shorter side of `shortest`, or less where the longer would exceed `longest`.

    Rounded down, as torchvision's detectors do.
    """
    height, width = size
    scale = min(shortest / min(size), longest / max(size))
    return max(1, int(height * scale)), max(1, int(width * scale))


@part(IMAGES)
def make_batch(
    images: Sequence[Tensor], config: ImageConfig, training: bool, scales: Sequence[float] | None = None
) -> ImageBatch:
    """Resize (bilinear), normalise and pad images, each uint8 or float in 0..255, (3, h, w) RGB, into one batch.

    `scales` multiply the shortest side of each image (the augmentation `multiscale` draws them); `longest_side` remains
    the limit.
    """
    originals = [(int(im.shape[-2]), int(im.shape[-1])) for im in images]
    sizes = []
    for size, scale in zip(originals, scales or [1.0] * len(images), strict=True):
        sides = config.shortest_side
        shortest = sides[int(torch.randint(len(sides), (1,)))] if training and len(sides) > 1 else sides[-1]
        sizes.append(resized_size(size, max(1, round(shortest * scale)), config.longest_side))
    multiple = config.pad_multiple
    height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes, strict=True))
    channels_last = torch.zeros(len(images), height, width, 3, device=images[0].device)  # in memory
    batch = channels_last.permute(0, 3, 1, 2)

    def alike(index: int) -> object:
        """Return what neighbours share that are prepared together: on CPUs nothing, whose caches hold one at most."""
        return index if one_by_one(images[0]) else (originals[index], sizes[index], images[index].dtype)

    for _, neighbours in groupby(range(len(images)), alike):
        first, *others = neighbours
        pixels = images[first][None] if not others else torch.stack([images[first], *(images[i] for i in others)])
        rows, columns = sizes[first]
        prepared = _prepared(pixels, sizes[first], config)
        batch[first : first + len(prepared), :, :rows, :columns] = prepared
    return ImageBatch(batch, sizes, originals)


def _prepared(images: Tensor, size: tuple[int, int], config: ImageConfig) -> Tensor:
    """Return images (n, 3, h, w) normalised and resized."""
    factor = config.pixel_max / 255
    pixels = images.float().mul_(factor) if images.dtype == torch.uint8 else images * factor
    if config.channel_order == "bgr":
        pixels = pixels.flip(1)
    mean, std = (constant(values, pixels)[:, None, None] for values in (config.mean, config.std))
    pixels = pixels.sub_(mean).div_(std)  # in place: of a large photograph each copy takes gigabytes
    if size == tuple(images.shape[-2:]):
        return pixels
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)


def drawn_scales(targets: Sequence[dict[str, Any]]) -> list[float]:
    """Return the factor of each image's shortest side that an augmentation drew, 1 where a target has none."""
    return [float(target.get("scale", 1.0)) for target in targets]


def ground_truth(targets: Sequence[dict[str, Any]], batch: ImageBatch) -> list[GroundTruth]:
    """Return the targets, which are in original pixels, as ground truth in the pixels of the batch."""
    boxes = to_batch([target["boxes"].float() for target in targets], batch)
    return [
        GroundTruth(own, target["labels"], target["difficult"].bool())
        for own, target in zip(boxes, targets, strict=True)
    ]


def to_batch(boxes: Sequence[Tensor], batch: ImageBatch) -> list[Tensor]:
    """Return boxes (n, 4) of each image, in pixels of the original images, in pixels of the batch."""
    return [
        rescale(own, original, size)
        for own, original, size in zip(boxes, batch.original_sizes, batch.sizes, strict=True)
    ]


def all_to_original(boxes: Sequence[Tensor], batch: ImageBatch) -> list[Tensor]:
    """Return boxes (n, 4) of each image in pixels of the batch as `to_original` does."""
    counts, every = [len(own) for own in boxes], together(boxes)
    pairs = zip(batch.sizes, batch.original_sizes, strict=True)
    factors = rows_of_images([_factors(size, original) for size, original in pairs], counts, every)
    corners = rows_of_images([(w, h, w, h) for h, w in batch.original_sizes], counts, every)
    return list(box_ops.clip(every * factors, corners).split(counts))


def to_original(boxes: Tensor, batch: ImageBatch, image: int) -> Tensor:
    """Return boxes (..., 4) in pixels of the batch as boxes in pixels of the original image, clipped to it."""
    return box_ops.clip(rescale(boxes, batch.sizes[image], batch.original_sizes[image]), batch.original_sizes[image])


def rescale(boxes: Tensor, from_size: tuple[int, int], to_size: tuple[int, int]) -> Tensor:
    """Return boxes (..., 4) of an image of `from_size` (height, width) in the same image at `to_size`."""
    return boxes * constant(_factors(from_size, to_size), boxes)


def _factors(from_size: tuple[int, int], to_size: tuple[int, int]) -> tuple[float, ...]:
    """Return those of corners (x1, y1, x2, y2)."""
    return (to_size[1] / from_size[1], to_size[0] / from_size[0]) * 2
