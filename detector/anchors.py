"""Anchors: the reference boxes at every location of every feature level.

A anchors per location, L levels, N all anchors of an image. Within a level anchors lie row by row, and within a
location in the order of the config, which is the order in which the RPN head's output is flattened.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from detector.errors import InputError, check_numbers
from detector.kernels.transfers import send
from detector.parts import Part, name_of, settle

MOST_SHAPES = 10_000  # of all levels; a network with more would not be of use, nor ever made


class AnchorShapes(Part):
    """Anchors of one's own around each location, `anchors.generator`; where locations are, options of anchors say."""

    @abstractmethod
    def __call__(self, level: int) -> Tensor:
        """Return the anchors (A, 4) around the origin, in pixels after resizing, of a level, counted from the finest.

        Their order is that of the RPN head's channels; levels may have different numbers of anchors.
        """


@dataclass
class AnchorConfig:
    """Anchors of the region proposal network.

    Args:
        scales: Square roots of the anchors' areas in units of `base_size`: one list for all levels, or one list per
            level (a list of lists, fine to coarse). The paper: [8, 16, 32], that is 128, 256 and 512 pixels after
            resizing.
        aspect_ratios: Height / width, at equal area: one list for all levels, or one list per level. Levels that differ
            in their number of anchors have output layers of their own in the RPN's head. The paper: [0.5, 1, 2].
        base_size: Pixels of scale 1.
        center_offset: Centre of the first anchor, in pixels from the corner of the image: `zero` (torchvision,
            detectron2), `half_stride` (py-faster-rcnn in continuous coordinates: its inclusive base box (0, 0, 15, 15)
            is centred here), `half_stride_minus_half` ((stride - 1) / 2: ports that keep that code's number but drop
            its "+1").
        spacing: Distance of neighbouring locations in pixels: `stride` (the level's own), or `fitted`, the padded
            image's side divided by the number of cells, rounded down (torchvision: at its coarsest level 56 instead of
            64 where the side is 224).
        rounding: `none`, `nearest`: the corners around a location to whole pixels (torchvision), or `base_sides`: the
            sides at scale 1, the width first and the height from it (py-faster-rcnn: 23 x 12 instead of 22.6 x 11.3).
        straddling: Whether anchors that cross the image border are used in training: `drop` (the paper) or `keep`
            (torchvision, detectron2).
        order: Which of the two varies slowest within a location: `ratio_major` (py-faster-rcnn and torchvision) or
            `scale_major`.
        sizes: Widths and heights in pixels after resizing, instead of scales x aspect_ratios, such as [[37, 52], [90,
            40]]: one list for all levels, or one list per level (YOLOv2 and v3 take theirs from k-means).
        generator: Of the anchors of a location: `grid` (scales x aspect_ratios, or sizes), or a class of one's own.
    """

    scales: list[float] | list[list[float]] = field(default_factory=lambda: [8.0, 16.0, 32.0])
    aspect_ratios: list[float] | list[list[float]] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    base_size: float = 16.0
    center_offset: Literal["zero", "half_stride", "half_stride_minus_half"] = "half_stride"
    spacing: Literal["stride", "fitted"] = "stride"
    rounding: Literal["none", "nearest", "base_sides"] = "none"
    straddling: Literal["drop", "keep"] = "drop"
    order: Literal["ratio_major", "scale_major"] = "ratio_major"
    sizes: list[list[float]] | list[list[list[float]]] | None = None
    generator: Literal["grid"] | AnchorShapes = "grid"

    def __post_init__(self) -> None:
        settle("anchors", self)
        scales, ratios = _numbers(self.scales), _numbers(self.aspect_ratios)
        for key, values in (("scales", scales), ("aspect_ratios", ratios)):
            if not values or min(values) <= 0:
                raise InputError(f"anchors.{key}: {getattr(self, key)} must be a list of positive numbers")
        if self.sizes is not None:
            levels: Any = self.sizes if self.is_per_level("sizes") else [self.sizes]
            pairs = [_numbers([size]) for level in levels for size in level]
            if not all(levels) or not all(len(pair) == 2 and min(pair) > 0 for pair in pairs):
                raise InputError(
                    f"anchors.sizes: {self.sizes} must be a list of [width, height] in pixels, or one list per level"
                )
            if len(pairs) > MOST_SHAPES:
                raise InputError(f"anchors.sizes: {len(pairs)} of them; at most {MOST_SHAPES} shapes")
        if len(scales) * len(ratios) > MOST_SHAPES:
            raise InputError(
                f"anchors: {len(scales)} scales x {len(ratios)} aspect_ratios; at most {MOST_SHAPES} shapes"
            )
        check_numbers("anchors", self, {"(0, inf]": "base_size"})

    def shapes_of_level(self, level: int) -> list[tuple[float, float]]:
        """Return (scale, aspect ratio) of the anchors of a location of one feature level, in their order.

        Anchors that are given by their sizes have no scale: it is nan.
        """
        if self.by_size:
            return [(math.nan, round(height / width, 4)) for width, height in self.of_level("sizes", level)]
        scales, ratios = self.of_level("scales", level), self.of_level("aspect_ratios", level)
        if self.order == "ratio_major":
            return [(scale, ratio) for ratio in ratios for scale in scales]
        return [(scale, ratio) for scale in scales for ratio in ratios]

    def of_level(self, key: str, level: int) -> list[Any]:
        """Return the scales, aspect_ratios or sizes, whichever is named, of one feature level."""
        if key == "sizes" and isinstance(self.generator, AnchorShapes):
            anchors = base_anchors(self, level)
            return [[round(side, 4) for side in size] for size in (anchors[:, 2:] - anchors[:, :2]).tolist()]
        values = getattr(self, key)
        return list(values[level] if self.is_per_level(key) else values)

    @property
    def by_size(self) -> bool:
        """Return whether anchors are known by their widths and heights, instead of scales and aspect ratios."""
        return self.sizes is not None or isinstance(self.generator, AnchorShapes)

    def is_per_level(self, key: str) -> bool:
        """Return whether scales, aspect_ratios or sizes, whichever is named, are listed per level."""
        first: Any = getattr(self, key)
        for _ in range(2 if key == "sizes" else 1):
            first = first[0] if isinstance(first, list) and first else None
        return isinstance(first, list)

    def names_of_level(self, level: int) -> list[str]:
        """Return the names of the anchors of a location of one feature level, such as scale8_ratio0.5 or 37x52."""
        if self.by_size:
            return [f"{width:g}x{height:g}" for width, height in self.of_level("sizes", level)]
        return [f"scale{scale:g}_ratio{ratio:g}" for scale, ratio in self.shapes_of_level(level)]


def _numbers(values: Any) -> list[float]:
    """Return the numbers of nested lists in one list."""
    return [n for value in values for n in (_numbers(value) if isinstance(value, Sequence) else [value])]


def base_anchors(config: AnchorConfig, level: int = 0) -> Tensor:
    """Return the anchors (A, 4) of one level around the origin, float32.

    Up to rounding, width = side / sqrt(ratio) and height = side * sqrt(ratio).
    """
    if isinstance(config.generator, AnchorShapes):
        return _checked(config.generator(level), config.generator)
    if config.sizes is not None:
        sides = torch.tensor(config.of_level("sizes", level), dtype=torch.float64)
    else:
        scales = torch.tensor(config.of_level("scales", level), dtype=torch.float64)
        ratios = torch.tensor(config.of_level("aspect_ratios", level), dtype=torch.float64)
        widths, heights = config.base_size / ratios.sqrt(), config.base_size * ratios.sqrt()
        if config.rounding == "base_sides":
            widths = widths.round()
            heights = (widths * ratios).round()
        sides = torch.stack((widths, heights), dim=1)[:, None] * scales[None, :, None]  # (ratios, scales, 2)
        if config.order == "scale_major":
            sides = sides.transpose(0, 1)
    corners = sides.reshape(-1, 2) / 2
    if config.rounding == "nearest":
        corners = corners.round()
    return torch.cat((-corners, corners), dim=1).float()


def _checked(anchors: Tensor, generator: AnchorShapes) -> Tensor:
    if (
        anchors.dim() != 2
        or anchors.shape[1] != 4
        or not len(anchors)
        or not bool((anchors[:, 2:] > anchors[:, :2]).all())
    ):
        raise InputError(
            f"anchors.generator {name_of(generator)}: must give boxes (A, 4), x1 y1 x2 y2, of positive width and height"
        )
    return anchors.float()


class AnchorGenerator:
    """Anchors for feature maps of given sizes; those used last are kept, since images of a data set share their sizes.

    `strides` are pixels per cell of each level, fine to coarse.

    Attributes:
        anchors_per_location: A of each level.

    Raises:
        InputError: The lists per level do not fit the number of levels.
    """

    cache_bytes = 2**26
    """Of the anchors that are kept; those of the size used last are kept in any case."""

    def __init__(self, config: AnchorConfig, strides: Sequence[int]) -> None:
        keys = ["scales", "aspect_ratios"] if config.sizes is None else ["sizes"]
        for key in [] if isinstance(config.generator, AnchorShapes) else keys:
            if config.is_per_level(key) and len(getattr(config, key)) != len(strides):
                raise InputError(
                    f"anchors.{key}: {len(getattr(config, key))} lists for {len(strides)} levels of strides "
                    f"{tuple(strides)}; give one list per level, or one list for all"
                )
        self.config = config
        self.strides = tuple(strides)
        self.cells = [base_anchors(config, level) for level in range(len(strides))]
        self.anchors_per_location = tuple(len(cell) for cell in self.cells)
        self._cache: dict[tuple[object, ...], list[Tensor]] = {}

    def __call__(self, feature_sizes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
        """Return one tensor (height * width * A, 4) per level, for feature maps of sizes (height, width).

        The tensors are kept for later calls: do not write into them.
        """
        key = (*feature_sizes, device)
        found = self._cache.pop(key, None) or [
            self.level(send(cell, device), spacing, size)
            for cell, spacing, size in zip(self.cells, self.spacings(feature_sizes), feature_sizes, strict=True)
        ]
        self._cache[key] = found  # the last one
        while (
            len(self._cache) > 1
            and sum(level.nbytes for own in self._cache.values() for level in own) > self.cache_bytes
        ):
            self._cache.pop(next(iter(self._cache)))
        return found

    def spacings(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the pixels between rows and between columns of locations of each level."""
        if self.config.spacing == "stride":
            return [(stride, stride) for stride in self.strides]
        # Images are padded to multiples of the finest stride, so its level tells their size.
        height, width = (cells * self.strides[0] for cells in sizes[0])
        return [(height // rows, width // columns) for rows, columns in sizes]

    def level(self, cell: Tensor, spacing: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Return the anchors (height * width * A, 4) of a level of `size` (height, width) from those of one cell."""
        offset = {"zero": (0.0, 0.0), "half_stride": (0.5, 0.0), "half_stride_minus_half": (0.5, -0.5)}
        factor, shift = offset[self.config.center_offset]
        ys, xs = (
            torch.arange(n, dtype=torch.float32, device=cell.device) * step + (factor * step + shift)
            for n, step in zip(size, spacing, strict=True)
        )
        y, x = torch.meshgrid(ys, xs, indexing="ij")
        centers = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
        return (centers + cell).reshape(-1, 4)
