"""Box arithmetic: deltas <-> boxes, clipping, sides. Pure tensor functions in float32.

Boxes are `xyxy` in continuous pixels (width = x2 - x1). Deltas are (dx, dy, dw, dh): the shift of the centre in units
of the reference box's sides, and the logarithm of the ratio of sides (Faster R-CNN, section 3.1.2, eq. 2).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detector.kernels.transfers import constant

MAX_LOG_RATIO = math.log(1000 / 16)
"""Upper clamp of dw and dh before `exp`, so that an untrained head cannot overflow (Detectron's value)."""


def centers_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return centre x, centre y, width and height, each (...), of boxes (..., 4)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height


def encode(
    boxes: Tensor,
    references: Tensor,
    std: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    mean: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
) -> Tensor:
    """Return the deltas (..., 4) from `references` (..., 4) to `boxes` (..., 4), less `mean`, divided by `std`."""
    cx, cy, w, h = centers_and_sides(boxes.float())
    rx, ry, rw, rh = centers_and_sides(references.float())
    deltas = torch.stack(((cx - rx) / rw, (cy - ry) / rh, torch.log(w / rw), torch.log(h / rh)), dim=-1)
    return (deltas - constant(mean, deltas)) / constant(std, deltas)


def decode(
    deltas: Tensor,
    references: Tensor,
    std: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    mean: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
) -> Tensor:
    """Return the boxes (..., 4), float32, of deltas (..., 4) at `references` (..., 4): `encode` undone, but clamped."""
    deltas = deltas.float()
    dx, dy, dw, dh = (deltas * constant(std, deltas) + constant(mean, deltas)).unbind(-1)
    rx, ry, rw, rh = centers_and_sides(references.float())
    cx, cy = rx + dx * rw, ry + dy * rh
    half_w = 0.5 * rw * dw.clamp(max=MAX_LOG_RATIO).exp()
    half_h = 0.5 * rh * dh.clamp(max=MAX_LOG_RATIO).exp()
    return torch.stack((cx - half_w, cy - half_h, cx + half_w, cy + half_h), dim=-1)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut boxes (..., 4) to an image of `size` (height, width)."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), constant((width, height, width, height), boxes))


def has_sides_of(boxes: Tensor, minimum: float) -> Tensor:
    """Return a mask (...,) of the boxes (..., 4) whose both sides are at least `minimum` pixels long."""
    return (boxes[..., 2:] - boxes[..., :2] >= minimum).all(dim=-1)


def is_inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask (...,) of the boxes (..., 4) that do not cross the border of an image of `size` (height, width)."""
    height, width = size
    limit = constant((width, height), boxes)
    return (boxes[..., :2] >= 0).all(dim=-1) & (boxes[..., 2:] <= limit).all(dim=-1)
