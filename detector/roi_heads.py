"""RoI heads: sampled proposals -> pooled features -> class scores and boxes, their two losses, and the final
detections.

B images, R RoIs of all images together, C classes without background, D detections of an image.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import roi_pool

from detector import boxes as box_ops
from detector import losses
from detector.backbones.base import BoxHead
from detector.errors import InputError
from detector.hard_examples import hardest, read_only
from detector.image_batch import ImageBatch, to_original
from detector.post_processing import Candidates, likely_boxes, suppress
from detector.roi_config import RoIConfig
from detector.roi_pooling import pool_aligned, pool_by_level, pool_whole_cells
from detector.sampling import IGNORED, GroundTruth, jittered, match, sample
from detector.transfers import constant, true_indices

__all__ = ["BoxPredictor", "RoIConfig", "RoIHeads", "SampledRoIs"]


class BoxPredictor(nn.Module):
    """Linear layers for class scores (R, C + 1) and deltas (R, C * 4), or (R, 4) if class-agnostic.

    Args:
        in_features: Width of the box head's output.
        num_classes: C.
        class_agnostic: One set of deltas for all classes.
        score_std: Standard deviation of the initial weights of the scores.
        delta_std: And of the deltas.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        class_agnostic: bool,
        score_std: float = 0.01,
        delta_std: float = 0.001,
    ) -> None:
        super().__init__()
        self.scores = nn.Linear(in_features, num_classes + 1)
        self.deltas = nn.Linear(in_features, 4 if class_agnostic else 4 * num_classes)
        nn.init.normal_(self.scores.weight, std=score_std)
        nn.init.normal_(self.deltas.weight, std=delta_std)
        nn.init.zeros_(self.scores.bias)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and deltas in float32, under autocast too, for RoI features (R, in_features).

        bfloat16 tells few scores apart, which costs ranks, and it saves no time in layers as small as these.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self.scores(x.float()), self.deltas(x.float())


class SampledRoIs(NamedTuple):
    """RoIs of one image for training: boxes (S, 4), labels (S,) with 0 for background, deltas (S, 4) to the matched
    object.

    Positives come first; deltas of background RoIs are 0 and never used.
    """

    boxes: Tensor
    labels: Tensor
    deltas: Tensor


class RoIHeads(nn.Module):
    """Sampling, pooling, box head, predictor, losses and post-processing.

    Args:
        box_head: From the backbone: pooled features -> one vector per RoI.
        strides: Pixels per cell of the levels that are pooled from, fine to coarse.
        num_classes: C.
        config: All other options.
    """

    canonical_level_side = 224.0
    """A RoI of this side (square root of its area) is pooled from the level of stride 16 (FPN paper, eq. 1)."""

    def __init__(self, box_head: BoxHead, strides: Sequence[int], num_classes: int, config: RoIConfig) -> None:
        super().__init__()
        self.config = config
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.box_head = box_head
        self.predictor = BoxPredictor(
            box_head.out_channels, num_classes, config.class_agnostic, config.score_init_std, config.delta_init_std
        )
        if isinstance(config.class_weights, list) and len(config.class_weights) != num_classes + 1:
            raise InputError(
                f"roi.class_weights: {len(config.class_weights)} numbers for {num_classes} classes; "
                f"give {num_classes + 1}, the first for background"
            )

    def forward(self, features: Sequence[Tensor], rois: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (R, C + 1) and deltas (R, C, 4), or (R, 1, 4) if class-agnostic, for RoIs (n, 4) of each
        image."""
        return self.predict(self.pool(features, rois))

    def predict(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, from pooled features (R, channels, pool_size, pool_size)."""
        logits, deltas = self.predictor(self.box_head(pooled))
        return logits, deltas.unflatten(1, (-1, 4))

    def pool(self, features: Sequence[Tensor], rois: Sequence[Tensor]) -> Tensor:
        """Pooled features (R, channels, pool_size, pool_size), each RoI from the level that fits its size."""
        image = torch.cat([boxes.new_full((len(boxes), 1), i) for i, boxes in enumerate(rois)])
        boxes = torch.cat((image, torch.cat(list(rois))), dim=1)  # (R, 5)
        levels, strides, size = list(features)[: len(self.strides)], self.strides, self.box_head.pool_size
        of_roi = self.assign_levels(boxes[:, 1:]) if len(strides) > 1 else boxes.new_zeros(len(boxes)).long()
        if self.config.pooling == "roi_pool":
            return pool_by_level(
                levels, boxes, of_roi, size, lambda i, own: roi_pool(levels[i].float(), own, size, 1 / strides[i])
            )
        if self.config.pooling == "roi_pool_floor":
            return pool_by_level(
                levels, boxes, of_roi, size, lambda i, own: pool_whole_cells(levels[i], own, size, strides[i])
            )
        aligned = self.config.pooling == "roi_align"
        return pool_aligned(levels, boxes, of_roi, strides, size, self.config.sampling_ratio, aligned)

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Index (R,) of the level to pool each box (R, 4) from: one level up for each doubling of its side.

        Of levels with equal strides only the first can be chosen.
        """
        _, _, width, height = box_ops.centers_and_sides(boxes)
        octaves = torch.log2((width * height).clamp(min=1e-6).sqrt() / self.canonical_level_side)
        finest, coarsest = (int(math.log2(stride)) for stride in (self.strides[0], self.strides[-1]))
        return (torch.floor(4 + octaves + 1e-6)).clamp(finest, coarsest).to(torch.int64) - finest

    @torch.no_grad()
    def sample_rois(
        self,
        proposals: Sequence[Tensor],
        truths: Sequence[GroundTruth],
        difficult: str,
        features: Sequence[Tensor] | None = None,
    ) -> list[SampledRoIs]:
        """Training RoIs of each image from its proposals (P, 4) and objects; the hardest by `features`, with `ohem`."""
        config = self.config
        candidates, matches = [], []
        for image_proposals, truth in zip(proposals, truths, strict=True):
            added = self._added(truth)
            boxes = torch.cat((image_proposals, *added))
            low, high = config.background_iou
            found = match(
                boxes, truth.boxes, config.positive_iou, (low, high), difficult=truth.difficult, treatment=difficult
            )
            if difficult != "keep":  # those of difficult objects are not there
                found.kind[len(image_proposals) :].masked_fill_(truth.difficult.repeat(len(added)), IGNORED)
            candidates.append(boxes)
            matches.append(found)
        number, fraction = (
            (max(map(len, candidates)), 1.0) if config.ohem else (config.samples_per_image, config.positive_fraction)
        )
        drawn = sample([found.kind for found in matches], number, fraction)
        sampled = []
        for boxes, found, truth, (positives, negatives) in zip(candidates, matches, truths, drawn, strict=True):
            index = found.index[positives]
            background = torch.zeros_like(negatives)
            deltas = box_ops.encode(truth.boxes[index], boxes[positives], config.delta_std, config.delta_mean)
            sampled.append(
                SampledRoIs(
                    boxes[torch.cat((positives, negatives))],
                    torch.cat((truth.labels[index], background)),
                    torch.cat((deltas, deltas.new_zeros(len(negatives), 4))),
                )
            )
        return self._hardest(features, sampled) if config.ohem else sampled

    def _added(self, truth: GroundTruth) -> list[Tensor]:
        """Boxes (G, 4) that are added to an image's proposals: none, its objects, or these and jittered copies."""
        config = self.config
        jittered_too = [jittered(truth.boxes, config.gt_jitter)] if config.append_gt == "jittered" else []
        return [truth.boxes, *jittered_too] if config.append_gt else []

    def _hardest(self, features: Sequence[Tensor] | None, labelled: Sequence[SampledRoIs]) -> list[SampledRoIs]:
        """Of all labelled RoIs of each image the `samples_per_image` with the highest losses."""
        if features is None:
            raise ValueError("the features are needed to find the hardest RoIs")
        config = self.config
        with read_only(self.box_head, self.predictor):
            logits, deltas = self(features, [rois.boxes for rois in labelled])
        labels = torch.cat([rois.labels for rois in labelled])
        pred_deltas = deltas[torch.arange(len(labels), device=labels.device), self._column(labels)]
        targets = torch.cat([rois.deltas for rois in labelled])
        each = losses.loss_of_each_roi(logits, labels, pred_deltas, targets, config.reg_beta, config.reg_weight)
        chosen = []
        for rois, loss in zip(labelled, each.split([len(rois.labels) for rois in labelled]), strict=True):
            hard = hardest(rois.boxes, loss, config.ohem_nms_iou, config.samples_per_image)
            chosen.append(SampledRoIs(rois.boxes[hard], rois.labels[hard], rois.deltas[hard]))
        return chosen

    def _column(self, labels: Tensor) -> Tensor:
        """Column (S,) of the deltas that belongs to each label (S,); 0 for background, which has none."""
        return torch.zeros_like(labels) if self.config.class_agnostic else (labels - 1).clamp(min=0)

    def losses(self, logits: Tensor, deltas: Tensor, sampled: Sequence[SampledRoIs]) -> dict[str, Tensor]:
        """`loss_roi_cls` and `loss_roi_reg` (without its weight) over the sampled RoIs of all images."""
        labels = torch.cat([rois.labels for rois in sampled])
        targets = torch.cat([rois.deltas for rois in sampled])
        (positive,) = true_indices([labels > 0])
        return {
            "loss_roi_cls": losses.roi_classification_loss(logits, labels, self._class_weights(logits, labels)),
            "loss_roi_reg": losses.box_loss(
                deltas[positive, self._column(labels[positive])],
                targets[positive],
                self.config.reg_beta,
                len(labels),
                self.config.reg_normalizer,
                self.config.samples_per_image * len(sampled),
            ),
        }

    def _class_weights(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Weights (C + 1,) of the classes for RoIs with `logits` (S, C + 1) and `labels` (S,)."""
        weights = self.config.class_weights
        if isinstance(weights, list):
            return constant(weights, logits)
        return losses.balanced_class_weights(labels, self.num_classes) if weights == "balanced" else None

    @torch.no_grad()
    def detections(
        self, logits: Tensor, deltas: Tensor, rois: Sequence[Tensor], batch: ImageBatch
    ) -> list[dict[str, Tensor]]:
        """Final detections of each image in its original pixels: `boxes` (D, 4), `labels` (D,), `scores` (D,)
        descending."""
        kept = [self.suppress(found) for found in self.candidates(logits, deltas, rois, batch)]
        return [
            {"boxes": to_original(found.boxes, batch, image), "labels": found.labels, "scores": found.scores}
            for image, found in enumerate(kept)
        ]

    @torch.no_grad()
    def candidates(self, logits: Tensor, deltas: Tensor, rois: Sequence[Tensor], batch: ImageBatch) -> list[Candidates]:
        """Boxes above the score threshold of each image, in pixels of the batch, before NMS."""
        counts = [len(boxes) for boxes in rois]
        scores = logits.softmax(dim=-1)[:, 1:]  # (R, C)
        config = self.config
        boxes = box_ops.decode(deltas, torch.cat(list(rois))[:, None], config.delta_std, config.delta_mean)
        boxes = boxes.expand(-1, self.num_classes, -1)  # (R, C, 4)
        return likely_boxes(boxes.split(counts), scores.split(counts), batch.sizes, config.score_threshold)

    def suppress(self, found: Candidates) -> Candidates:
        """What NMS within each class, of the configured kind, leaves of an image's candidates; the best come first."""
        config = self.config
        return suppress(
            found,
            config.nms,
            config.nms_iou,
            config.soft_nms_sigma,
            config.score_threshold,
            config.detections_per_image,
        )
