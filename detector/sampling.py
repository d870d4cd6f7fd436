"""Candidate boxes and ground truth to training targets, for the RPN (anchors) and for the RoI heads (RoIs).

N candidates of one image, G ground-truth boxes. Matching and drawing work on a single image, so that neither a sample
nor a normaliser can be of the wrong one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, nms

from detector.kernels.parts import MATCHING, SAMPLING, part
from detector.kernels.transfers import true_indices

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1
_PAIRS = 2**16


class GroundTruth(NamedTuple):
    """Objects of one image in pixels of the resized image: boxes (G, 4), labels (G,) in 1..C, difficult (G,)."""

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


@dataclass(frozen=True, eq=False)
class Matches:
    """What each candidate is.

    `kind` (N,) POSITIVE, NEGATIVE or IGNORED, `index` (N,) of its object (0 where G = 0), and its best `iou` (N,).
    """

    kind: Tensor
    index: Tensor
    iou: Tensor

    def rescued(self, positive_iou: float) -> Tensor:
        """Return a mask (N,) of those that are positive only because they are the best of their objects."""
        return (self.kind == POSITIVE) & (self.iou < positive_iou)


class SampledAnchors(NamedTuple):
    """Anchors of one image for training.

    Indices of positives (P,) and negatives (Q,) among all N, and the positives' deltas (P, 4) to their objects.
    """

    positives: Tensor
    negatives: Tensor
    deltas: Tensor


class SampledRoIs(NamedTuple):
    """RoIs of one image for training.

    Boxes (S, 4), labels (S,), 0 for background, deltas (S, 4) to the objects, and by index the `candidates` (S,) that
    they are: of the proposals, then added objects. Positives come first; deltas of background RoIs are 0 and unused.
    """

    boxes: Tensor
    labels: Tensor
    deltas: Tensor
    candidates: Tensor


@part(MATCHING)
def match(
    candidates: Tensor,
    gt_boxes: Tensor,
    positive_iou: float,
    negative_iou: tuple[float, float],
    best_per_object: bool | Literal["one"] = False,
    difficult: Tensor | None = None,
    treatment: str = "keep",
) -> Matches:
    """Assign each candidate to the object that it overlaps most.

    Args:
        candidates: (N, 4).
        gt_boxes: (G, 4), G may be 0: then all candidates are background where `negative_iou` starts at 0.
        positive_iou: A candidate is positive at or above this IoU.
        negative_iou: A candidate is negative if its best IoU lies in [low, high).
        best_per_object: Also make positive, for each object, the candidates with the highest IoU, ties included, unless
            that IoU is 0 (Faster R-CNN, section 3.1.2, rule i). `one`: only the first of them, which then goes to that
            object even where it overlaps another one more.
        difficult: (G,) which of the objects are difficult; None: none.
        treatment: What these are: `keep` (as all others), `drop` (as if not there), or `ignore` (a candidate that is
            positive for no other object and overlaps one of them by the upper negative bound or more is ignored).
    """
    low, high = negative_iou
    near_difficult = None
    if len(gt_boxes) == 0:
        best = candidates.new_zeros(len(candidates))
        index = torch.zeros(len(candidates), dtype=torch.int64, device=candidates.device)
        positive = torch.zeros(len(candidates), dtype=torch.bool, device=candidates.device)
    else:
        iou = pairwise_iou(gt_boxes.float(), candidates.float())  # (G, N)
        if difficult is not None and treatment != "keep":
            if treatment == "ignore":
                near_difficult = ((iou >= high) & difficult[:, None]).any(dim=0)
            iou.masked_fill_(difficult[:, None], 0.0)  # what nothing overlaps is nowhere matched
        best, index = iou.max(dim=0)
        positive = best >= positive_iou
        if best_per_object and len(candidates):
            best_of_object = iou.max(dim=1, keepdim=True).values
            # Ties up to the rounding of corners in float32, which depends on where in the image an anchor lies.
            ties = (iou >= best_of_object * (1 - 1e-5)) & (best_of_object > 0)  # (G, N)
            if best_per_object == "one":
                has_best = ties.any(dim=1)
                first = ties.int().argmax(dim=1)[has_best]
                objects = torch.where(has_best)[0]
                # Where two objects share their best candidate, the last one has it.
                index = index.scatter_reduce(0, first, objects, "amax", include_self=False)
                ties = torch.zeros_like(ties[:1]).index_fill(1, first, True)
            positive = positive | ties.any(dim=0)
    negative = (best >= low) & (best < high)
    if near_difficult is not None:
        negative &= ~near_difficult
    kind = torch.full_like(index, IGNORED).masked_fill_(negative, NEGATIVE).masked_fill_(positive, POSITIVE)
    return Matches(kind, index, best)


def pairwise_iou(boxes: Tensor, candidates: Tensor) -> Tensor:
    """Return the IoU (G, N) of boxes (G, 4) and candidates (N, 4)."""
    if boxes.device.type != "cpu" or len(boxes) == 0:
        overlaps: Tensor = box_iou(boxes, candidates)
        return overlaps
    # In blocks whose intermediate results stay in the cache: a third of the time for 300 objects and 33,000 anchors.
    blocks = candidates.split(max(1, _PAIRS // len(boxes)))
    return torch.cat([box_iou(boxes, block) for block in blocks], dim=1)


@part(SAMPLING)
def sample(kinds: Sequence[Tensor], number: int, positive_fraction: float) -> list[tuple[Tensor, Tensor]]:
    """Draw up to `number` candidates of each image without replacement: at most `positive_fraction` of them positive.

    Negatives fill up what positives leave; if there are too few of both, fewer are returned: nothing is padded.

    Returns:
        For each image the indices of positives (P,) and of negatives (Q,) into its `kind` (N,).
    """
    found = iter(true_indices([kind == wanted for kind in kinds for wanted in (POSITIVE, NEGATIVE)]))
    drawn = []
    for positives, negatives in zip(found, found, strict=True):
        chosen = _draw(positives, int(number * positive_fraction))
        drawn.append((chosen, _draw(negatives, number - len(chosen))))
    return drawn


def _draw(indices: Tensor, number: int) -> Tensor:
    if len(indices) <= number:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:number]]


def jittered(boxes: Tensor, share: float) -> Tensor:
    """Shift each of the boxes (G, 4) along x and y at random by up to half of `share` of its width and height.

    The shape stays; longcw's port of py-faster-rcnn adds such copies of the ground truth to the proposals.
    """
    shift = (torch.rand(len(boxes), 2, device=boxes.device) - 0.5) * share * (boxes[:, 2:] - boxes[:, :2])
    return boxes + shift.repeat(1, 2)


def hardest(boxes: Tensor, losses: Tensor, nms_iou: float, number: int) -> Tensor:
    """Return the ascending indices (at most `number`,) of the RoIs (R, 4) with the highest losses (R,).

    Of RoIs that overlap by more than `nms_iou` only the hardest is taken: they lie on the same cells, and their losses
    would count twice.
    """
    kept: Tensor = nms(boxes, losses, nms_iou)
    return kept[:number].sort().values


@contextmanager
def read_only(*networks: nn.Module) -> Iterator[None]:
    """Keep networks in evaluation mode: without dropout, and without a trace in batch norm's statistics.

    Autocast's cache of weights is off meanwhile: a copy made without gradients must not serve the training pass.
    """
    training = [module for network in networks for module in network.modules() if module.training]
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    for module in training:
        module.training = False
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caching)
        for module in training:
            module.training = True
