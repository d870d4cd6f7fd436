"""The four losses of Faster R-CNN: classification and box regression, of the RPN and of the RoI heads.

S samples of all images of the batch, P of them positive, C classes without background. Each loss is a sum over samples
divided by a stated count, and 0 (with a gradient of 0) where there are none.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import ops

from detector.boxes import pairwise_iou

BoxLossKind = Literal["smooth_l1", "iou", "giou", "diou", "ciou"]
"""Smooth L1 of deltas, or 1 less the overlap of boxes: IoU, or as in Rezatofighi 2019 (GIoU), Zheng 2020 (the rest)."""
Normalizer = Literal["samples", "positives", "samples_per_image"]
"""What the sum of the box losses is divided by."""
RPNNormalizer = Literal["samples", "positives", "samples_per_image", "locations"]


def _mean(total: Tensor, count: int) -> Tensor:
    return total / max(count, 1)


def rpn_classification_loss(logits: Tensor, is_object: Tensor, focal: tuple[float, float] | None = None) -> Tensor:
    """Return the mean binary cross-entropy of objectness logits (S,) against `is_object` (S,).

    For the paper's softmax over two scores the logit is their difference, which gives the same loss. With `focal`
    (alpha, gamma) it is the focal loss (Lin 2017, section 3), divided by the number of objects among the samples.
    """
    if focal:
        total: Tensor = ops.sigmoid_focal_loss(logits.float(), is_object.float(), *focal, reduction="sum")
        return total / is_object.sum().clamp(min=1)
    return _mean(
        F.binary_cross_entropy_with_logits(logits.float(), is_object.float(), reduction="sum"), is_object.numel()
    )


def _box_losses(
    pred_deltas: Tensor, deltas: Tensor, beta: float, kind: BoxLossKind, decode: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the losses of boxes from their deltas (P, 4): (P, 4) by coordinate, or (P, 1) of boxes as a whole."""
    if kind == "smooth_l1":
        return F.smooth_l1_loss(pred_deltas.float(), deltas, beta=beta, reduction="none")
    boxes, objects = decode(torch.stack((pred_deltas.float(), deltas)))
    if kind == "iou":
        return 1 - pairwise_iou(objects[:, None], boxes[:, None])[:, 0]
    names = {"giou": "generalized", "diou": "distance", "ciou": "complete"}
    each: Tensor = getattr(ops, f"{names[kind]}_box_iou_loss")(boxes, objects)
    return each[:, None]


def box_loss(
    pred_deltas: Tensor,
    deltas: Tensor,
    beta: float,
    samples: int,
    normalizer: RPNNormalizer,
    samples_per_batch: int = 0,
    locations: int = 0,
    kind: BoxLossKind = "smooth_l1",
    decode: Callable[[Tensor], Tensor] = torch.as_tensor,
) -> Tensor:
    """Return the box loss of positives' deltas (P, 4), smooth L1 summed over coordinates, divided by a count.

    Args:
        pred_deltas: (P, 4) predictions.
        deltas: (P, 4) targets.
        beta: Where the loss turns from quadratic to linear; 1 / sigma^2 in the notation of Fast R-CNN. 0 is plain L1.
        samples: S, positives and negatives together.
        normalizer: `samples` (py-faster-rcnn, torchvision), `positives`, `samples_per_image` (as many as were asked
            for, found or not: detectron2's RPN, mx-rcnn), or `locations` (the paper's N_reg).
        samples_per_batch: Samples asked for, of all images.
        locations: Locations of anchors, of all images.
        kind: Which loss.
        decode: Gives the boxes (2, P, 4) of deltas (2, P, 4), for the losses of boxes.
    """
    total = _box_losses(pred_deltas, deltas, beta, kind, decode).sum()
    counts = {"samples": samples, "positives": len(deltas), "samples_per_image": samples_per_batch}
    return _mean(total, (counts | {"locations": locations})[normalizer])


def roi_classification_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of class logits (S, C + 1) against labels (S,) in 0..C.

    With `weights` (C + 1,) of the classes it is the weighted mean, as in PyTorch's cross-entropy, but 0 where all
    samples weigh nothing.
    """
    if weights is None:
        return _mean(F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels))
    total = F.cross_entropy(logits.float(), labels, weight=weights, reduction="sum")
    return total / weights[labels].sum().clamp(min=torch.finfo(torch.float32).tiny)


def balanced_class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Return weights (C + 1,) under which background counts as much as all objects together.

    They are 1 for every class, and for background the number of objects over that of background samples, among labels
    (S,) in 0..C.
    """
    objects = (labels > 0).sum()
    weights = torch.ones(num_classes + 1, device=labels.device)
    weights[0] = objects / (len(labels) - objects).clamp(min=1)
    return weights


def loss_of_each_roi(
    logits: Tensor,
    labels: Tensor,
    pred_deltas: Tensor,
    deltas: Tensor,
    beta: float,
    reg_weight: float,
    kind: BoxLossKind = "smooth_l1",
    decode: Callable[[Tensor], Tensor] = torch.as_tensor,
) -> Tensor:
    """Return the loss (S,) of each RoI by itself: classification, plus `reg_weight` times the box loss of positives.

    It is of logits (S, C + 1), labels (S,) in 0..C, deltas (S, 4) predicted for the RoI's class, and targets (S, 4);
    `kind` and `decode` are those of `box_loss`.
    """
    boxes = _box_losses(pred_deltas, deltas, beta, kind, decode).sum(dim=1)
    return F.cross_entropy(logits.float(), labels, reduction="none") + reg_weight * boxes * (labels > 0)
