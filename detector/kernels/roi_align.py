"""RoIAlign as weighted sums of feature cells.

Bilinear interpolation and the mean over a bin's sampling points are linear: each bin of a RoI is a weighted sum of at
most 4 S^2 cells. On CPUs these sums are an embedding bag over the table of all cells of all images and levels, where
a cell's channels lie side by side. That gives the same numbers as torchvision's `roi_align`, which reads one channel
after the other and whose gradient runs on one thread, in a tenth of its time.

L levels, R RoIs, P pool size, S sampling points per bin and axis.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def cells_and_weights(
    features: Sequence[Tensor],
    rois: Tensor,
    level_of_roi: Tensor,
    strides: Sequence[int],
    pool_size: int,
    sampling: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    """Return which cells each bin sums up, and their weights, both (R * P * P, 4 * S * S).

    Cells are counted image by image and row by row within a level, and on from level to level.
    """
    maps = torch.tensor([level.shape[-2:] for level in features])  # (L, 2)
    counts = [level.shape[0] * level.shape[2] * level.shape[3] for level in features]
    first_of_level = torch.tensor([0, *counts[:-1]]).cumsum(0)
    height, width = maps[level_of_roi].unbind(1)
    scale = torch.tensor([1.0 / stride for stride in strides])[level_of_roi]
    x1, y1, x2, y2 = (rois[:, 1:].float() * scale[:, None] - (0.5 if aligned else 0.0)).unbind(1)
    rows, row_weights = interpolation(y1, y2, height, pool_size, sampling, aligned)  # (R, P, 2 S)
    columns, column_weights = interpolation(x1, x2, width, pool_size, sampling, aligned)
    first = first_of_level[level_of_roi] + rois[:, 0].long() * height * width  # (R,)
    rows = first[:, None, None] + rows * width[:, None, None]
    cells = rows[:, :, None, :, None] + columns[:, None, :, None, :]  # (R, P, P, 2 S, 2 S)
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    return cells.reshape(-1, 4 * sampling**2), weights.reshape(-1, 4 * sampling**2)


def interpolation(
    start: Tensor, end: Tensor, cells: Tensor, pool_size: int, sampling: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Return cells and weights along one axis, both (R, P, 2 S): the two neighbours of each sampling point.

    RoIs go from `start` to `end` (R,), in cells, on maps that are `cells` (R,) long. The rules are those of
    torchvision's operator: points beyond -1 or `cells` count as 0, points beyond the outermost cells' centres take the
    outermost cell; without `aligned` a RoI is at least one cell long.
    """
    length = end - start if aligned else (end - start).clamp(min=1.0)
    points = torch.arange(pool_size * sampling, dtype=start.dtype)
    position = start[:, None] + (points + 0.5) * (length[:, None] / (pool_size * sampling))  # (R, P * S)
    last = (cells - 1)[:, None]
    inside = (position >= -1) & (position <= cells[:, None])
    position = torch.minimum(position.clamp(min=0), last.to(position.dtype))
    low = position.long()
    above = position - low
    index = torch.stack((low, torch.minimum(low + 1, last)), dim=-1)
    weights = torch.stack((1 - above, above), dim=-1) * (inside[..., None] / sampling)
    return index.view(-1, pool_size, 2 * sampling), weights.view(-1, pool_size, 2 * sampling)
