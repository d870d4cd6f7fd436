"""From class scores and boxes of all RoIs to the detections of an image: threshold, then hard or soft NMS.

n RoIs of an image, C classes without background, K candidates, D detections.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from detector import boxes as box_ops
from detector.kernels.nms import nms_of_classes
from detector.kernels.transfers import joined, rows_of_images, together, true_indices

NMS = Literal["hard", "soft_linear", "soft_gaussian"]


class Candidates(NamedTuple):
    """Boxes (K, 4), labels (K,) in 1..C, scores (K,) and RoIs (K,), by index, of one image, in any order."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    rois: Tensor


def likely_boxes(
    boxes: Tensor, scores: Tensor, counts: Sequence[int], sizes: Sequence[tuple[int, int]], threshold: float
) -> list[Candidates]:
    """Keep the boxes of each image whose scores are above a threshold, clipped to it.

    Boxes (R, C, 4) and scores (R, C) are of the RoIs of all images, of which each has a count n and a size (height,
    width).
    """
    classes, corners = scores.shape[1], rows_of_images([(w, h, w, h) for h, w in sizes], counts, boxes)
    clipped = box_ops.clip(boxes, corners[:, None])
    likely = (scores > threshold) & box_ops.has_sides_of(clipped, 1e-2)
    chosen = true_indices([mask.flatten() for mask in likely.split(list(counts))])
    numbers = [len(index) for index in chosen]
    every = joined(chosen, [sum(counts[:image]) * classes for image in range(len(counts))])
    parts = clipped.flatten(0, 1)[every], every % classes + 1, scores.flatten()[every]
    images = zip(*(part.split(numbers) for part in parts), chosen, strict=True)
    return [Candidates(own, labels, score, index // classes) for own, labels, score, index in images]


def suppress(
    images: Sequence[Candidates],
    sizes: Sequence[tuple[int, int]],
    kind: NMS,
    iou: float,
    sigma: float,
    threshold: float,
    limit: int,
) -> list[Candidates]:
    """Return the best `limit` candidates of each image by descending score after NMS within each class.

    Args:
        images: Candidates of each.
        sizes: Sizes (height, width) of the images.
        kind: `hard`: those that overlap a better one by more than `iou` are dropped; otherwise as `soft_nms`.
        iou: Overlap from which on boxes of a class compete.
        sigma: Of `soft_gaussian`.
        threshold: Candidates whose score soft NMS lowers to this or less are dropped.
        limit: Upper limit of their number.
    """
    if kind == "hard":
        parts = [together(part) for part in zip(*images, strict=True)]
        boxes, labels, scores, _ = parts
        counts = [len(found.scores) for found in images]
        rows = nms_of_classes(boxes, scores, labels, counts, iou, max(map(max, sizes)), limit)
        chosen, counts = together(rows), [len(own) for own in rows]
        return [Candidates(*found) for found in zip(*(part[chosen].split(counts) for part in parts), strict=True)]
    softened = [soft_nms(found, kind, iou, sigma, limit) for found in images]
    kept = true_indices([scores > threshold for _, scores in softened])
    suppressed = []
    for found, (keep, scores), above in zip(images, softened, kept, strict=True):
        own = keep[above]
        suppressed.append(Candidates(found.boxes[own], found.labels[own], scores[above], found.rois[own]))
    return suppressed


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
        score, best = remaining.max(dim=0, keepdim=True)  # (1,): a GPU is not waited for to learn an index
        keep[place : place + 1], scores[place : place + 1] = best, score
        overlap = box_ops.pairwise_iou(found.boxes[best], found.boxes)[0]
        if kind == "soft_linear":
            factor = torch.where(overlap > iou, 1 - overlap, 1.0)
        else:
            factor = torch.exp(-(overlap**2) / sigma)
        remaining = torch.where(found.labels == found.labels[best], remaining * factor, remaining)
        remaining.index_fill_(0, best, -1.0)  # never above 0 again, whatever it is multiplied by
    return keep, scores
