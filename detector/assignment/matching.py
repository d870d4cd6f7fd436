"""Matchers: which candidates (anchors, or RoIs) are positive, and for which object, which are negative, which ignored.

N candidates and G objects, of one image, or (..., N, 4) and (..., G, 4) of several of equal shapes.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from detector.boxes import centers_and_sides, pairwise_iou
from detector.kernels.parts import MATCHING, part
from detector.kernels.transfers import one_by_one, true_indices
from detector.losses import BoxLoss
from detector.parts import Part
from detector.sampling import FAR, IGNORED, NEGATIVE, POSITIVE, GroundTruth, Matches, SampledRoIs, stacked

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

    levels: Sequence[int] = ()
    strides: Sequence[int] = ()
    logits: Tensor | None = None
    boxes: Tensor | None = None


class Matcher(Part):
    """What decides which candidates are positive, negative or ignored: of anchors `rpn.matcher`, of RoIs `roi.matcher`.

    Attributes:
        needs_predictions: Whether it looks at what the RPN predicts.
        measure: What the overlaps in its matches are.
        near: A negative candidate that overlaps a difficult object by this IoU is ignored, where `difficult` is ignore.
        positive_from: Overlap from which a candidate is positive in any case. Positives below are only the best of
            their objects; 0: there is no such rule.
    """

    needs_predictions: ClassVar[bool] = False
    measure: ClassVar[str] = "IoU"
    near: float = 0.5
    positive_from: float = 0.0

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
        (used,) = true_indices([~truth.difficult])
        found = self(candidates, truth.boxes[used], around)
        kind, index = found.kind, used[found.index] if len(used) else torch.zeros_like(found.index)
        if treatment == "ignore" and len(used) < len(truth.boxes):
            near = (pairwise_iou(truth.boxes[truth.difficult], candidates) >= self.near).any(dim=0)
            kind = kind.masked_fill(near & (kind == NEGATIVE), IGNORED)
        return replace(found, kind=kind, index=index)

    def learn(self, sampled: Sequence[SampledRoIs]) -> None:
        """See the RoIs of each image that a step of a training has learned from, after its losses."""

    def box_loss(self, given: BoxLoss) -> BoxLoss:
        """Return the loss of RoIs' boxes to use now, instead of the given one, which is that of the options."""
        return given

    def logged(self) -> Mapping[str, float]:
        """Return what is to be logged in each step of a training, by name."""
        return {}


class Pairs(NamedTuple):
    """Objects (..., G, 4), candidates (..., N, 4), and how much they overlap: (..., G, N).

    `best` (..., N) is the highest overlap of each candidate, with the object `owner` (..., N). Objects that count as if
    not there overlap nothing; `absent` (..., G) tells which, None: none.
    """

    objects: Tensor
    candidates: Tensor
    overlap: Tensor
    best: Tensor
    owner: Tensor
    absent: Tensor | None = None


class PairMatcher(Matcher):
    """A matcher that compares all pairs of objects and candidates, on a GPU of many images at once."""

    @abstractmethod
    def positives(self, pairs: Pairs, around: Around) -> tuple[Tensor, Tensor]:
        """Return which candidates are positive (..., N), and the index (..., N) of the object that each belongs to."""

    def negatives(self, best: Tensor) -> Tensor:
        """Return which candidates (..., N) are negative unless they are positive, by their best overlaps (..., N)."""
        return torch.ones_like(best, dtype=torch.bool)

    def overlap(self, objects: Tensor, candidates: Tensor) -> Tensor:
        """Return how much objects (..., G, 4) and candidates (..., N, 4) overlap, (..., G, N), 0 where they do not."""
        return pairwise_iou(objects, candidates)

    def __call__(self, candidates: Tensor, objects: Tensor, around: Around) -> Matches:
        """Return the matches of an image; see `Matcher`."""
        return self.match(candidates, objects, around)

    def of_images(
        self, candidates: Sequence[Tensor], truths: Sequence[GroundTruth], treatment: str, around: Sequence[Around]
    ) -> list[Matches]:
        """Return the matches of many images; see `Matcher.of_images`.

        Where these are computed at once, each gets as many objects as others have by some that nothing overlaps.
        """
        if one_by_one(candidates[0]):
            images = zip(candidates, truths, around, strict=True)
            return [self.match(own, truth.boxes, near, truth.difficult, treatment) for own, truth, near in images]
        pairs = max(map(len, candidates)) * max(1, *(len(truth.boxes) for truth in truths))
        at_once, matches = max(1, _PAIRS // max(pairs, 1)), list[Matches]()
        for first in range(0, len(truths), at_once):
            which = slice(first, first + at_once)
            own, objects, known = candidates[which], truths[which], around[first]
            if self.needs_predictions:
                logits, boxes = zip(*((image.logits, image.boxes) for image in around[which]), strict=True)
                known = known._replace(logits=torch.stack(logits), boxes=torch.stack(boxes))
            found = self.match(
                stacked(own, FAR),
                stacked([truth.boxes for truth in objects], FAR),
                known,
                stacked([truth.difficult for truth in objects], False),
                treatment,
            )
            images_found = zip(own, found.kind.unbind(), found.index.unbind(), found.iou.unbind(), strict=True)
            matches += [Matches(*(values[: len(image)] for values in of_image)) for image, *of_image in images_found]
        return matches

    @part(MATCHING)
    def match(
        self,
        candidates: Tensor,
        objects: Tensor,
        around: Around,
        difficult: Tensor | None = None,
        treatment: str = "keep",
    ) -> Matches:
        """Return the matches of candidates (..., N, 4) with objects (..., G, 4) of one image or of several.

        Args:
            candidates: N may be 0.
            objects: G may be 0: then no candidate is positive.
            around: What else is known, with the same leading dimensions.
            difficult: (..., G) which of the objects are difficult; None: none.
            treatment: What these are: `keep` (as all others), `drop` (as if not there), or `ignore` (a candidate that
                is not positive and is near one of them is ignored).
        """
        near_difficult = None
        if objects.shape[-2] == 0:
            best = candidates.new_zeros(candidates.shape[:-1])
            index = torch.zeros_like(best, dtype=torch.int64)
            positive = torch.zeros_like(best, dtype=torch.bool)
        else:
            objects, candidates = objects.float(), candidates.float()
            overlap = self.overlap(objects, candidates)  # (..., G, N)
            absent = None
            if difficult is not None and treatment != "keep":
                if treatment == "ignore":
                    near_difficult = ((overlap >= self.near) & difficult[..., None]).any(dim=-2)
                overlap.masked_fill_(difficult[..., None], 0.0)  # what nothing overlaps is nowhere matched
                absent = difficult
            best, index = overlap.max(dim=-2)
            positive, index = self.positives(Pairs(objects, candidates, overlap, best, index, absent), around)
        negative = self.negatives(best)
        if near_difficult is not None:
            negative &= ~near_difficult
        kind = torch.full_like(index, IGNORED).masked_fill_(negative, NEGATIVE).masked_fill_(positive, POSITIVE)
        return Matches(kind, index, best)


class ThresholdMatcher(PairMatcher):
    """A matcher by thresholds of the best overlap, and by the rule that an object's best candidates are its own."""

    best_per_object: bool | Literal["one"] = False

    @abstractmethod
    def bounds(self) -> tuple[float | Tensor, float, float | Tensor]:
        """Return from which overlap on candidates are positive, and the bounds [low, high) of those of negatives."""

    @property
    def near(self) -> float | Tensor:  # type: ignore[override]
        """Return the upper bound of negatives."""
        return self.bounds()[2]

    def negatives(self, best: Tensor) -> Tensor:
        """Return which candidates are negative; see `PairMatcher`."""
        _, low, high = self.bounds()
        return best < high if low <= 0 else (best >= low) & (best < high)

    def positives(self, pairs: Pairs, around: Around) -> tuple[Tensor, Tensor]:
        """Return which candidates are positive, and for which object; see `PairMatcher`."""
        positive, index, overlap = pairs.best >= self.bounds()[0], pairs.owner, pairs.overlap
        if not self.best_per_object or not pairs.candidates.shape[-2]:
            return positive, index
        best_of_object = overlap.amax(dim=-1, keepdim=True)
        # Ties up to the rounding of corners in float32, which depends on where in the image an anchor lies.
        ties = (overlap >= best_of_object * (1 - 1e-5)) & (best_of_object > 0)  # (..., G, N)
        if self.best_per_object == "one":
            ties &= torch.zeros_like(ties).scatter_(-1, ties.int().argmax(dim=-1, keepdim=True), True)
            # Where two objects share their best candidate, the last one has it.
            objects = torch.arange(1, ties.shape[-2] + 1, device=ties.device)[:, None]
            last = (ties * objects).amax(dim=-2)
            index = torch.where(last > 0, last - 1, index)
        return positive | ties.any(dim=-2), index


@dataclass
class IoUMatcher(ThresholdMatcher):
    """Give each candidate to the object that it overlaps most, by thresholds of their IoU (Faster R-CNN, 3.1.2).

    Args:
        positive_iou: A candidate is positive at or above this IoU.
        negative_iou: A candidate is negative if its best IoU lies in [low, high).
        best_per_object: Also make positive, for each object, the candidates with the highest IoU, ties included, unless
            that IoU is 0 (rule i). `one`: only the first of them, which then goes to that object even where it overlaps
            another one more.
    """

    positive_iou: float = 0.5
    negative_iou: tuple[float, float] = (0.0, 0.5)
    best_per_object: bool | Literal["one"] = False

    @property
    def positive_from(self) -> float:  # type: ignore[override]
        """Return `positive_iou`."""
        return self.positive_iou

    def bounds(self) -> tuple[float, float, float]:
        """Return the thresholds; see `ThresholdMatcher`."""
        return self.positive_iou, *self.negative_iou


@dataclass
class NWDMatcher(IoUMatcher):
    """Match by the normalised Gaussian Wasserstein distance instead of IoU, for tiny objects (Wang 2021, 2110.13389).

    Boxes are Gaussians with their centres as means and half their sides as standard deviations, and the overlap is
    exp(-W / constant), W being the 2-Wasserstein distance in pixels of the resized image. It is above 0 for boxes that
    lie apart, so an object's best candidates count only if theirs is no negative's, as in the paper.

    Args:
        positive_iou: As in `IoUMatcher`, of this overlap; the paper's RPN has 0.7.
        negative_iou: Likewise; the paper's RPN has 0 to 0.3.
        best_per_object: Likewise; true in the paper's RPN.
        constant: About the mean side of the objects in pixels of the resized image: 12.8 for AI-TOD, as in the paper.
    """

    measure: ClassVar[str] = "NWD"
    positive_iou: float = 0.7
    negative_iou: tuple[float, float] = (0.0, 0.3)
    best_per_object: bool | Literal["one"] = True
    constant: float = 12.8

    def overlap(self, objects: Tensor, candidates: Tensor) -> Tensor:
        """Return the normalised Wasserstein distances; see `PairMatcher`."""
        (first, sides), (second, other_sides) = centers_and_sides(objects), centers_and_sides(candidates)
        first, second = torch.cat((first, sides / 2), dim=-1), torch.cat((second, other_sides / 2), dim=-1)
        # The other way to compute it loses digits where boxes are close.
        distance = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
        return (-distance / self.constant).exp()

    def positives(self, pairs: Pairs, around: Around) -> tuple[Tensor, Tensor]:
        """Return which candidates are positive, and for which object; see `PairMatcher`."""
        apart = pairs.overlap < self.negative_iou[1]
        return super().positives(pairs._replace(overlap=pairs.overlap.masked_fill(apart, 0.0)), around)


def match(
    candidates: Tensor,
    gt_boxes: Tensor,
    positive_iou: float,
    negative_iou: tuple[float, float],
    best_per_object: bool | Literal["one"] = False,
    difficult: Tensor | None = None,
    treatment: str = "keep",
) -> Matches:
    """Return the matches of candidates (..., N, 4) with objects (..., G, 4) by an `IoUMatcher` with these options."""
    matcher = IoUMatcher(positive_iou, negative_iou, best_per_object)
    return matcher.match(candidates, gt_boxes, Around(), difficult, treatment)
