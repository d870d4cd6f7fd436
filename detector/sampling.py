"""Candidate boxes and ground truth to training targets, for the RPN (anchors) and for the RoI heads (RoIs).

N candidates of one image, G ground-truth boxes. Matching and drawing work on a single image, so that neither a sample
nor a normaliser can be of the wrong one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import nms

from detector.boxes import encode, pairwise_iou
from detector.kernels.parts import MATCHING, SAMPLING, part
from detector.kernels.transfers import constant, joined, one_by_one, repeated, starts_of, together, true_indices

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1
FAR = 1e6
"""Where a box overlaps no other, in pixels."""
_PAIRS = 2**24
"""Of objects and candidates that are matched at once, on a GPU."""


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
    they are: of the proposals, then added objects. Deltas of background RoIs are 0 and unused. The first `positives`
    are of objects, where that is known without looking.
    """

    boxes: Tensor
    labels: Tensor
    deltas: Tensor
    candidates: Tensor
    positives: int | None = None


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


def stacked(tensors: Sequence[Tensor], value: float) -> Tensor:
    """Return tensors (n, ...) as one (B, N, ...), the shorter ones filled up with a value."""
    if len({len(tensor) for tensor in tensors}) == 1:
        return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]
    return pad_sequence(list(tensors), batch_first=True, padding_value=value)


@part(SAMPLING)
def sample(kinds: Sequence[Tensor], number: int, positive_fraction: float) -> list[tuple[Tensor, Tensor]]:
    """Draw up to `number` candidates of each image without replacement: at most `positive_fraction` of them positive.

    Negatives fill up what positives leave; if there are too few of both, fewer are returned: nothing is padded.

    Returns:
        For each image the indices of positives (P,) and of negatives (Q,) into its `kind` (N,).
    """
    most_positives = int(number * positive_fraction)
    if not one_by_one(kinds[0]):
        return _sample_at_once(stacked(kinds, IGNORED), number, most_positives)
    found = iter(true_indices([kind == wanted for kind in kinds for wanted in (POSITIVE, NEGATIVE)]))
    drawn = []
    for positives, negatives in zip(found, found, strict=True):
        chosen = _draw(positives, most_positives)
        drawn.append((chosen, _draw(negatives, number - len(chosen))))
    return drawn


def _sample_at_once(kinds: Tensor, number: int, most_positives: int) -> list[tuple[Tensor, Tensor]]:
    """Return `sample` of kinds (B, N), on a GPU: those with the highest of random numbers, waiting for it once."""
    masks = kinds == constant((POSITIVE, NEGATIVE), kinds)[:, None, None]  # (2, B, N)
    found = masks.sum(dim=2).cpu().tolist()
    counts = [(min(positives, most_positives), negatives) for positives, negatives in zip(*found, strict=True)]
    counts = [(positives, min(negatives, number - positives)) for positives, negatives in counts]
    keys = torch.rand(kinds.shape, device=kinds.device).where(masks, -1.0)
    positives, negatives = keys.topk(max(max(pair) for pair in counts), dim=2).indices
    images = zip(positives, negatives, counts, strict=True)
    return [(own[:count], others[:rest]) for own, others, (count, rest) in images]


def _draw(indices: Tensor, number: int) -> Tensor:
    if len(indices) <= number:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:number]]


def labelled(
    candidates: Sequence[Tensor],
    matches: Sequence[Matches],
    truths: Sequence[GroundTruth],
    drawn: Sequence[tuple[Tensor, Tensor]],
    std: Sequence[float],
    mean: Sequence[float],
) -> list[SampledRoIs]:
    """Return drawn candidates of each image (indices of positives and negatives) with labels and deltas.

    The deltas to the objects are less `mean` and divided by `std`; see `boxes.encode`.
    """
    indices = [index for pair in drawn for index in pair]
    index, boxes = torch.cat(indices), together(candidates)
    places = joined(indices, [start for start in starts_of(candidates) for _ in range(2)])
    boxes = boxes[places]
    # One object more, so that there is one for the background of images without any.
    objects = torch.cat([*(truth.boxes for truth in truths), constant((FAR, FAR, FAR + 1, FAR + 1), boxes)[None]])
    labels = torch.cat([*(truth.labels for truth in truths), index.new_zeros(1)])
    counts = [len(positives) + len(negatives) for positives, negatives in drawn]
    of_object = joined(
        together([found.index for found in matches])[places].split(counts), starts_of([t.boxes for t in truths])
    )
    positive = repeated([True, False] * len(drawn), [len(own) for own in indices], truths[0].difficult)
    deltas = encode(objects[of_object], boxes, std, mean)
    labels, deltas = labels[of_object] * positive, torch.where(positive[:, None], deltas, 0.0)
    images = zip(*(part.split(counts) for part in (boxes, labels, deltas, index)), strict=True)
    return [
        SampledRoIs(own, label, delta, at, len(positives))
        for (own, label, delta, at), (positives, _) in zip(images, drawn, strict=True)
    ]


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
