"""Assignment: which candidates (anchors, or RoIs) are of which object, which are background, and which are not used.

N candidates, G ground-truth boxes, of one image or (..., N, 4) and (..., G, 4) of several.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from detector.boxes import pairwise_iou
from detector.kernels.parts import MATCHING, part
from detector.kernels.transfers import one_by_one
from detector.parts import Part
from detector.sampling import FAR, IGNORED, NEGATIVE, POSITIVE, GroundTruth, Matches, stacked

_PAIRS = 2**24
"""Of objects and candidates that are matched at once, on a GPU."""


class Around(NamedTuple):
    """What a matcher may look at beside the boxes of an image.

    Attributes:
        levels: How many of the candidates are anchors of each feature level, one after another; RoIs: all of one.
        strides: Pixels per cell of each level; of RoIs none.
        logits: Objectness (N,) that the RPN predicts, where `Matcher.needs_predictions`; of RoIs None.
        boxes: Boxes (N, 4) that it predicts, likewise.
    """

    levels: Sequence[int]
    strides: Sequence[int] = ()
    logits: Tensor | None = None
    boxes: Tensor | None = None


class Matcher(Part):
    """What decides which candidates are positive, negative or ignored: of anchors `rpn.matcher`, of RoIs `roi.matcher`.

    Attributes:
        needs_predictions: Whether it looks at what the RPN predicts.
        near: A negative candidate that overlaps a difficult object by this IoU is ignored, where `difficult` is ignore.
    """

    needs_predictions: ClassVar[bool] = False
    near: float = 0.5

    @abstractmethod
    def __call__(self, candidates: Tensor, objects: Tensor, around: Around) -> Matches:
        """Return what the candidates (N, 4) of an image are, of which the objects are (G, 4); N and G may be 0.

        Anchors that are not used in training lie far outside the image, and are ignored afterwards.
        """

    def of_images(
        self, candidates: Sequence[Tensor], truths: Sequence[GroundTruth], treatment: str, around: Sequence[Around]
    ) -> list[Matches]:
        """Return the matches of the candidates (N, 4) of each image.

        Args:
            candidates: Of each image.
            truths: Of each image.
            treatment: Of difficult objects: `keep` (as all others), `drop` (as if not there), or `ignore` (as `drop`,
                but negative candidates that are near one of them are ignored).
            around: Of each image.
        """
        return [self._of_image(*image, treatment) for image in zip(candidates, truths, around, strict=True)]

    def _of_image(self, candidates: Tensor, truth: GroundTruth, around: Around, treatment: str) -> Matches:
        if treatment == "keep":
            return self(candidates, truth.boxes, around)
        used = truth.difficult.logical_not().nonzero()[:, 0]
        found = self(candidates, truth.boxes[used], around)
        kind, index = found.kind, used[found.index] if len(used) else torch.zeros_like(found.index)
        if treatment == "ignore" and len(used) < len(truth.boxes):
            near = (pairwise_iou(truth.boxes[truth.difficult], candidates) >= self.near).any(dim=0)
            kind = kind.masked_fill(near & (kind == NEGATIVE), IGNORED)
        return replace(found, kind=kind, index=index)


@dataclass
class IoUMatcher(Matcher):
    """Each candidate goes to the object that it overlaps most; see `match`.

    Args:
        positive_iou: A candidate is positive at or above this IoU.
        negative_iou: A candidate is negative if its best IoU lies in [low, high).
        best_per_object: Also make positive, for each object, the candidates with the highest IoU: true, false or `one`.
    """

    positive_iou: float = 0.5
    negative_iou: tuple[float, float] = (0.0, 0.5)
    best_per_object: bool | Literal["one"] = False

    def __call__(self, candidates: Tensor, objects: Tensor, around: Around) -> Matches:
        """Return the matches of an image; see `Matcher`."""
        return match(candidates, objects, self.positive_iou, self.negative_iou, self.best_per_object)

    def of_images(
        self, candidates: Sequence[Tensor], truths: Sequence[GroundTruth], treatment: str, around: Sequence[Around]
    ) -> list[Matches]:
        """Return the matches of many images at once; see `Matcher.of_images`."""
        rules = self.positive_iou, self.negative_iou, self.best_per_object
        return match_images(candidates, truths, lambda own, boxes, which: match(own, boxes, *rules, which, treatment))


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
