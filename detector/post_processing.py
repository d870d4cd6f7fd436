"""From class scores and boxes of all RoIs to the detections of an image: threshold, then hard or soft NMS.

n RoIs of an image, C classes without background, K candidates, D detections.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from detector import boxes as box_ops
from detector.kernels.transfers import true_indices

NMS = Literal["hard", "soft_linear", "soft_gaussian"]


class Candidates(NamedTuple):
    """Boxes (K, 4), labels (K,) in 1..C, scores (K,) and RoIs (K,), by index, of one image, in any order."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    rois: Tensor


def likely_boxes(
    boxes: Sequence[Tensor], scores: Sequence[Tensor], sizes: Sequence[tuple[int, int]], threshold: float
) -> list[Candidates]:
    """Keep the boxes whose scores are above a threshold, clipped to their images.

    Each image has boxes (n, C, 4), scores (n, C) and a size (height, width).
    """
    clipped = [box_ops.clip(image_boxes, size) for image_boxes, size in zip(boxes, sizes, strict=True)]
    likely = [
        (image_scores > threshold) & box_ops.has_sides_of(image_boxes, 1e-2)
        for image_boxes, image_scores in zip(clipped, scores, strict=True)
    ]
    chosen = true_indices([mask.flatten() for mask in likely])
    return [
        Candidates(
            image_boxes.flatten(0, 1)[index],
            index % image_scores.shape[1] + 1,
            image_scores.flatten()[index],
            index // image_scores.shape[1],
        )
        for image_boxes, image_scores, index in zip(clipped, scores, chosen, strict=True)
    ]


def suppress(found: Candidates, kind: NMS, iou: float, sigma: float, threshold: float, limit: int) -> Candidates:
    """Return the best `limit` candidates by descending score after NMS within each class.

    Args:
        found: Candidates.
        kind: `hard`: those that overlap a better one by more than `iou` are dropped; otherwise as `soft_nms`.
        iou: Overlap from which on boxes of a class compete.
        sigma: Of `soft_gaussian`.
        threshold: Candidates whose score soft NMS lowers to this or less are dropped.
        limit: Upper limit of their number.
    """
    if kind == "hard":
        keep = batched_nms(found.boxes, found.scores, found.labels, iou)[:limit]
        return Candidates(*(part[keep] for part in found))
    keep, scores = soft_nms(found, kind, iou, sigma, limit)
    above = scores > threshold
    keep = keep[above]
    return Candidates(found.boxes[keep], found.labels[keep], scores[above], found.rois[keep])


def soft_nms(found: Candidates, kind: NMS, iou: float, sigma: float, limit: int) -> tuple[Tensor, Tensor]:
    """Return the indices (D,) of the best `limit` candidates, and their lowered scores (D,), descending.

    Again and again the best remaining candidate is taken, and the scores of the others of its class are multiplied by
    1 - IoU where the IoU exceeds `iou` (`soft_linear`) or by exp(-IoU^2 / sigma) (`soft_gaussian`): Bodla et al., ICCV
    2017, equations 2 and 3. All classes take turns in one loop, which can end at `limit` since scores only fall.
    """
    remaining = found.scores.clone()
    number = min(limit, len(remaining))
    keep, scores = torch.zeros(number, dtype=torch.int64, device=remaining.device), remaining.new_zeros(number)
    for place in range(number):
        best = remaining.argmax()
        keep[place], scores[place] = best, remaining[best]
        overlap = box_iou(found.boxes[best][None], found.boxes)[0]
        if kind == "soft_linear":
            factor = torch.where(overlap > iou, 1 - overlap, 1.0)
        else:
            factor = torch.exp(-(overlap**2) / sigma)
        remaining = torch.where(found.labels == found.labels[best], remaining * factor, remaining)
        remaining[best] = -1.0  # never above 0 again, whatever it is multiplied by
    return keep, scores
