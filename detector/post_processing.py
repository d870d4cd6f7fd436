"""From class scores and boxes of all RoIs to the detections of an image: threshold, then hard or soft NMS.

n RoIs of an image, C classes without background, K candidates, D detections.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from detector import boxes as box_ops
from detector.kernels.nms import nms_of_classes
from detector.kernels.transfers import joined, rows_of_images, together, true_indices
from detector.parts import Part, chosen

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


class Suppression(Part):
    """Non-maximum suppression of detections, `roi.nms`."""

    @abstractmethod
    def __call__(self, found: Candidates, threshold: float, limit: int) -> Candidates:
        """Return the candidates of an image that are left, at most `limit`, by descending score.

        Their scores may be lowered, but stay above the threshold. Boxes of different classes do not compete.
        """

    def of_images(
        self, images: Sequence[Candidates], sizes: Sequence[tuple[int, int]], threshold: float, limit: int
    ) -> list[Candidates]:
        """Return the candidates of each image, of a size (height, width), that are left."""
        return [self(found, threshold, limit) for found in images]


@dataclass
class HardNMS(Suppression):
    """Candidates are dropped that overlap a better one of their class.

    Args:
        iou: By more than this.
    """

    iou: float = 0.5

    def __call__(self, found: Candidates, threshold: float, limit: int) -> Candidates:
        """Return the candidates of an image that are left; see `Suppression`."""
        kept = batched_nms(found.boxes, found.scores, found.labels, self.iou)[:limit]
        return Candidates(*(part[kept] for part in found))

    def of_images(
        self, images: Sequence[Candidates], sizes: Sequence[tuple[int, int]], threshold: float, limit: int
    ) -> list[Candidates]:
        """Return the candidates of many images at once."""
        parts = [together(part) for part in zip(*images, strict=True)]
        boxes, labels, scores, _ = parts
        counts = [len(found.scores) for found in images]
        rows = nms_of_classes(boxes, scores, labels, counts, self.iou, max(map(max, sizes)), limit)
        kept, counts = together(rows), [len(own) for own in rows]
        return [Candidates(*found) for found in zip(*(part[kept].split(counts) for part in parts), strict=True)]


@dataclass
class SoftNMS(Suppression):
    """The scores of others of its class are lowered that overlap a better candidate (Bodla et al., ICCV 2017).

    Again and again the best remaining candidate is taken, and the scores of the others of its class are multiplied by a
    factor. All classes take turns in one loop, which can end at `limit` since scores only fall.

    Args:
        iou: Overlap from which on scores are lowered, by 1 - IoU (equation 2).
    """

    iou: float = 0.5

    def factor(self, overlap: Tensor) -> Tensor:
        """Return by what scores are multiplied, for overlaps (K,)."""
        return torch.where(overlap > self.iou, 1 - overlap, 1.0)

    def __call__(self, found: Candidates, threshold: float, limit: int) -> Candidates:
        """Return the candidates of an image that are left; see `Suppression`."""
        return self.of_images([found], [], threshold, limit)[0]

    def of_images(
        self, images: Sequence[Candidates], sizes: Sequence[tuple[int, int]], threshold: float, limit: int
    ) -> list[Candidates]:
        """Return the candidates of each image that are left; a GPU is waited for once."""
        softened = [self._soften(found, limit) for found in images]
        kept = true_indices([scores > threshold for _, scores in softened])
        suppressed = []
        for found, (keep, scores), above in zip(images, softened, kept, strict=True):
            own = keep[above]
            suppressed.append(Candidates(found.boxes[own], found.labels[own], scores[above], found.rois[own]))
        return suppressed

    def _soften(self, found: Candidates, limit: int) -> tuple[Tensor, Tensor]:
        """Return the indices (D,) of the best `limit` candidates, and their lowered scores (D,), descending."""
        remaining = found.scores.clone()
        number = min(limit, len(remaining))
        keep, scores = torch.zeros(number, dtype=torch.int64, device=remaining.device), remaining.new_zeros(number)
        for place in range(number):
            score, best = remaining.max(dim=0, keepdim=True)  # (1,): a GPU is not waited for to learn an index
            keep[place : place + 1], scores[place : place + 1] = best, score
            factor = self.factor(box_ops.pairwise_iou(found.boxes[best], found.boxes)[0])
            remaining = torch.where(found.labels == found.labels[best], remaining * factor, remaining)
            remaining.index_fill_(0, best, -1.0)  # never above 0 again, whatever it is multiplied by
        return keep, scores


@dataclass
class GaussianNMS(SoftNMS):
    """Soft NMS with the factor exp(-IoU^2 / sigma) (equation 3).

    Args:
        sigma: The larger, the less scores are lowered.
    """

    sigma: float = 0.5

    def factor(self, overlap: Tensor) -> Tensor:
        """Return by what scores are multiplied, for overlaps (K,)."""
        return torch.exp(-(overlap**2) / self.sigma)


def suppression(choice: NMS | Suppression, iou: float, sigma: float) -> Suppression:
    """Return the NMS of an option; the numbers are those of ours."""
    ours: dict[str, Callable[[], Suppression]] = {
        "hard": partial(HardNMS, iou),
        "soft_linear": partial(SoftNMS, iou),
        "soft_gaussian": partial(GaussianNMS, iou, sigma),
    }
    return chosen(choice, ours)
