"""The best anchors of objects, found without the matrix of all anchors times all objects. Plain arrays.

The anchors of one shape form a lattice of equal boxes, so an anchor's overlap with an object in x depends on its column
alone and in y on its row alone, and both fall off from the object's centre to either side. The best anchor of a shape
is therefore found at the columns and rows next to that centre, or at the edge of the window of locations that are used,
and all anchors above some IoU lie within a rectangle of columns and rows. Only those are evaluated, in float32 and with
the operations of `torchvision.ops.box_iou`: IoUs, ties and positives are exactly those of `detector.assignment.match`.

Shapes: `S` anchor shapes (levels times anchors per location), `N` images, `M` objects of all images. Sizes are (height,
width). An axis of length 2 is x, then y.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detector.anchors import AnchorConfig, AnchorGenerator

Array = NDArray[Any]

TIE = np.float32(1 - 1e-5)
"""An anchor at or above this part of an object's best IoU is its best anchor, too, as in `match`."""
MARGIN = 1e-3
"""Searched windows are wider by this, relative to an IoU and in pixels: far above all rounding of corners."""
CHUNK = 1_000_000
"""Pairs of anchor and object that are evaluated at once."""


@dataclass(frozen=True, eq=False)
class AnchorLattices:
    """The anchors of every shape: where they are and what they are called.

    Attributes:
        level, stride, scale, aspect_ratio, width, height: (S,) of each shape; sides in pixels as they are used.
        low, high: (2, S, n) corners of a shape's anchors by column and by row, float32.
    """

    level: Array
    stride: Array
    scale: Array
    aspect_ratio: Array
    width: Array
    height: Array
    low: Array
    high: Array


@dataclass(frozen=True, eq=False)
class Windows:
    """First and last column and row, inclusive, (2, N, S) each; empty where the last is below the first."""

    first: Array
    last: Array

    def count(self) -> Array:
        """Return the number of locations (N, S) within."""
        number: Array = np.maximum(self.last - self.first + 1, 0).prod(axis=0)
        return number

    def take(self, rows: Array) -> "Windows":
        """Return the windows of the images `rows` (M,): those of objects from those of their images."""
        return Windows(self.first[:, rows], self.last[:, rows])


@dataclass(frozen=True, eq=False)
class ObjectMatches:
    """The matches that training makes of objects and anchors.

    Attributes:
        best_iou: (M,) float32, highest IoU with an anchor that is used; 0 where there is none.
        is_best: (M, S) bool, the shapes that reach it: several where they tie, none where `best_iou` is 0.
        positives: (N,) positive anchors of each image.
        positives_of_shape: (S,) the same over all images.
    """

    best_iou: Array
    is_best: Array
    positives: Array
    positives_of_shape: Array


def anchor_lattices(config: AnchorConfig, strides: Sequence[int], largest: tuple[int, int]) -> AnchorLattices:
    """Return all lattices that cover images up to `largest`, cut out of what `AnchorGenerator` gives.

    Locations are a stride apart. So they are with `spacing: fitted`, too, where the padded image is a multiple of the
    level's stride; elsewhere that spreads a level's last, cut cell over its side, differently in each image.

    Raises:
        InputError: The configuration does not fit the number of levels.
    """
    generator = AnchorGenerator(replace(config, spacing="stride"), strides)
    cells = -(-max(largest) // min(strides))
    corners = np.stack([_corners(generator, (1, cells))[..., ::2], _corners(generator, (cells, 1))[..., 1::2]])
    names = [(level, *name) for level in range(len(strides)) for name in config.shapes_of_level(level)]
    level, scale, aspect_ratio = (np.array(column) for column in zip(*names, strict=True))
    boxes = torch.cat(generator.cells).double().numpy()
    return AnchorLattices(
        level=level,
        stride=np.asarray(strides)[level],
        scale=scale.astype(np.float64),
        aspect_ratio=aspect_ratio.astype(np.float64),
        width=boxes[:, 2] - boxes[:, 0],
        height=boxes[:, 3] - boxes[:, 1],
        low=corners[..., 0],
        high=corners[..., 1],
    )


def _corners(generator: AnchorGenerator, size: tuple[int, int]) -> Array:
    """Return the anchors (S, n, 4) of a feature map one cell high or wide."""
    levels = generator([size] * len(generator.strides), torch.device("cpu"))
    counts = generator.anchors_per_location
    per_level = [level.view(-1, count, 4).transpose(0, 1) for level, count in zip(levels, counts, strict=True)]
    return torch.cat(per_level).contiguous().numpy()


def all_locations(lattices: AnchorLattices, sizes: Array) -> Windows:
    """Return the locations of images of `sizes` (N, 2): ceil(side / stride) of them, without a batch's padding."""
    last = -(-sizes.T[::-1, :, None] // lattices.stride) - 1
    return Windows(np.zeros_like(last), last)


def legal_locations(lattices: AnchorLattices, sizes: Array) -> Windows:
    """Return the locations at which an anchor is inside of images of `sizes` (N, 2), as `boxes.is_inside` has it."""
    limits = sizes.T[::-1].astype(np.float32)
    first = np.array([[np.searchsorted(low, 0.0) for low in axis] for axis in lattices.low])
    last = [
        np.stack([np.searchsorted(high, limit, side="right") - 1 for high in axis], axis=1)
        for axis, limit in zip(lattices.high, limits, strict=True)
    ]
    return Windows(np.repeat(first[:, None], len(sizes), axis=1), np.stack(last))


def best_ious(lattices: AnchorLattices, windows: Windows, boxes: Array) -> tuple[Array, Array]:
    """Return the best IoU (M, S) of each object with each shape, and its overlaps (2, M, S) in pixels, float64.

    Args:
        lattices: The anchors.
        windows: The locations that are used, (2, M, S): those of each object's image.
        boxes: (M, 4) xyxy in pixels of the resized image.
    """
    boxes = boxes.astype(np.float64)
    low, high = boxes[:, :2].T[..., None], boxes[:, 2:].T[..., None]
    center = 0.5 * (lattices.low[..., 0].astype(np.float64) + lattices.high[..., 0])
    before = np.floor(((low + high) / 2 - center[:, None]) / lattices.stride).astype(np.int64)
    axis, shape = np.arange(2)[:, None, None], np.arange(len(lattices.stride))
    overlaps = np.zeros(windows.first.shape)
    for index in (before, before + 1):
        # Of an empty window any index will do.
        index = np.clip(np.clip(index, windows.first, windows.last), 0, lattices.low.shape[2] - 1)
        place = axis, shape, index
        overlap = np.minimum(lattices.high[place], high) - np.maximum(lattices.low[place], low)
        overlaps = np.maximum(overlaps, overlap)
    overlaps = np.where(windows.last >= windows.first, overlaps, 0.0)
    inter = overlaps[0] * overlaps[1]
    return inter / (lattices.width * lattices.height + _areas(boxes)[:, None] - inter), overlaps


def match_objects(
    lattices: AnchorLattices,
    windows: Windows,
    boxes: Array,
    image: Array,
    positive_iou: float,
    best_per_object: bool,
) -> ObjectMatches:
    """Match the objects of many images, as `detector.assignment.match` does for each image.

    Args:
        lattices: The anchors.
        windows: The locations that are used, (2, N, S).
        boxes: (M, 4) xyxy float32 in pixels of the resized image.
        image: (M,) position of each object's image, ascending.
        positive_iou: As in `match`; above 0.
        best_per_object: As in `match`.
    """
    (_, shapes, cells), images = lattices.low.shape, windows.first.shape[1]
    best, is_best = np.zeros(len(boxes), np.float32), np.zeros((len(boxes), shapes), bool)
    positives, of_shape = np.zeros(images, np.int64), np.zeros(shapes, np.int64)
    for rows in _slices(image, CHUNK // max(8 * shapes, 1)):
        pairs = _candidate_pairs(lattices, windows.take(image[rows]), boxes[rows], positive_iou)
        for part in _slices(image[rows][pairs.object], CHUNK, pairs.count()):
            chosen = pairs.take(part)
            owner, shape, (column, row), iou = _evaluate(lattices, chosen, boxes[rows])
            highest = np.zeros(len(boxes[rows]), np.float32)
            np.maximum.at(highest, owner, iou)
            tied = (iou >= highest[owner] * TIE) & (iou > 0)
            best[rows] = np.maximum(best[rows], highest)
            is_best[rows.start + owner[tied], shape[tied]] = True
            positive = iou >= np.float32(positive_iou)
            if best_per_object:
                positive |= tied
            anchor = (image[rows][owner] * cells + row) * cells + column
            keys = np.unique((anchor * shapes + shape)[positive])  # an anchor may serve several objects
            of_shape += np.bincount(keys % shapes, minlength=shapes)
            positives += np.bincount(keys // (shapes * cells**2), minlength=images)
    return ObjectMatches(best, is_best, positives, of_shape)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Objects and shapes (P,), and where to look: the first location and the sides (2, P) of a rectangle."""

    object: Array
    shape: Array
    first: Array
    sides: Array

    def count(self) -> Array:
        number: Array = self.sides[0] * self.sides[1]
        return number

    def take(self, part: slice) -> "_Pairs":
        return _Pairs(self.object[part], self.shape[part], self.first[:, part], self.sides[:, part])


def _candidate_pairs(lattices: AnchorLattices, windows: Windows, boxes: Array, positive_iou: float) -> _Pairs:
    """Return all that can be positive or an object's best, and little more."""
    ious, overlaps = best_ious(lattices, windows, boxes)
    least = np.minimum(ious.max(axis=1), positive_iou) * (1 - MARGIN)
    owner, shape = np.nonzero((ious >= least[:, None]) & (ious > 0))
    box, least, stride = boxes[owner].astype(np.float64), least[owner], lattices.stride[shape]
    area = lattices.width[shape] * lattices.height[shape]
    inter = least * (area + _areas(box)) / (1 + least)  # IoU >= least is overlap >= inter
    needed = inter / (overlaps[::-1, owner, shape] + MARGIN) - MARGIN
    start = np.ceil((box[:, :2].T + needed - lattices.high[:, shape, 0]) / stride - MARGIN).astype(np.int64)
    stop = np.floor((box[:, 2:].T - needed - lattices.low[:, shape, 0]) / stride + MARGIN).astype(np.int64)
    first = np.maximum(start, windows.first[:, owner, shape])
    sides = np.maximum(np.minimum(stop, windows.last[:, owner, shape]) - first + 1, 0)
    return _Pairs(owner, shape, first, sides)


def _evaluate(lattices: AnchorLattices, pairs: _Pairs, boxes: Array) -> tuple[Array, Array, Array, Array]:
    """Return object, shape, column and row, and float32 IoU of every anchor in the rectangles of `pairs`."""
    count = pairs.count()
    pair = np.repeat(np.arange(len(count)), count)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(count) - count, count)
    owner, shape, columns = pairs.object[pair], pairs.shape[pair], pairs.sides[0, pair]
    place = pairs.first[:, pair] + np.stack((within % columns, within // columns))
    low, high = (corners[np.arange(2)[:, None], shape, place] for corners in (lattices.low, lattices.high))
    box = boxes[owner]
    overlap = np.maximum(np.minimum(box[:, 2:].T, high) - np.maximum(box[:, :2].T, low), np.float32(0))
    inter, (width, height) = overlap[0] * overlap[1], high - low
    return owner, shape, place, inter / (_areas(box) + width * height - inter)


def _areas(boxes: Array) -> Array:
    areas: Array = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return areas


def _slices(image: Array, limit: int, weight: Array | None = None) -> Iterator[slice]:
    """Yield slices of whole images, ascending, and of about `limit` in weight (default: 1 per row)."""
    if not len(image):
        return
    starts = np.flatnonzero(np.r_[True, image[1:] != image[:-1]])
    total = np.r_[0, np.cumsum(np.ones(len(image), np.int64) if weight is None else weight)][starts]
    cuts = starts[np.flatnonzero(np.r_[True, total[1:] // max(limit, 1) != total[:-1] // max(limit, 1)])]
    for start, stop in zip(cuts, [*cuts[1:], len(image)], strict=True):
        yield slice(int(start), int(stop))
