"""Cascade R-CNN (Cai and Vasconcelos, CVPR 2018; arXiv 1712.00726): RoI heads in stages for ever better boxes.

A stage is trained on boxes that the one before has refined, and calls them positive from a higher IoU on. What the
paper leaves open is as in mmdetection's `CascadeRoIHead`: each stage draws its samples anew, from the refined ones of
the stage before and the objects, and the losses of later stages count less.

B images, P proposals and S sampled RoIs of an image, R RoIs of all images, C classes without background.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from detector import boxes as box_ops
from detector.backbones.box_heads import BoxHead
from detector.image_batch import ImageBatch
from detector.kernels.parts import TARGETS, part
from detector.kernels.transfers import rows_of_images, together, true_indices
from detector.post_processing import Candidates
from detector.roi_heads import RoIConfig, RoIHeads
from detector.sampling import GroundTruth, SampledRoIs


def stage_stds(delta_std: Sequence[float], of_stages: Sequence[list[float]], stages: int) -> list[list[float]]:
    """Return `delta_std` of each stage: `of_stages` where it names any, or that of the first divided by 1, 2, 3, ..."""
    return list(of_stages) or [[std / stage for std in delta_std] for stage in range(1, 1 + stages)]


def stage_configs(config: RoIConfig) -> list[RoIConfig]:
    """Return the options of each stage of a cascade."""
    stds = stage_stds(config.delta_std, config.cascade_delta_std, len(config.cascade_ious))
    low, first = config.background_iou
    return [
        replace(config, positive_iou=iou, background_iou=[low, iou if stage else first], delta_std=std, cascade_ious=[])
        for stage, (iou, std) in enumerate(zip(config.cascade_ious, stds, strict=True))
    ]


class CascadeRoIHeads(RoIHeads):
    """The first stage, which holds the others; `later` begin with copies of its box head."""

    def __init__(self, box_head: BoxHead, strides: Sequence[int], num_classes: int, config: RoIConfig) -> None:
        super().__init__(box_head, strides, num_classes, config)
        self.later = nn.ModuleList(
            RoIHeads(deepcopy(box_head), strides, num_classes, stage) for stage in stage_configs(config)[1:]
        )

    @property
    def stages(self) -> list[RoIHeads]:
        """Return the heads that boxes pass one after another."""
        return [self, *self.later]

    def training_losses(
        self,
        features: Sequence[Tensor],
        proposals: Sequence[Tensor],
        batch: ImageBatch,
        truths: Sequence[GroundTruth],
        difficult: str,
    ) -> dict[str, Tensor]:
        """Return the weighted sums of the stages' losses, and each by itself, such as `loss_roi_cls_1`."""
        losses = []
        for stage in self.stages:
            sampled = stage.sample_rois(proposals, truths, difficult, features)
            logits, deltas = stage(features, [rois.boxes for rois in sampled])
            losses.append(stage.losses(logits, deltas, sampled))
            if stage is not self.stages[-1]:
                proposals = next_proposals(stage, deltas, sampled, proposals, batch)
        return summed(losses, self.config.cascade_weights)

    def predictions(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], batch: ImageBatch
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Return the logits of the mean scores, the last stage's deltas, and the RoIs that these are for."""
        logits, deltas = self(features, proposals)
        of_stages = [logits]
        for stage, following in zip(self.stages, self.later, strict=False):
            proposals = refined(stage, deltas, proposals, batch)
            logits, deltas = following(features, proposals)
            of_stages.append(logits)
        return mean_logits(of_stages), deltas, proposals

    def candidates(self, logits: Tensor, deltas: Tensor, rois: Sequence[Tensor], batch: ImageBatch) -> list[Candidates]:
        """Return the boxes above the score threshold of each image, of the last stage's deltas."""
        return self.stages[-1].candidates(logits, deltas, rois, batch)


def summed(losses: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted sums of the losses of several stages, and each by itself, without its weight."""
    if len(losses) == 1:
        return losses[0]
    weighted = {
        name: [weight * of_stage[name] for weight, of_stage in zip(weights, losses, strict=True)] for name in losses[0]
    }
    sums = {name: torch.stack(own).sum() for name, own in weighted.items()}
    return sums | {f"{name}_{stage}": own[name] for name in sums for stage, own in enumerate(losses, start=1)}


def mean_logits(logits: Sequence[Tensor]) -> Tensor:
    """Return logits (R, C + 1) whose scores are the means of those of all stages' logits."""
    return logits[0] if len(logits) == 1 else torch.stack(list(logits)).softmax(dim=-1).mean(dim=0).log()


@torch.no_grad()
def refined(stage: RoIHeads, deltas: Tensor, rois: Sequence[Tensor], batch: ImageBatch) -> list[Tensor]:
    """Return the boxes (n, 4) that a stage's deltas (R, 1, 4) make of the RoIs (n, 4) of each image, clipped to it."""
    counts = [len(own) for own in rois]
    boxes = stage.coder.decode(deltas[:, 0], together(rois))
    corners = rows_of_images([(w, h, w, h) for h, w in batch.sizes], counts, boxes)
    return list(box_ops.clip(boxes, corners).split(counts))


@part(TARGETS)
def next_proposals(
    stage: RoIHeads, deltas: Tensor, sampled: Sequence[SampledRoIs], proposals: Sequence[Tensor], batch: ImageBatch
) -> list[Tensor]:
    """Return a stage's sampled RoIs of each image, refined, without those that had joined the proposals (P, 4)."""
    boxes = refined(stage, deltas, [rois.boxes for rois in sampled], batch)
    kept = true_indices([rois.candidates < len(own) for rois, own in zip(sampled, proposals, strict=True)])
    return [own[which] for own, which in zip(boxes, kept, strict=True)]
