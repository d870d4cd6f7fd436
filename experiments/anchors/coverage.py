"""How well anchors cover objects, without the matrix of all anchors times all objects. Plain arrays.

The anchors of one shape form a lattice of equal boxes, so an anchor's overlap with an object in x depends on its column
alone and in y on its row alone, and both fall off from the object's centre to either side. The best anchor of a shape
is therefore found at the columns and rows next to that centre, or at the edge of the window of locations that are used,
and all anchors above some IoU lie within a rectangle of columns and rows. Only those are evaluated, in float32 and with
the operations of `torchvision.ops.box_iou`: IoUs, ties and positives are exactly those of `detector.sampling.match`.

Shapes: `S` anchor shapes (levels times anchors per location), `N` images, `M` objects of all images. Sizes are (height,
width).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detector.anchors import AnchorConfig, AnchorGenerator

Array = NDArray[Any]

TIE = np.float32(1 - 1e-5)
"""As in `match`: an anchor at or above this part of an object's best IoU is its best anchor, too."""
MARGIN = 1e-3
"""By which searched windows are wider, relative to an IoU and in pixels: far above all rounding of corners."""
CHUNK = 1_000_000
"""Pairs of anchor and object that are evaluated at once."""


@dataclass(frozen=True, eq=False)
class AnchorLattices:
    """The anchors of every shape: where they are and what they are called.

    Attributes:
        level, stride, scale, aspect_ratio, width, height: (S,) of each shape; sides in pixels as they are used.
        x1, x2: (S, columns) corners of a shape's anchors by column, float32.
        y1, y2: (S, rows) likewise by row.
    """

    level: Array
    stride: Array
    scale: Array
    aspect_ratio: Array
    width: Array
    height: Array
    x1: Array
    x2: Array
    y1: Array
    y2: Array


@dataclass(frozen=True, eq=False)
class Windows:
    """First and last column and row, inclusive, (N, S) each; empty where the last is below the first."""

    first_column: Array
    last_column: Array
    first_row: Array
    last_row: Array

    def count(self) -> Array:
        """Count the locations (N, S) within."""
        columns = np.maximum(self.last_column - self.first_column + 1, 0)
        number: Array = columns * np.maximum(self.last_row - self.first_row + 1, 0)
        return number

    def take(self, rows: Array) -> "Windows":
        """Return the windows of the images `rows` (M,), such as each object's image."""
        return Windows(self.first_column[rows], self.last_column[rows], self.first_row[rows], self.last_row[rows])


@dataclass(frozen=True, eq=False)
class ObjectMatches:
    """What training's matching makes of the objects.

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

    Raises:
        InputError: The configuration does not fit the number of levels.
    """
    generator = AnchorGenerator(config, strides)
    rows, columns = (-(-side // min(strides)) for side in largest)
    along_x = _corners(generator, (1, columns))
    along_y = _corners(generator, (rows, 1))
    names = [(level, *name) for level in range(len(strides)) for name in _names(config, level)]
    level, scale, aspect_ratio = (np.array(column) for column in zip(*names, strict=True))
    cells = torch.cat(generator.cells).double().numpy()
    return AnchorLattices(
        level=level,
        stride=np.asarray(strides)[level],
        scale=scale.astype(np.float64),
        aspect_ratio=aspect_ratio.astype(np.float64),
        width=cells[:, 2] - cells[:, 0],
        height=cells[:, 3] - cells[:, 1],
        x1=along_x[..., 0],
        x2=along_x[..., 2],
        y1=along_y[..., 1],
        y2=along_y[..., 3],
    )


def _corners(generator: AnchorGenerator, size: tuple[int, int]) -> Array:
    """Return the anchors (S, n, 4) of a feature map one cell high or wide."""
    levels = generator([size] * len(generator.strides), torch.device("cpu"))
    per_level = [level.view(-1, generator.anchors_per_location, 4).transpose(0, 1) for level in levels]
    return torch.cat(per_level).contiguous().numpy()


def _names(config: AnchorConfig, level: int) -> list[tuple[float, float]]:
    """Return (scale, aspect ratio) of a level's anchors, in their order."""
    scales, ratios = config.scales_of_level(level), config.aspect_ratios
    if config.order == "ratio_major":
        return [(scale, ratio) for ratio in ratios for scale in scales]
    return [(scale, ratio) for scale in scales for ratio in ratios]


def all_locations(lattices: AnchorLattices, sizes: Array) -> Windows:
    """Return the ceil(side / stride) rows and columns of images of `sizes` (N, 2), without a batch's padding."""
    last_row, last_column = (-(-sizes[:, axis, None] // lattices.stride) - 1 for axis in (0, 1))
    return Windows(np.zeros_like(last_column), last_column, np.zeros_like(last_row), last_row)


def legal_locations(lattices: AnchorLattices, sizes: Array) -> Windows:
    """Return where an anchor does not cross the border of images of `sizes` (N, 2); see `boxes.is_inside`."""
    limits = sizes.astype(np.float32)
    shapes = range(len(lattices.level))
    count = len(sizes)
    first_column, first_row = (
        np.tile([np.searchsorted(corner[s], 0.0) for s in shapes], (count, 1)) for corner in (lattices.x1, lattices.y1)
    )
    last_row, last_column = (
        np.stack([np.searchsorted(corner[s], limits[:, axis], side="right") - 1 for s in shapes], axis=1)
        for axis, corner in ((0, lattices.y2), (1, lattices.x2))
    )
    return Windows(first_column, last_column, first_row, last_row)


def best_ious(lattices: AnchorLattices, windows: Windows, boxes: Array) -> tuple[Array, Array, Array]:
    """Return the best IoU of each object with each shape, and its overlaps in x and in y, each (M, S) float64.

    Args:
        lattices: The anchors.
        windows: The locations that are used, (M, S): those of each object's image.
        boxes: (M, 4) xyxy in pixels of the resized image.
    """
    boxes = boxes.astype(np.float64)
    x = _best_overlap(
        lattices.x1, lattices.x2, lattices.stride, windows.first_column, windows.last_column, boxes[:, ::2]
    )
    y = _best_overlap(lattices.y1, lattices.y2, lattices.stride, windows.first_row, windows.last_row, boxes[:, 1::2])
    inter = x * y
    return inter / (lattices.width * lattices.height + _areas(boxes)[:, None] - inter), x, y


def _best_overlap(low: Array, high: Array, stride: Array, first: Array, last: Array, interval: Array) -> Array:
    """Return the longest overlap (M, S) of intervals (M, 2) with those (S, n) of lattices, from `first` to `last`."""
    center = 0.5 * (low[:, 0].astype(np.float64) + high[:, 0])
    before = np.floor((interval.mean(axis=1)[:, None] - center) / stride).astype(np.int64)
    shape = np.arange(len(low))
    best = np.zeros(first.shape)
    for index in (before, before + 1):
        # Of an empty window any index will do.
        index = np.clip(np.clip(index, first, last), 0, low.shape[1] - 1)
        overlap = np.minimum(high[shape, index], interval[:, 1:]) - np.maximum(low[shape, index], interval[:, :1])
        best = np.maximum(best, overlap)
    return np.where(last >= first, best, 0.0)


def match_objects(
    lattices: AnchorLattices,
    windows: Windows,
    boxes: Array,
    image: Array,
    positive_iou: float,
    best_per_object: bool,
) -> ObjectMatches:
    """Match the objects of many images, as `detector.sampling.match` does for each image.

    Args:
        lattices: The anchors.
        windows: The locations that are used, (N, S).
        boxes: (M, 4) xyxy float32 in pixels of the resized image.
        image: (M,) position of each object's image, ascending.
        positive_iou: As in `match`; above 0.
        best_per_object: As in `match`.
    """
    shapes, images = len(lattices.level), len(windows.first_row)
    best, is_best = np.zeros(len(boxes), np.float32), np.zeros((len(boxes), shapes), bool)
    positives, of_shape = np.zeros(images, np.int64), np.zeros(shapes, np.int64)
    for rows in _slices(image, CHUNK // max(8 * shapes, 1)):
        pairs = _candidate_pairs(lattices, windows.take(image[rows]), boxes[rows], positive_iou)
        for part in _slices(image[rows][pairs.object], CHUNK, pairs.count()):
            chosen = pairs.take(part)
            owner, shape, column, row, iou = _evaluate(lattices, chosen, boxes[rows])
            highest = np.zeros(len(boxes[rows]), np.float32)
            np.maximum.at(highest, owner, iou)
            tied = (iou >= highest[owner] * TIE) & (iou > 0)
            best[rows] = np.maximum(best[rows], highest)
            is_best[rows.start + owner[tied], shape[tied]] = True
            positive = iou >= np.float32(positive_iou)
            if best_per_object:
                positive |= tied
            anchor = (image[rows][owner] * lattices.y1.shape[1] + row) * lattices.x1.shape[1] + column
            keys = np.unique((anchor * shapes + shape)[positive])  # an anchor may serve several objects
            of_shape += np.bincount(keys % shapes, minlength=shapes)
            located = keys // (shapes * lattices.y1.shape[1] * lattices.x1.shape[1])
            positives += np.bincount(located, minlength=images)
    return ObjectMatches(best, is_best, positives, of_shape)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Objects and shapes (P,) with the rectangle of locations that may hold what is looked for."""

    object: Array
    shape: Array
    first_column: Array
    columns: Array
    first_row: Array
    rows: Array

    def count(self) -> Array:
        return self.columns * self.rows

    def take(self, part: slice) -> "_Pairs":
        return _Pairs(*(getattr(self, name)[part] for name in self.__dataclass_fields__))


def _candidate_pairs(lattices: AnchorLattices, windows: Windows, boxes: Array, positive_iou: float) -> _Pairs:
    """Return all that can be positive or an object's best, and little more."""
    ious, overlap_x, overlap_y = best_ious(lattices, windows, boxes)
    least = np.minimum(ious.max(axis=1), positive_iou) * (1 - MARGIN)
    owner, shape = np.nonzero((ious >= least[:, None]) & (ious > 0))
    box, least = boxes[owner].astype(np.float64), least[owner]
    area = lattices.width[shape] * lattices.height[shape]
    inter = least * (area + _areas(box)) / (1 + least)  # IoU >= least is overlap >= inter
    spans = []
    for low, high, other, first, last, side in (
        (lattices.x1, lattices.x2, overlap_y, windows.first_column, windows.last_column, box[:, ::2]),
        (lattices.y1, lattices.y2, overlap_x, windows.first_row, windows.last_row, box[:, 1::2]),
    ):
        needed = inter / (other[owner, shape] + MARGIN) - MARGIN
        stride = lattices.stride[shape]
        start = np.ceil((side[:, 0] + needed - high[shape, 0]) / stride - MARGIN).astype(np.int64)
        stop = np.floor((side[:, 1] - needed - low[shape, 0]) / stride + MARGIN).astype(np.int64)
        start = np.maximum(start, first[owner, shape])
        spans += [start, np.maximum(np.minimum(stop, last[owner, shape]) - start + 1, 0)]
    return _Pairs(owner, shape, *spans)


def _evaluate(lattices: AnchorLattices, pairs: _Pairs, boxes: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Return object, shape, column, row and float32 IoU of every anchor in the rectangles of `pairs`."""
    count = pairs.count()
    pair = np.repeat(np.arange(len(count)), count)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(count) - count, count)
    owner, shape = pairs.object[pair], pairs.shape[pair]
    column = pairs.first_column[pair] + within % pairs.columns[pair]
    row = pairs.first_row[pair] + within // pairs.columns[pair]
    x1, x2, y1, y2 = (
        corner[shape, index]
        for corner, index in ((lattices.x1, column), (lattices.x2, column), (lattices.y1, row), (lattices.y2, row))
    )
    left, top, right, bottom = boxes[owner].T
    overlap_x = np.maximum(np.minimum(right, x2) - np.maximum(left, x1), np.float32(0))
    overlap_y = np.maximum(np.minimum(bottom, y2) - np.maximum(top, y1), np.float32(0))
    inter = overlap_x * overlap_y
    union = (right - left) * (bottom - top) + (x2 - x1) * (y2 - y1) - inter
    return owner, shape, column, row, inter / union


def _areas(boxes: Array) -> Array:
    areas: Array = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return areas


def _slices(image: Array, limit: int, weight: Array | None = None) -> Iterator[slice]:
    """Cut rows, ascending by image, into slices of whole images and of about `limit` in weight (default: 1 per row)."""
    if not len(image):
        return
    starts = np.flatnonzero(np.r_[True, image[1:] != image[:-1]])
    total = np.r_[0, np.cumsum(np.ones(len(image), np.int64) if weight is None else weight)][starts]
    cuts = starts[np.flatnonzero(np.r_[True, total[1:] // max(limit, 1) != total[:-1] // max(limit, 1)])]
    for start, stop in zip(cuts, [*cuts[1:], len(image)], strict=True):
        yield slice(int(start), int(stop))
