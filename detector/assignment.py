"""Assignment: which candidates (anchors, or RoIs) are of which object, which are background, and which are not used.

N candidates, G ground-truth boxes, of one image or (..., N, 4) and (..., G, 4) of several.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from detector.boxes import pairwise_iou
from detector.kernels.parts import MATCHING, part
from detector.kernels.transfers import one_by_one
from detector.sampling import FAR, IGNORED, NEGATIVE, POSITIVE, GroundTruth, Matches, stacked

_PAIRS = 2**24
"""Of objects and candidates that are matched at once, on a GPU."""


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
    """Assign each candidate to the object that it overlaps most, in one image, or in several images of equal shapes.

    Args:
        candidates: (..., N, 4).
        gt_boxes: (..., G, 4), G may be 0: then all candidates are background where `negative_iou` starts at 0.
        positive_iou: A candidate is positive at or above this IoU.
        negative_iou: A candidate is negative if its best IoU lies in [low, high).
        best_per_object: Also make positive, for each object, the candidates with the highest IoU, ties included, unless
            that IoU is 0 (Faster R-CNN, section 3.1.2, rule i). `one`: only the first of them, which then goes to that
            object even where it overlaps another one more.
        difficult: (..., G) which of the objects are difficult; None: none.
        treatment: What these are: `keep` (as all others), `drop` (as if not there), or `ignore` (a candidate that is
            positive for no other object and overlaps one of them by the upper negative bound or more is ignored).
    """
    low, high = negative_iou
    near_difficult = None
    if gt_boxes.shape[-2] == 0:
        best = candidates.new_zeros(candidates.shape[:-1])
        index = torch.zeros_like(best, dtype=torch.int64)
        positive = torch.zeros_like(best, dtype=torch.bool)
    else:
        iou = pairwise_iou(gt_boxes.float(), candidates.float())  # (..., G, N)
        if difficult is not None and treatment != "keep":
            if treatment == "ignore":
                near_difficult = ((iou >= high) & difficult[..., None]).any(dim=-2)
            iou.masked_fill_(difficult[..., None], 0.0)  # what nothing overlaps is nowhere matched
        best, index = iou.max(dim=-2)
        positive = best >= positive_iou
        if best_per_object and candidates.shape[-2]:
            best_of_object = iou.amax(dim=-1, keepdim=True)
            # Ties up to the rounding of corners in float32, which depends on where in the image an anchor lies.
            ties = (iou >= best_of_object * (1 - 1e-5)) & (best_of_object > 0)  # (..., G, N)
            if best_per_object == "one":
                ties &= torch.zeros_like(ties).scatter_(-1, ties.int().argmax(dim=-1, keepdim=True), True)
                # Where two objects share their best candidate, the last one has it.
                objects = torch.arange(1, ties.shape[-2] + 1, device=ties.device)[:, None]
                last = (ties * objects).amax(dim=-2)
                index = torch.where(last > 0, last - 1, index)
            positive = positive | ties.any(dim=-2)
    negative = best < high if low <= 0 else (best >= low) & (best < high)
    if near_difficult is not None:
        negative &= ~near_difficult
    kind = torch.full_like(index, IGNORED).masked_fill_(negative, NEGATIVE).masked_fill_(positive, POSITIVE)
    return Matches(kind, index, best)


def match_images(
    candidates: Sequence[Tensor], truths: Sequence[GroundTruth], matching: Callable[[Tensor, Tensor, Tensor], Matches]
) -> list[Matches]:
    """Return the matches of the candidates (N, 4) of each image, by `matching(candidates, boxes, difficult)`.

    On a GPU, of many images at once: of each the objects are made as many as others have by some that nothing overlaps.
    """
    if one_by_one(candidates[0]):
        return [matching(own, truth.boxes, truth.difficult) for own, truth in zip(candidates, truths, strict=True)]
    pairs = max(map(len, candidates)) * max(1, *(len(truth.boxes) for truth in truths))
    at_once, matches = max(1, _PAIRS // max(pairs, 1)), list[Matches]()
    for first in range(0, len(truths), at_once):
        own, objects = candidates[first : first + at_once], truths[first : first + at_once]
        found = matching(
            stacked(own, FAR),
            stacked([truth.boxes for truth in objects], FAR),
            stacked([truth.difficult for truth in objects], False),
        )
        images = zip(own, found.kind.unbind(), found.index.unbind(), found.iou.unbind(), strict=True)
        matches += [Matches(*(values[: len(image)] for values in of_image)) for image, *of_image in images]
    return matches
