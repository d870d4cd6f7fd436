"""The four losses of Faster R-CNN: classification and box regression, of the RPN and of the RoI heads.

S samples of all images of the batch, P of them positive, C classes without background. Each loss is a sum over samples
divided by a stated count, and 0 (with a gradient of 0) where there are none.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import ops

from detector.boxes import pairwise_iou
from detector.kernels.transfers import constant
from detector.parts import Part, chosen

BoxLossName = Literal["smooth_l1", "iou", "giou", "diou", "ciou"]
Normalizer = Literal["samples", "positives", "samples_per_image"]
"""What the sum of the box losses is divided by."""
RPNNormalizer = Literal["samples", "positives", "samples_per_image", "locations"]


def _mean(total: Tensor, count: int) -> Tensor:
    return total / max(count, 1)


class ObjectnessLoss(Part):
    """The loss of the RPN's objectness, `rpn.cls_loss`.

    Attributes:
        initial_probability: Of an object, which the first weights of the RPN are to give.
    """

    initial_probability: ClassVar[float] = 0.5

    @abstractmethod
    def __call__(self, logits: Tensor, is_object: Tensor) -> Tensor:
        """Return the loss, a scalar, of the logits (S,) of sampled anchors against `is_object` (S,), which is 0 or 1.

        For the paper's softmax over two scores the logit is their difference, which gives the same loss.
        """


class BinaryCrossEntropy(ObjectnessLoss):
    """The mean binary cross-entropy."""

    def __call__(self, logits: Tensor, is_object: Tensor) -> Tensor:
        """Return the loss; see `ObjectnessLoss`."""
        total = F.binary_cross_entropy_with_logits(logits.float(), is_object.float(), reduction="sum")
        return _mean(total, is_object.numel())


@dataclass
class FocalLoss(ObjectnessLoss):
    """The focal loss (Lin 2017, section 3), divided by the number of objects among the samples.

    Args:
        alpha: Weight of objects, that of the others being 1 less it.
        gamma: Power by which it spares what is right already.
    """

    alpha: float = 0.25
    gamma: float = 2.0
    initial_probability = 0.01

    def __call__(self, logits: Tensor, is_object: Tensor) -> Tensor:
        """Return the loss; see `ObjectnessLoss`."""
        each = ops.sigmoid_focal_loss(logits.float(), is_object.float(), self.alpha, self.gamma, reduction="sum")
        total: Tensor = each / is_object.sum().clamp(min=1)
        return total


class BoxLoss(Part):
    """The loss of each box, `rpn.reg_loss` and `roi.reg_loss`; options of either say by what their sum is divided."""

    @abstractmethod
    def __call__(self, pred_deltas: Tensor, deltas: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the losses (P, n) of positives, of which the n of a box are added.

        Args:
            pred_deltas: (P, 4) predictions.
            deltas: (P, 4) targets.
            decode: Gives the boxes (..., P, 4), in pixels, of deltas (..., P, 4).
        """


@dataclass
class SmoothL1(BoxLoss):
    """Smooth L1 of each coordinate of the deltas (Girshick 2015, equation 3).

    Args:
        beta: Where it turns from quadratic to linear; 1 / sigma^2 in the notation of Fast R-CNN. 0 is plain L1.
    """

    beta: float = 1.0

    def __call__(self, pred_deltas: Tensor, deltas: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the losses (P, 4); see `BoxLoss`."""
        return F.smooth_l1_loss(pred_deltas.float(), deltas, beta=self.beta, reduction="none")


class IoULoss(BoxLoss):
    """1 less the IoU of decoded boxes."""

    def __call__(self, pred_deltas: Tensor, deltas: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the losses (P, 1); see `BoxLoss`."""
        boxes, objects = decode(torch.stack((pred_deltas.float(), deltas)))
        return self.of_boxes(boxes, objects)[:, None]

    def of_boxes(self, boxes: Tensor, objects: Tensor) -> Tensor:
        """Return the losses (P,) of boxes (P, 4) and the objects (P, 4) that they should be."""
        return 1 - pairwise_iou(objects[:, None], boxes[:, None])[:, 0, 0]


class GIoULoss(IoULoss):
    """1 less the generalised IoU (Rezatofighi 2019)."""

    of_boxes = staticmethod(ops.generalized_box_iou_loss)


class DIoULoss(IoULoss):
    """1 less the IoU, plus the distance of centres (Zheng 2020)."""

    of_boxes = staticmethod(ops.distance_box_iou_loss)


class CIoULoss(IoULoss):
    """1 less the IoU, plus the distance of centres and the difference of aspect ratios (Zheng 2020)."""

    of_boxes = staticmethod(ops.complete_box_iou_loss)


def box_loss(chosen_loss: BoxLossName | BoxLoss, beta: float) -> BoxLoss:
    """Return the loss of an option; `beta` is that of smooth L1."""
    others = {"iou": IoULoss, "giou": GIoULoss, "diou": DIoULoss, "ciou": CIoULoss}
    return chosen(chosen_loss, {"smooth_l1": lambda: SmoothL1(beta), **others})


def normalized(
    each: Tensor, samples: int, normalizer: RPNNormalizer, samples_per_batch: int = 0, locations: int = 0
) -> Tensor:
    """Return the sum of the box losses of positives (P, n), divided by a count.

    Args:
        each: What a `BoxLoss` gives.
        samples: S, positives and negatives together.
        normalizer: `samples` (py-faster-rcnn, torchvision), `positives`, `samples_per_image` (as many as were asked
            for, found or not: detectron2's RPN, mx-rcnn), or `locations` (the paper's N_reg).
        samples_per_batch: Samples asked for, of all images.
        locations: Locations of anchors, of all images.
    """
    if each.dim() != 2:
        raise ValueError(f"a loss of boxes must have the shape (positives, n), not {tuple(each.shape)}")
    counts = {"samples": samples, "positives": len(each), "samples_per_image": samples_per_batch}
    return _mean(each.sum(), (counts | {"locations": locations})[normalizer])


class ClassLoss(Part):
    """The loss of the RoI heads' classes, `roi.cls_loss`."""

    @abstractmethod
    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the loss, a scalar, of logits (S, C + 1) against labels (S,) in 0..C; the classes may have weights."""

    def of_each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the losses (S,) by which the hardest RoIs are found: cross-entropy, unless a class says otherwise."""
        return F.cross_entropy(logits.float(), labels, reduction="none")


class CrossEntropy(ClassLoss):
    """The mean cross-entropy.

    With weights (C + 1,) of the classes it is the weighted mean, as in PyTorch's cross-entropy, but 0 where all samples
    weigh nothing.
    """

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss; see `ClassLoss`."""
        if weights is None:
            return _mean(F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels))
        total = F.cross_entropy(logits.float(), labels, weight=weights, reduction="sum")
        return total / weights[labels].sum().clamp(min=torch.finfo(torch.float32).tiny)


def class_weights(option: list[float] | str, logits: Tensor, labels: Tensor) -> Tensor | None:
    """Return the weights (C + 1,) of `roi.class_weights` for RoIs with logits (S, C + 1) and labels (S,)."""
    if isinstance(option, list):
        return constant(option, logits)
    return balanced_class_weights(labels, logits.shape[1] - 1) if option == "balanced" else None


def balanced_class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Return weights (C + 1,) under which background counts as much as all objects together.

    They are 1 for every class, and for background the number of objects over that of background samples, among labels
    (S,) in 0..C.
    """
    objects = (labels > 0).sum()
    weights = torch.ones(num_classes + 1, device=labels.device)
    weights[0] = objects / (len(labels) - objects).clamp(min=1)
    return weights
