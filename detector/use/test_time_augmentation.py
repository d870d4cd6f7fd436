"""Test-time augmentation: each image is seen in several views, mirrored and at several sizes.

All views' candidates above the score threshold meet, in pixels of the original image, in one NMS.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from detector.image_batch import ImageBatch, ImageConfig, all_to_original, to_batch, to_original
from detector.post_processing import Candidates
from detector.roi_heads import RoIHeads
from detector.step_record import unrecorded


class Detector(Protocol):
    """The part of `FasterRCNN` that looking at views needs; that network calls this module."""

    image_config: ImageConfig
    roi_heads: RoIHeads

    def features(self, images: Sequence[Tensor], image: ImageConfig | None = None) -> tuple[list[Tensor], ImageBatch]:
        """Return feature maps, and the batch that they were computed from."""

    def proposals(self, features: Sequence[Tensor], batch: ImageBatch) -> list[Tensor]:
        """Return the proposals of each image."""


class View(NamedTuple):
    """A way to look at an image: at the size of `image`, mirrored or not."""

    image: ImageConfig
    mirrored: bool


def views(config: ImageConfig) -> list[View]:
    """Return the views of an image in evaluation; one, as it is, unless the configuration asks for more."""
    usual = config.shortest_side[-1]
    sizes = [
        replace(
            config,
            shortest_side=[side],
            longest_side=config.longest_side * side // usual,
            test_flip=False,
            test_shortest_sides=[],
        )
        for side in config.test_shortest_sides or [usual]
    ]
    return [View(size, mirrored) for size in sizes for mirrored in ((False, True) if config.test_flip else (False,))]


def mirror(boxes: Tensor, width: int) -> Tensor:
    """Return boxes (..., 4) in the mirror image of an image of `width`: x becomes width - x."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((width - x2, y1, width - x1, y2), dim=-1)


def detect_in_views(
    model: Detector, images: Sequence[Tensor], given: Sequence[Tensor] | None = None
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Return what `FasterRCNN.forward` does, over all views of each image, and the proposals of the first view."""
    found: list[list[Candidates]] = [[] for _ in images]
    first_proposals: list[Tensor] = []
    for view in views(model.image_config):
        with unrecorded() if first_proposals else nullcontext():
            seen = [image.flip(-1) if view.mirrored else image for image in images]
            features, batch = model.features(seen, view.image)
            if given is None:
                proposals = model.proposals(features, batch)
            else:
                widths = [width for _, width in batch.original_sizes]
                mirrored = map(mirror, given, widths) if view.mirrored else given
                proposals = to_batch(list(mirrored), batch)
            first_proposals = first_proposals or all_to_original(proposals, batch)
            predictions = model.roi_heads.predictions(features, proposals, batch)
            for index, candidates in enumerate(model.roi_heads.candidates(*predictions, batch)):
                boxes = to_original(candidates.boxes, batch, index)
                boxes = mirror(boxes, batch.original_sizes[index][1]) if view.mirrored else boxes
                found[index].append(candidates._replace(boxes=boxes))
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    merged = model.roi_heads.suppress([Candidates(*map(torch.cat, zip(*each, strict=True))) for each in found], sizes)
    return [{"boxes": each.boxes, "labels": each.labels, "scores": each.scores} for each in merged], first_proposals
