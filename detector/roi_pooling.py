"""RoIs on feature maps to features of one size: RoIAlign, and max pooling over whole cells.

B images, L levels, R RoIs, P pool size, S sampling points per bin and axis, H x W the feature map of a level.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align, roi_pool

from detector.boxes import centers_and_sides, scaled
from detector.kernels.roi_align import cells_and_weights
from detector.kernels.transfers import constant, part_of_rows, together, true_indices

Pooling = Literal["roi_align", "roi_align_legacy", "roi_pool", "roi_pool_floor"]


def levels_of_boxes(boxes: Tensor, strides: Sequence[int], canonical_side: float) -> Tensor:
    """Return the index (R,) of the level to pool each box (R, 4) from: one level up for each doubling of its side.

    Of levels with equal strides only the first can be chosen. Boxes of `canonical_side` belong to stride 16.
    """
    if len(strides) == 1:
        return torch.zeros_like(boxes[:, 0], dtype=torch.int64)
    _, sides = centers_and_sides(boxes)
    octaves = torch.log2((sides[:, 0] * sides[:, 1]).clamp(min=1e-6).sqrt() / canonical_side)
    finest, coarsest = (int(math.log2(stride)) for stride in (strides[0], strides[-1]))
    return (torch.floor(4 + octaves + 1e-6)).clamp(finest, coarsest).to(torch.int64) - finest


def pool_rois(
    features: Sequence[Tensor],
    rois: Sequence[Tensor],
    level_of_roi: Tensor,
    strides: Sequence[int],
    scales: Sequence[float],
    pool_size: int,
    kind: Pooling,
    sampling_ratio: int,
) -> Tensor:
    """Return pooled features (R, channels, P, P) of the RoIs (n, 4) of each image; the rest is as in `pool_aligned`.

    Those of each of several `scales`, by which RoIs are enlarged, follow one another as channels.
    """
    every = together(rois)
    image = part_of_rows([len(boxes) for boxes in rois], every.device)[:, None].to(every.dtype)
    boxes = [torch.cat((image, scaled(every, scale)), dim=1) for scale in scales]  # (R, 5)
    options = level_of_roi, strides, pool_size, kind, sampling_ratio
    return together([pool_boxes(features, own, *options) for own in boxes], dim=1)


def pool_boxes(
    features: Sequence[Tensor],
    rois: Tensor,
    level_of_roi: Tensor,
    strides: Sequence[int],
    pool_size: int,
    kind: Pooling,
    sampling_ratio: int,
) -> Tensor:
    """Return pooled features (R, channels, P, P) in float32 by an operator; the rest is as in `pool_aligned`."""
    if kind.startswith("roi_align"):
        options = pool_size, sampling_ratio, kind == "roi_align"
        return pool_aligned(features, rois, level_of_roi, strides, *options)

    def pool(level: int, own: Tensor) -> Tensor:
        if kind == "roi_pool_floor":
            return pool_whole_cells(features[level], own, pool_size, strides[level])
        pooled: Tensor = roi_pool(features[level].float(), own, pool_size, 1 / strides[level])
        return pooled

    return pool_by_level(features, rois, level_of_roi, pool_size, pool)


def pool_aligned(
    features: Sequence[Tensor],
    rois: Tensor,
    level_of_roi: Tensor,
    strides: Sequence[int],
    pool_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Apply RoIAlign to each RoI on its level.

    Args:
        features: L maps (B, channels, H, W).
        rois: (R, 5): image index and box in image pixels.
        level_of_roi: (R,) in 0..L-1.
        strides: L, pixels per cell.
        pool_size: P.
        sampling_ratio: S; 0 or less means adaptive, which is torchvision's operator.
        aligned: Shift by half a pixel, as RoIAlign's later versions do.

    Returns:
        (R, channels, P, P), float32.
    """
    if rois.device.type != "cpu" or sampling_ratio < 1 or len(rois) == 0:
        return pool_by_level(
            features,
            rois,
            level_of_roi,
            pool_size,
            lambda level, own: roi_align(
                features[level].float(), own, pool_size, 1 / strides[level], sampling_ratio, aligned=aligned
            ),
        )
    with torch.autocast("cpu", enabled=False):
        cells, weights = cells_and_weights(features, rois, level_of_roi, strides, pool_size, sampling_ratio, aligned)
        channels = features[0].shape[1]
        tables = [level.float().permute(0, 2, 3, 1).reshape(-1, channels) for level in features]
        table = tables[0] if len(tables) == 1 else torch.cat(tables)
        pooled = F.embedding_bag(cells, table, mode="sum", per_sample_weights=weights)
        return pooled.view(len(rois), pool_size, pool_size, channels).permute(0, 3, 1, 2)  # channels last in memory


def pool_by_level(
    features: Sequence[Tensor],
    rois: Tensor,
    level_of_roi: Tensor,
    pool_size: int,
    pool: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Return pooled features (R, channels, P, P) of RoIs (R, 5), those of each level by `pool(level, its RoIs)`."""
    if len(features) == 1:
        return pool(0, rois)
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], pool_size, pool_size, dtype=torch.float32)
    indices = true_indices([level_of_roi == level for level in range(len(features))])
    every = torch.cat(indices)
    own = rois[every].split([len(index) for index in indices])
    return pooled.index_copy(0, every, torch.cat([pool(level, of).float() for level, of in enumerate(own)]))


def pool_whole_cells(features: Tensor, rois: Tensor, pool_size: int, stride: int) -> Tensor:
    """Take the maxima over all cells from that of a RoI's first corner to that of its last one, both included.

    RoIPool rounds a corner to the nearest cell, this rounds it down. It is what ports without a RoIPool operator do:
    cut the map at the corners divided by the stride, then pool the cut to P x P (adaptive max pooling). Features are
    (B, channels, H, W), RoIs (R, 5) as in `pool_aligned`, and the result is (R, channels, P, P) in float32.
    """
    features = features.float()
    height, width = features.shape[-2:]
    cells = torch.div(rois[:, 1:], stride, rounding_mode="floor").clamp(min=0)
    cells = torch.minimum(cells, constant([width - 1, height - 1, width - 1, height - 1], cells))
    pooled = [
        F.adaptive_max_pool2d(features[image, :, y1 : y2 + 1, x1 : x2 + 1], pool_size)
        for image, x1, y1, x2, y2 in torch.cat((rois[:, :1], cells), dim=1).cpu().int().tolist()
    ]
    if not pooled:
        return features.new_zeros(0, features.shape[1], pool_size, pool_size) + features.sum() * 0
    return torch.stack(pooled)
