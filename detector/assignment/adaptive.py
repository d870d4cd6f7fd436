"""Matchers of anchors that find out for each object how many are positive: ATSS and SimOTA.

N anchors and G objects, of one image, or (..., N, 4) and (..., G, 4) of several of equal shapes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from detector.assignment.matching import Around, PairMatcher, Pairs
from detector.boxes import centers_and_sides, pairwise_iou
from detector.kernels.transfers import repeated
from detector.sampling import FAR

_SAME_PLACE = 1e-3
"""Distances that differ by no more pixels are equal, however corners were rounded."""


@dataclass
class ATSSMatcher(PairMatcher):
    """Find a threshold of IoU for each object from its closest anchors (ATSS, Zhang 2020, arXiv 1912.02424).

    Of each level the `k` anchors whose centres are closest to the object's are looked at: those are positive whose IoU
    is at least the mean plus the standard deviation of the IoUs of them all, and whose centre is inside the object. An
    anchor that is positive for several objects goes to the one that it overlaps most. All others are negative.

    With several anchors per location `k` counts anchors, not locations, as in mmdetection's ATSSAssigner; of equally
    distant ones the first in the order of the anchors are taken. (The authors' code takes k times as many.)

    Args:
        k: Anchors of each level to look at; 9 in the paper.
        near: A negative anchor that overlaps a difficult object by this IoU is ignored, where `difficult` is ignore.
    """

    k: int = 9
    near: float = 0.3

    def positives(self, pairs: Pairs, around: Around) -> tuple[Tensor, Tensor]:
        """Return which candidates are positive, and for which object; see `PairMatcher`."""
        overlap, objects = pairs.overlap, pairs.objects
        (middles, _), (centers, _) = centers_and_sides(objects), centers_and_sides(pairs.candidates)
        distance = torch.cdist(middles, centers, compute_mode="donot_use_mm_for_euclid_dist")  # (..., G, N)
        distance = distance.masked_fill(_unused(pairs.candidates), torch.inf)
        levels = distance.split(list(around.levels) or distance.shape[-1], dim=-1)
        closest = torch.cat([self._closest(level) for level in levels], dim=-1)
        number = closest.sum(dim=-1, keepdim=True)
        mean = (overlap * closest).sum(dim=-1, keepdim=True) / number
        variance = ((overlap - mean).square() * closest).sum(dim=-1, keepdim=True) / (number - 1).clamp(min=1)
        # Up to rounding: where all IoUs are equal, all are at least their mean.
        high = (overlap >= (mean + variance.sqrt()) * (1 - 1e-5)) & (overlap > 0)
        positive = closest & high & (_depth(centers, objects) > 0.01)
        best, index = overlap.where(positive, -1.0).max(dim=-2)
        return best >= 0, index

    def _closest(self, distance: Tensor) -> Tensor:
        """Return which anchors of a level, at distances (..., G, n), are the k closest ones of each object."""
        k = min(self.k, distance.shape[-1])
        last = distance.topk(k, largest=False).values[..., -1:] if k else distance
        closer = distance < last - _SAME_PLACE
        ties = (distance - last).abs() <= _SAME_PLACE
        return closer | (ties & (ties.cumsum(dim=-1) <= k - closer.sum(dim=-1, keepdim=True)))


@dataclass
class SimOTAMatcher(PairMatcher):
    """Choose the anchors with the least losses for each object (SimOTA of YOLOX, Ge 2021, arXiv 2107.08430).

    Anchors count whose centres are inside an object, or closer to its centre than `radius` strides along both axes.
    An object gets as many as the IoUs of its best `top` predicted boxes add up to, at least one, namely those
    of the least cost: the classification loss of objectness, plus `iou_weight` times -log of the predicted box's IoU,
    plus 100000 where the centre is not both inside the object and close to its centre. An anchor that several objects
    choose goes to the one of the least cost. All others are negative. With several anchors per location each is one.

    Args:
        radius: In strides of an anchor's level; 2.5 in YOLOX.
        top: How many IoUs are added up; 10 in YOLOX.
        iou_weight: Weight of the IoU in the cost; 3 in YOLOX.
        near: A negative anchor that overlaps a difficult object by this IoU is ignored, where `difficult` is ignore.
    """

    needs_predictions: ClassVar[bool] = True
    radius: float = 2.5
    top: int = 10
    iou_weight: float = 3.0
    near: float = 0.3

    def positives(self, pairs: Pairs, around: Around) -> tuple[Tensor, Tensor]:
        """Return which candidates are positive, and for which object; see `PairMatcher`."""
        assert around.logits is not None and around.boxes is not None
        objects = pairs.objects
        (middles, _), (centers, _) = centers_and_sides(objects), centers_and_sides(pairs.candidates)
        reach = self.radius * repeated(around.strides, around.levels, centers)  # (N,)
        inside = _depth(centers, objects) > 0
        close = (centers[..., None, :, :] - middles[..., :, None, :]).abs().amax(dim=-1) < reach
        absent = objects[..., 0] >= FAR
        absent = absent if pairs.absent is None else absent | pairs.absent
        possible = ~absent[..., None] & ~_unused(pairs.candidates)
        possible = possible & ((inside | close) & possible).any(dim=-2, keepdim=True)
        iou = pairwise_iou(objects, around.boxes.float())
        cost = F.softplus(-around.logits.float())[..., None, :] - self.iou_weight * (iou + 1e-8).log()
        cost = (cost + 1e5 * ~(inside & close)).where(possible, torch.inf)
        most = min(self.top, cost.shape[-1])
        number = iou.where(possible, 0.0).topk(most).values.sum(dim=-1, keepdim=True).int().clamp(min=1)
        least = cost.topk(most, largest=False)
        chosen = (torch.arange(most, device=cost.device) < number) & least.values.isfinite()
        chosen = torch.zeros_like(possible).scatter(-1, least.indices, chosen)  # (..., G, N)
        several = chosen.sum(dim=-2) > 1
        return chosen.any(dim=-2), torch.where(several, cost.argmin(dim=-2), chosen.int().argmax(dim=-2))


def _unused(candidates: Tensor) -> Tensor:
    """Return which candidates (..., N, 4) are not there or not used, (..., 1, N)."""
    return candidates[..., None, :, 0] >= FAR


def _depth(points: Tensor, boxes: Tensor) -> Tensor:
    """Return how far points (..., N, 2) lie inside boxes (..., G, 4), (..., G, N): less than 0 outside."""
    points, boxes = points[..., None, :, :], boxes[..., :, None, :]
    return torch.minimum((points - boxes[..., :2]).amin(dim=-1), (boxes[..., 2:] - points).amin(dim=-1))
