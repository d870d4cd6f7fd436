"""Samples of the candidates that are learned from: anchors for the RPN, RoIs for the RoI heads.

N candidates of one image, G ground-truth boxes. Drawing works on a single image, so that neither a sample nor a
normaliser can be of the wrong one.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import nms

from detector.boxes import BoxCoder
from detector.kernels.parts import SAMPLING, part
from detector.kernels.transfers import constant, joined, one_by_one, repeated, starts_of, together, true_indices
from detector.parts import Part

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1
FAR = 1e6
"""Where a box overlaps no other, in pixels."""


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


def stacked(tensors: Sequence[Tensor], value: float) -> Tensor:
    """Return tensors (n, ...) as one (B, N, ...), the shorter ones filled up with a value."""
    if len({len(tensor) for tensor in tensors}) == 1:
        return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]
    return pad_sequence(list(tensors), batch_first=True, padding_value=value)


class Sampler(Part):
    """What decides which candidates the losses are computed of: anchors, `rpn.sampler`, or RoIs, `roi.sampler`."""

    @abstractmethod
    def __call__(self, matches: Matches, number: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
        """Return the indices of positives (P,) and of negatives (Q,) of an image among its N candidates.

        Args:
            matches: What each candidate is.
            number: As many as are wanted: `samples_per_image`; there may be fewer.
            positive_fraction: Upper limit of the share of positives among them.
        """

    def of_images(
        self, matches: Sequence[Matches], number: int, positive_fraction: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the indices of each image."""
        return [self(own, number, positive_fraction) for own in matches]


class RandomSampler(Sampler):
    """Random ones; see `sample`."""

    def __call__(self, matches: Matches, number: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
        """Return the indices of an image; see `Sampler`."""
        return self.of_images([matches], number, positive_fraction)[0]

    def of_images(
        self, matches: Sequence[Matches], number: int, positive_fraction: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the indices of many images at once."""
        return sample([own.kind for own in matches], number, positive_fraction)


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


@dataclass
class IoUBalancedSampler(Sampler):
    """Random positives, and negatives drawn equally from intervals of their IoU (Libra R-CNN, Pang 2019, section 3.1).

    What an interval lacks is drawn at random from all other negatives, as in mmdetection, whose intervals go up to the
    best IoU of any candidate, which is 1 where objects are added to the proposals.

    Args:
        bins: How many equal intervals.
        upper: Where the last one ends.
    """

    bins: int = 3
    upper: float = 0.5

    @part(SAMPLING)
    def __call__(self, matches: Matches, number: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
        """Return the indices of an image; see `Sampler`."""
        positives = _draw((matches.kind == POSITIVE).nonzero().flatten(), int(number * positive_fraction))
        negatives, wanted = (matches.kind == NEGATIVE).nonzero().flatten(), number - len(positives)
        if len(negatives) > wanted:
            negatives = negatives[torch.randperm(len(negatives), device=negatives.device)]
            place = (matches.iou[negatives] * (self.bins / self.upper)).long().clamp(0, self.bins - 1)
            first = torch.zeros_like(negatives, dtype=torch.bool)
            for inside in (place == interval for interval in range(self.bins)):
                first |= inside & (inside.cumsum(0) <= wanted // self.bins)
            negatives = torch.cat((negatives[first], negatives[~first]))[:wanted]
        return positives, negatives


def _draw(indices: Tensor, number: int) -> Tensor:
    if len(indices) <= number:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:number]]


SamplerName = Literal["random", "iou_balanced"]
SAMPLERS: Final[dict[str, Callable[[], Sampler]]] = {"random": RandomSampler, "iou_balanced": IoUBalancedSampler}


def labelled(
    candidates: Sequence[Tensor],
    matches: Sequence[Matches],
    truths: Sequence[GroundTruth],
    drawn: Sequence[tuple[Tensor, Tensor]],
    coder: BoxCoder,
) -> list[SampledRoIs]:
    """Return drawn candidates of each image (indices of positives and negatives) with labels and deltas."""
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
    deltas = coder.encode(objects[of_object], boxes)
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


def joining(boxes: Tensor, option: bool | str, share: float) -> list[Tensor]:
    """Return what joins an image's proposals by `roi.append_gt`: none, its boxes (G, 4), or also jittered copies."""
    return [boxes, *([jittered(boxes, share)] if option == "jittered" else [])] if option else []


def hardest(boxes: Tensor, losses: Tensor, nms_iou: float, number: int) -> Tensor:
    """Return the ascending indices (at most `number`,) of the RoIs (R, 4) with the highest losses (R,).

    Of RoIs that overlap by more than `nms_iou` only the hardest is taken: they lie on the same cells, and their losses
    would count twice.
    """
    kept: Tensor = nms(boxes, losses, nms_iou)
    return kept[:number].sort().values


def hardest_rois(labelled: Sequence[SampledRoIs], losses: Tensor, nms_iou: float, number: int) -> list[SampledRoIs]:
    """Return the `hardest` RoIs of each image, by the losses (R,) of those of all."""
    kept = []
    for rois, loss in zip(labelled, losses.split([len(rois.labels) for rois in labelled]), strict=True):
        hard = hardest(rois.boxes, loss, nms_iou, number)
        kept.append(SampledRoIs(rois.boxes[hard], rois.labels[hard], rois.deltas[hard], rois.candidates[hard]))
    return kept


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
