"""Boxes with labels on an image, for TensorBoard, predictions and notebooks."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detector.errors import InputError
from detector.files import write_whole

GROUND_TRUTH_COLOR = (255, 255, 255)
LARGEST_SIDE: Final = 65_500  # of a JPEG
LARGEST_ENLARGED: Final = 8192  # the longer side of an enlarged picture: of a strip of pixels would be gigabytes
_MARK: Final = b"drawn by frcnn"


def class_color(label: int) -> tuple[int, int, int]:
    """Return an RGB colour for class `label` (1..C): hues a golden ratio apart, the same in every picture."""
    hue = (0.11 + label * 0.61803398875) % 1.0
    channels = [np.clip(abs(((hue + shift) % 1.0) * 6 - 3) - 1, 0, 1) for shift in (0, 2 / 3, 1 / 3)]
    red, green, blue = (int(55 + 200 * c) for c in channels)
    return red, green, blue


def picture_size(height: int, width: int, min_side: int = 0, max_side: int = LARGEST_SIDE) -> tuple[int, int]:
    """Return the (height, width) of the picture that `draw_boxes` draws of an image."""
    shortest, longest = min(height, width), max(height, width)
    if longest > max_side:
        return max(1, round(height * max_side / longest)), max(1, round(width * max_side / longest))
    factor = max(1, min(-(-min_side // shortest), min(LARGEST_ENLARGED, max_side) // longest))
    return height * factor, width * factor


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    captions: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    dashed: bool = False,
    min_side: int = 0,
    max_side: int = LARGEST_SIDE,
) -> Tensor:
    """Draw boxes (D, 4) with captions on an image (3, H, W) uint8 RGB.

    Args:
        image: Not changed.
        boxes: `xyxy` in continuous pixels of the image.
        captions: D texts, "" for none.
        colors: D RGB colours.
        dashed: Draw dashed outlines (ground truth beside detections).
        min_side: Enlarge the picture by a whole factor until its shorter side has at least this many pixels, so that
            captions on small images stay readable; its longer side grows to `LARGEST_ENLARGED` at most.
        max_side: Make the picture smaller where its longer side has more pixels than that.

    Returns:
        The picture, uint8 (3, H', W') of `picture_size`.
    """
    size = picture_size(image.shape[-2], image.shape[-1], min_side, max_side)
    boxes = boxes * scale_to(image, size).to(boxes)
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    if size != tuple(image.shape[-2:]):
        picture = picture.resize(size[::-1], Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    side = min(picture.size)
    width = max(1, round(side / 200))
    font = ImageFont.load_default(size=max(10, round(side / 30)))
    for box, caption, color in zip(boxes.tolist(), captions, colors, strict=True):
        x1, y1, x2, y2 = box[0], box[1], max(box[0], box[2] - 1), max(box[1], box[3] - 1)
        if dashed:
            _dashed_rectangle(draw, (x1, y1, x2, y2), color, width)
        else:
            draw.rectangle((x1, y1, x2, y2), outline=color, width=width)
        if caption:
            _caption(draw, picture.size, (x1, y1), caption, color, font)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


def scale_to(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the factors (4,) for the boxes of an image in its picture of `size` (height, width)."""
    height, width = image.shape[-2:]
    return torch.tensor([size[1] / width, size[0] / height] * 2)


def save_picture(picture: Tensor, path: Path) -> None:
    """Write a picture (3, H, W) as a JPEG file that says where it comes from.

    Raises:
        InputError: There is a file of somebody else, which is not overwritten.
        OSError: It cannot be written.
    """
    if os.path.lexists(path) and not is_saved_picture(path):
        raise InputError(f"{path}: is there already, and not drawn by frcnn; it is not overwritten")
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(buffer, "JPEG", quality=92, comment=_MARK)
    write_whole(path, buffer.getvalue())


def is_saved_picture(path: Path) -> bool:
    """Return whether `save_picture` wrote this file."""
    try:
        if path.is_symlink() or not path.is_file():
            return False
        with path.open("rb") as file:
            return _MARK in file.read(200)  # the comment stands before the tables
    except OSError:
        return False


def draw_detections(
    image: Tensor, detections: dict[str, Tensor], class_names: Sequence[str], score_threshold: float, min_side: int = 0
) -> Tensor:
    """Draw detections with a score of at least `score_threshold`, the best on top; see `draw_boxes`."""
    shown = (detections["scores"] >= score_threshold).nonzero().flatten().flip(0).cpu()
    labels = detections["labels"].cpu()[shown].tolist()
    scores = detections["scores"].cpu()[shown].tolist()
    captions = [f"{class_names[label - 1]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    return draw_boxes(
        image, detections["boxes"].cpu()[shown], captions, [class_color(label) for label in labels], min_side=min_side
    )


def _caption(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corner: tuple[float, float],
    text: str,
    color: tuple[int, int, int],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """Write a text on a filled strip above the box's upper left corner, within the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    x = max(0.0, min(corner[0], size[0] - (right - left) - 4))
    y = max(0.0, corner[1] - (bottom - top) - 4)
    draw.rectangle((x, y, x + right - left + 4, y + bottom - top + 4), fill=color)
    dark = sum(color) < 300
    draw.text((x + 2 - left, y + 2 - top), text, fill=(255, 255, 255) if dark else (0, 0, 0), font=font)


def _dashed_rectangle(
    draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], color: tuple[int, int, int], width: int
) -> None:
    x1, y1, x2, y2 = box
    dash = 4 * width
    for x in np.arange(x1, x2, 2 * dash):
        for y in (y1, y2):
            draw.line((x, y, min(x + dash, x2), y), fill=color, width=width)
    for y in np.arange(y1, y2, 2 * dash):
        for x in (x1, x2):
            draw.line((x, y, x, min(y + dash, y2)), fill=color, width=width)
