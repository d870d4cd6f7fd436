"""The four losses of Faster R-CNN: classification and box regression, of the RPN and of the RoI heads.

S samples of all images of the batch, P of them positive, C classes without background. Each loss is a sum over samples
divided by a stated count, and 0 (with a gradient of 0) where there are none.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Normalizer = Literal["samples", "positives"]


def _mean(total: Tensor, count: int) -> Tensor:
    return total / max(count, 1)


def rpn_classification_loss(logits: Tensor, is_object: Tensor) -> Tensor:
    """Binary cross-entropy of objectness logits (S,) against `is_object` (S,), mean over the samples.

    For the paper's softmax over two scores the logit is their difference, which gives the same loss.
    """
    return _mean(
        F.binary_cross_entropy_with_logits(logits.float(), is_object.float(), reduction="sum"), is_object.numel()
    )


def box_loss(pred_deltas: Tensor, deltas: Tensor, beta: float, samples: int, normalizer: Normalizer) -> Tensor:
    """Smooth L1 of positives' deltas (P, 4), summed over coordinates, divided by the number of samples or of positives.

    Args:
        pred_deltas: (P, 4) predictions.
        deltas: (P, 4) targets.
        beta: Where the loss turns from quadratic to linear; 1 / sigma^2 in the notation of Fast R-CNN. 0 is plain L1.
        samples: S, positives and negatives together.
        normalizer: `samples` (py-faster-rcnn, torchvision) or `positives`.
    """
    total = F.smooth_l1_loss(pred_deltas.float(), deltas, beta=beta, reduction="sum")
    return _mean(total, samples if normalizer == "samples" else len(deltas))


def roi_classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of class logits (S, C + 1) against labels (S,) in 0..C, mean over the samples."""
    return _mean(F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels))
