"""What happens inside a pass of the detector, written down for whoever asks: callbacks, notebooks, tests.

    with closing(ask()) as record:
        losses = model.losses(images, targets)
    rescued = record.anchor_matches[0].rescued(model.rpn.config.positive_iou)

A Lightning callback asks in `on_train_batch_start` and closes in `on_train_batch_end`, or does so in the hooks of
validation; `detector.training.callbacks.inside_steps.InsideSteps` is a base class that does both on every n-th step.
Take what you need of the record, and let go of it: it keeps the tensors of the pass alive.

While nobody asks nothing is kept or computed. While somebody does, losses, random numbers and results are the same to
the bit, and a GPU is not waited for: tensors stay on the device, detached, and `len` of a list's entries is free. Each
asker has a record of its own; it holds the last pass since it was asked for. Threads see their own passes alone.

B images, L levels, A anchors per location, N all anchors of an image, K proposals before and P after NMS, S sampled
RoIs, R RoIs of all images, C classes without background. Boxes are in pixels of the batch; `to_original` of
`detector.image_batch` takes them to the image. Anchors have the same indices everywhere: into all N, level by level.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from detector.image_batch import ImageBatch
from detector.post_processing import Candidates
from detector.sampling import GroundTruth, Matches, SampledAnchors, SampledRoIs


class Proposals(NamedTuple):
    """The proposals of one image, before NMS and after.

    Boxes (K, 4), clipped to the image, objectness logits `scores` (K,) and the index of each one's anchor (K,), before
    NMS, without those that are too small; `kept` (P,): which of these NMS leaves, the best first.
    """

    boxes: Tensor
    scores: Tensor
    anchors: Tensor
    kept: Tensor


@dataclass(eq=False)
class StepRecord:
    """A pass through the detector; lists have one entry per image unless said otherwise, none if not computed.

    A pass of joint training fills in all but `detections`; an evaluation all that needs no objects; a step of
    alternating training what its network computes. With test-time augmentation it is the first view's, without
    `detections`, which come from all views. Of a cascade's stages it is the last one's, whose candidates are the boxes
    of the stage before, and objects; in evaluation each of its RoIs comes from the proposal of the same index.

    Attributes:
        batch: The images as the network sees them, and their sizes.
        truths: The objects.
        level_logits, level_deltas, level_anchors: The RPN's output per level: (B, n), (B, n, 4) and (n, 4).
        anchors_per_location: A of each level.
        anchor_matches: Kind, object and best IoU of each anchor (N,).
        sampled_anchors: Indices of the sampled positives and negatives, and the positives' target deltas.
        proposals: Before NMS and after.
        roi_candidates: Boxes that RoIs are drawn from: the P proposals, then added objects.
        roi_matches: Kind, object and best IoU of each of them.
        sampled_rois: RoIs that are learned from: boxes, labels, target deltas, and indices into `roi_candidates`.
        features: The feature maps that RoIs are pooled from, each (B, channels, h, w).
        rois: The boxes that `roi_logits` (R, C + 1) and `roi_deltas` (R, C, 4), or (R, 1, 4), are predicted for: all
            images' one after another, the sampled ones in training, the proposals in evaluation.
        roi_logits, roi_deltas: Predictions of the RoI heads.
        detections: Final ones, each with the index of its RoI among the P of its image.
    """

    batch: ImageBatch | None = None
    truths: Sequence[GroundTruth] = ()
    level_logits: Sequence[Tensor] = ()
    level_deltas: Sequence[Tensor] = ()
    level_anchors: Sequence[Tensor] = ()
    anchors_per_location: Sequence[int] = ()
    anchor_matches: Sequence[Matches] = ()
    sampled_anchors: Sequence[SampledAnchors] = ()
    proposals: Sequence[Proposals] = ()
    roi_candidates: Sequence[Tensor] = ()
    roi_matches: Sequence[Matches] = ()
    sampled_rois: Sequence[SampledRoIs] = ()
    features: Sequence[Tensor] = ()
    rois: Sequence[Tensor] = ()
    roi_logits: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    roi_deltas: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 4))
    detections: Sequence[Candidates] = ()

    @property
    def anchors(self) -> Tensor:
        """Return all anchors (N, 4), of all levels."""
        return torch.cat(list(self.level_anchors))

    @property
    def logits(self) -> Tensor:
        """Return the objectness (B, N) of all anchors."""
        return torch.cat(list(self.level_logits), 1)

    @property
    def deltas(self) -> Tensor:
        """Return the deltas (B, N, 4) at all anchors."""
        return torch.cat(list(self.level_deltas), 1)

    @property
    def shape_of_anchor(self) -> Tensor:
        """Return the index (N,) of each anchor's shape: those of finer levels first, then its place in its location."""
        shapes = torch.arange(sum(self.anchors_per_location), device=self.level_anchors[0].device)
        of_levels = zip(shapes.split(list(self.anchors_per_location)), self.level_anchors, strict=True)
        return torch.cat([own.repeat(len(anchors) // len(own)) for own, anchors in of_levels])

    def close(self) -> None:
        """Let passes go unrecorded from here on; what is recorded stays."""
        _asking.set(tuple(record for record in _asking.get() if record is not self))


_asking: ContextVar[tuple[StepRecord, ...]] = ContextVar("_asking", default=())


def ask() -> StepRecord:
    """Return a new record, which the passes of this thread fill in until it is closed."""
    record = StepRecord()
    _asking.set((*_asking.get(), record))
    return record


def asking() -> tuple[StepRecord, ...]:
    """Return the records that are open: the parts of the detector write into them."""
    return _asking.get()


@contextmanager
def unrecorded() -> Iterator[None]:
    """Leave the passes within out of all records."""
    token = _asking.set(())
    try:
        yield
    finally:
        _asking.reset(token)
