"""Boxes with captions on an image, for TensorBoard, predictions, contact sheets and notebooks.

D boxes of an image, K captions, P places for a caption.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detector.errors import InputError
from detector.files import write_whole

GROUND_TRUTH_COLOR = (255, 255, 255)
_STRIP: Final = (40, 40, 40)  # behind legends
LARGEST_SIDE: Final = 65_500  # of a JPEG
LARGEST_ENLARGED: Final = 8192  # the longer side of an enlarged picture: of a strip of pixels would be gigabytes
_MARK: Final = b"drawn by frcnn"
# Bright colours, far from each other to all eyes, also to those that lack red or green. By their order and the salt
# VOC's twenty classes have twenty of them, and MiniVOC's six are far apart.
_PALETTE: Final = bytes.fromhex(
    "00f069 ffc300 78d296 a54b5a 1ec35a c396f0 69ffff 87d2ff ff5a96 d26969 00a596 873cd2 1ed2d2 f0f01e c387b4 009600"
    "ffa5d2 f0964b b469b4 5a87d2 b400a5 b4ff87 00ffc3 d269ff d2e196 005aff f03cd2 2d965a c33c87 1e96ff ff3c2d b4783c"
)
_SALT: Final = 1309712
_MOST_COVERED: Final = 0.5  # share of an object that a caption may cover
_LEFT_OUT: Final = "\u2026"

Color = tuple[int, int, int]
_Array = NDArray[np.float64]


def class_color(name: str) -> Color:
    """Return the RGB colour of a class: it follows from the name alone, whatever its case, blanks and underscores."""
    plain = name.casefold().replace(" ", "").replace("_", "")
    digest = hashlib.sha256(f"{_SALT}{plain}".encode(errors="surrogatepass")).digest()
    return palette_color(int.from_bytes(digest[:4], "big"))


def palette_color(number: int) -> Color:
    """Return the RGB colour of a number, of which there are 32."""
    first = 3 * (number % (len(_PALETTE) // 3))
    red, green, blue = _PALETTE[first : first + 3]
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
    colors: Sequence[Color],
    dashed: Sequence[bool] = (),
    min_side: int = 0,
    max_side: int = LARGEST_SIDE,
    view_width: int = 0,
    thin: Sequence[bool] = (),
) -> Tensor:
    """Draw boxes (D, 4) with captions on an image (3, H, W) uint8 RGB.

    Captions lie where they cover no other caption and as little of all boxes as possible, above or below their box,
    beside it or in its corners. Where there is no room they are smaller; where there is none at all, or half of a box
    would be covered, three dots stand for them. Later boxes lie on top of earlier ones, and choose first.

    Args:
        image: Not changed.
        boxes: `xyxy` in continuous pixels of the image.
        captions: D texts, "" for none.
        colors: D RGB colours.
        dashed: Which of the D outlines are dashed, such as those of ground truth beside detections; empty: none.
        min_side: Enlarge the picture by a whole factor until its shorter side has at least this many pixels, so that
            captions on small images stay readable; its longer side grows to `LARGEST_ENLARGED` at most.
        max_side: Make the picture smaller where its longer side has more pixels than that.
        view_width: Pixels of the width at which the picture will be looked at, whatever its own: it is enlarged to that
            width, instead of by `min_side`, and lines and captions are sized for it. 0: it is looked at as it is.
        thin: Which of the D outlines are half as wide; empty: none.

    Returns:
        The picture, uint8 (3, H', W') of `picture_size`.
    """
    height, width = image.shape[-2:]
    size = picture_size(height, width, min_side, max_side)
    line, heights = min(size) / 200, None
    if view_width:
        enlarged = max(1.0, min(view_width / width, max_side / max(height, width)))
        size = picture_size(round(height * enlarged), round(width * enlarged), max_side=max_side)
        line = size[1] / view_width * 2
        heights = [max(1, round(size[1] / view_width * pixels)) for pixels in (13, 11)]
    corners = boxes.double().cpu().numpy() * ([size[1] / width, size[0] / height] * 2)
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    if size != (height, width):
        picture = picture.resize(size[::-1], Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    none = [False] * len(colors)
    for (x1, y1, x2, y2), color, dashes, half in zip(corners, colors, dashed or none, thin or none, strict=True):
        _outline(draw, (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), color, line * (0.5 if half else 1), dashes)
    for caption in _Layout(corners, size).captions(captions, heights):
        color = colors[caption.box]
        draw.rectangle(caption.strip, fill=color)
        draw.text(caption.origin, caption.text, fill=_ink(color), font=caption.font)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


class LegendEntry(NamedTuple):
    """A text of a legend and the look of the outlines that it explains."""

    text: str
    color: Color
    dashed: bool = False
    thin: bool = False


def with_legend(picture: Tensor, entries: Sequence[LegendEntry], view_width: int, title: str = "") -> Tensor:
    """Return a picture (3, H, W) with a strip below that holds a title and a legend, sized as by `draw_boxes`."""
    width, unit = picture.shape[2], picture.shape[2] / view_width
    font = ImageFont.load_default(size=max(1, round(12 * unit)))
    row, margin, swatch = round(17 * unit), round(5 * unit), round(18 * unit)
    end = width - margin
    words: list[tuple[float, int, str, LegendEntry | None]] = []  # x, row, text and what it explains
    items = [(word, None) for word in title.split()] + [(entry.text, entry) for entry in entries]
    x, line = float(margin), 0
    for text, entry in items:
        length = font.getlength(text) + (swatch + margin if entry else 0)
        begins = entry is not None and bool(words) and words[-1][3] is None  # the legend, below the title
        if begins or (x > margin and x + length > end):
            x, line = margin, line + 1
        words.append((x, line, text, entry))
        x += length + (2 * margin if entry else font.getlength(" "))
    strip = Image.new("RGB", (width, (line + 1) * row + margin), _STRIP)
    draw = ImageDraw.Draw(strip)
    for x, line, text, entry in words:
        middle = margin / 2 + (line + 0.5) * row
        if entry is not None:
            corners = (x, middle - swatch / 3, x + swatch, middle + swatch / 3)
            _outline(draw, corners, entry.color, unit if entry.thin or entry.dashed else 2 * unit, entry.dashed)
            x += swatch + margin
        draw.text((x, middle), text, GROUND_TRUTH_COLOR, font, anchor="lm")
    return torch.cat((picture, torch.from_numpy(np.asarray(strip).copy()).permute(2, 0, 1)), dim=1)


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
    image: Tensor,
    detections: dict[str, Tensor],
    class_names: Sequence[str],
    score_threshold: float,
    truth: Tensor | None = None,
    truth_captions: Sequence[str] | None = None,
    min_side: int = 0,
    max_side: int = LARGEST_SIDE,
) -> Tensor:
    """Draw detections with a score of at least `score_threshold`, the best on top; see `draw_boxes`.

    Args:
        image: Not changed.
        detections: `boxes` (D, 4), `labels` (D,) and `scores` (D,), the best first.
        class_names: Of labels 1..C.
        score_threshold: Detections below are not drawn.
        truth: Boxes (G, 4) of the objects, drawn dashed in white under the detections; None: none.
        truth_captions: G texts; None: none.
        min_side: As in `draw_boxes`.
        max_side: As in `draw_boxes`.
    """
    objects = torch.zeros(0, 4) if truth is None else truth.cpu()
    shown = (detections["scores"] >= score_threshold).nonzero().flatten().flip(0).cpu()
    names = [class_names[label - 1] for label in detections["labels"].cpu()[shown].tolist()]
    scores = detections["scores"].cpu()[shown].tolist()
    return draw_boxes(
        image,
        torch.cat((objects, detections["boxes"].cpu()[shown])),
        [*(truth_captions or [""] * len(objects)), *map("{} {:.2f}".format, names, scores)],
        [GROUND_TRUTH_COLOR] * len(objects) + [class_color(name) for name in names],
        [True] * len(objects) + [False] * len(names),
        min_side=min_side,
        max_side=max_side,
    )


class _Caption(NamedTuple):
    """A text of the box at index `box`, its origin, and its strip (x1, y1, x2, y2) in whole pixels, ends included."""

    box: int
    text: str
    font: Any
    strip: tuple[int, int, int, int]
    origin: tuple[int, int]


class _Layout:
    """Places for captions, one after another, in a picture of `size` (height, width) with boxes (D, 4)."""

    def __init__(self, boxes: _Array, size: tuple[int, int]) -> None:
        self.boxes, self.size = boxes, size
        self.areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).clip(min=1)
        self.covered = np.zeros(len(boxes))  # the share of each box that lies under captions
        self.taken = np.empty((0, 4))

    def captions(self, texts: Sequence[str], heights: Sequence[int] | None = None) -> list[_Caption]:
        """Place all D texts, the last ones first, and then marks of those that find no place.

        `heights` of letters are tried in their order; None: those that fit the picture's size.
        """
        side = min(self.size)
        smallest = max(10, side // 80)
        heights = heights or sorted({max(smallest, round(side / 30 * 0.75**step)) for step in range(4)}, reverse=True)
        fonts = [ImageFont.load_default(size=height) for height in heights]
        indices = [index for index in reversed(range(len(texts))) if texts[index]]
        placed = [self._place(index, texts[index], fonts) for index in indices]
        left_out = [index for index, caption in zip(indices, placed, strict=True) if caption is None]
        placed += [self._place(index, _LEFT_OUT, fonts[-1:]) for index in left_out]
        return [caption for caption in placed if caption is not None]

    def _place(self, index: int, text: str, fonts: Sequence[Any]) -> _Caption | None:
        """Find the place of a text with the least cost: the shares of boxes that it covers, and a little for the rest.

        That is, for smaller fonts and for less usual places; a mark is inside its box where it can be.
        """
        insides = [font.getbbox(text) for font in fonts]
        pads = [max(2, round((bottom - top) / 5)) for _, top, _, bottom in insides]
        strips = np.concatenate(
            [
                self._strips(self.boxes[index], right - left + 2 * pad, bottom - top + 2 * pad)
                for (left, top, right, bottom), pad in zip(insides, pads, strict=True)
            ]
        )
        shares = _shared_areas(strips, self.boxes) / self.areas
        forbidden = _shared_areas(strips, self.taken).any(axis=1) | (strips[:, 2:] > self.size[::-1]).any(axis=1)
        font, place = np.divmod(np.arange(len(strips)), len(strips) // len(fonts))
        if text == _LEFT_OUT:
            place = (place + 4) % 10
        else:
            forbidden |= ((shares > 0) & (self.covered + shares > _MOST_COVERED)).any(axis=1)
        if forbidden.all():
            return None
        best = int(np.where(forbidden, np.inf, shares.sum(axis=1) + 0.02 * place + 0.1 * font).argmin())
        self.taken, self.covered = np.vstack((self.taken, strips[best])), self.covered + shares[best]
        x1, y1, x2, y2 = (int(corner) for corner in strips[best])
        (left, top, _, _), pad = insides[font[best]], pads[font[best]]
        origin = x1 + pad - round(left), y1 + pad - round(top)
        return _Caption(index, text, fonts[font[best]], (x1, y1, x2 - 1, y2 - 1), origin)

    def _strips(self, box: _Array, width: float, height: float) -> _Array:
        """Return strips (10, 4) at a box (4,), moved into the picture: four outside, two beside, four inside."""
        x1, y1, x2, y2 = box
        left, right = x1, x2 - width
        corners = np.array(
            [
                *((left, y1 - height), (right, y1 - height), (left, y2), (right, y2)),
                *((x2, y1), (x1 - width, y1)),
                *((left, y1), (right, y1), (left, y2 - height), (right, y2 - height)),
            ]
        )
        corners = np.minimum(corners, np.subtract(self.size[::-1], (width, height))).clip(min=0).round()
        return np.hstack((corners, np.ceil(corners + np.array((width, height)))))


def _shared_areas(strips: _Array, boxes: _Array) -> _Array:
    """Return the area in pixels that each of the strips (P, 4) shares with each of the boxes (K, 4), (P, K)."""
    sides = np.minimum(strips[:, None, 2:], boxes[:, 2:]) - np.maximum(strips[:, None, :2], boxes[:, :2])
    areas: _Array = np.prod(sides.clip(min=0), axis=2)
    return areas


def _ink(color: Color) -> Color:
    """Return black or white, whichever differs more in luminance from a colour behind it (WCAG 2.1, contrast ratio)."""
    channels = np.array(color) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return (0, 0, 0) if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else (255, 255, 255)


def _outline(
    draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], color: Color, line: float, dashed: bool
) -> None:
    width = max(1, round(line))
    if not dashed:
        draw.rectangle(box, outline=color, width=width)
        return
    x1, y1, x2, y2 = box
    dash = 4 * width
    for x in np.arange(x1, x2, 2 * dash):
        for y in (y1, y2):
            draw.line((x, y, min(x + dash, x2), y), fill=color, width=width)
    for y in np.arange(y1, y2, 2 * dash):
        for x in (x1, x2):
            draw.line((x, y, x, min(y + dash, y2)), fill=color, width=width)
