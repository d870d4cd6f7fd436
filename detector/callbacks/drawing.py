"""Boxes with labels on an image, for TensorBoard, predictions and notebooks."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GROUND_TRUTH_COLOR = (255, 255, 255)


def class_color(label: int) -> tuple[int, int, int]:
    """A distinct RGB colour for class `label` (1..C): hues a golden ratio apart, the same in every picture."""
    hue = (0.11 + label * 0.61803398875) % 1.0
    channels = [np.clip(abs(((hue + shift) % 1.0) * 6 - 3) - 1, 0, 1) for shift in (0, 2 / 3, 1 / 3)]
    red, green, blue = (int(55 + 200 * c) for c in channels)
    return red, green, blue


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    captions: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    dashed: bool = False,
    min_side: int = 0,
) -> Tensor:
    """Draw boxes (D, 4) with captions on an image (3, H, W) uint8 RGB.

    Args:
        image: Not changed.
        boxes: `xyxy` in continuous pixels of the image.
        captions: D texts, "" for none.
        colors: D RGB colours.
        dashed: Draw dashed outlines (ground truth beside detections).
        min_side: Enlarge the picture by a whole factor until its shorter side has at least this many pixels, so that
            captions on small images stay readable.

    Returns:
        The picture (3, H * factor, W * factor), uint8.
    """
    factor = max(1, -(-min_side // min(image.shape[-2:])))
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    side = min(picture.size)
    width = max(1, round(side / 200))
    font = ImageFont.load_default(size=max(10, round(side / 30)))
    for box, caption, color in zip((boxes * factor).tolist(), captions, colors, strict=True):
        x1, y1, x2, y2 = box[0], box[1], max(box[0], box[2] - 1), max(box[1], box[3] - 1)
        if dashed:
            _dashed_rectangle(draw, (x1, y1, x2, y2), color, width)
        else:
            draw.rectangle((x1, y1, x2, y2), outline=color, width=width)
        if caption:
            _caption(draw, picture.size, (x1, y1), caption, color, font)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


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
    """Text on a filled strip above the box's upper left corner, moved into the picture where it would leave it."""
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
