"""RoI heads: sampled proposals -> pooled features -> class scores and boxes, their two losses, and the final
detections.

B images, R RoIs of all images together, C classes without background, D detections of an image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, roi_pool

from detector import boxes as box_ops
from detector import losses
from detector.backbones.base import BoxHead
from detector.errors import InputError
from detector.image_batch import ImageBatch, to_original
from detector.roi_pooling import pool_aligned
from detector.sampling import GroundTruth, match, sample, split_difficult


@dataclass
class RoIConfig:
    """Sampling of RoIs, pooling, the box head's losses, and post-processing.

    Args:
        samples_per_image: RoIs that an image contributes to the losses.
        positive_fraction: Upper limit of the share of positives among them.
        positive_iou: A RoI at or above this IoU with an object takes its class.
        background_iou: A RoI whose best IoU lies in [low, high) is background. Fast R-CNN: [0.1, 0.5]; later code: [0,
            0.5].
        append_gt: Add the ground-truth boxes to the proposals in training.
        pooling: `roi_align`, `roi_align_legacy` (without the half-pixel shift; torchvision's detectors) or `roi_pool`
            (the paper).
        sampling_ratio: RoIAlign's sampling points per bin and axis; 0: adaptive.
        delta_std: The targets' standard deviations, by which deltas are divided.
        class_agnostic: One box for all classes instead of one per class.
        reg_beta: Smooth L1's turning point on normalised deltas; the paper: 1, torchvision: 1/9.
        reg_normalizer: Box loss divided by the number of `samples` or of `positives`.
        reg_weight: Weight of the box loss in the total.
        score_threshold: Detections at or below this score are dropped.
        nms_iou: A detection is dropped if it overlaps a better one of its class by more than this.
        detections_per_image: Upper limit of detections of an image.
    """

    samples_per_image: int = 128
    positive_fraction: float = 0.25
    positive_iou: float = 0.5
    background_iou: list[float] = field(default_factory=lambda: [0.0, 0.5])
    append_gt: bool = True
    pooling: Literal["roi_align", "roi_align_legacy", "roi_pool"] = "roi_align"
    sampling_ratio: int = 2
    delta_std: list[float] = field(default_factory=lambda: [0.1, 0.1, 0.2, 0.2])
    class_agnostic: bool = False
    reg_beta: float = 1.0
    reg_normalizer: losses.Normalizer = "samples"
    reg_weight: float = 1.0
    score_threshold: float = 0.05
    nms_iou: float = 0.3
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        if (
            len(self.background_iou) != 2
            or not 0 <= self.background_iou[0] < self.background_iou[1] <= self.positive_iou
        ):
            raise InputError(
                f"roi.background_iou: {self.background_iou} must be [low, high] with "
                f"0 <= low < high <= roi.positive_iou = {self.positive_iou}"
            )
        if len(self.delta_std) != 4 or min(self.delta_std) <= 0:
            raise InputError(f"roi.delta_std: {self.delta_std} must be 4 positive numbers")
        if self.samples_per_image < 1 or not 0 < self.positive_fraction <= 1:
            raise InputError(
                f"roi.samples_per_image {self.samples_per_image} must be at least 1 and "
                f"roi.positive_fraction {self.positive_fraction} in (0, 1]"
            )


class BoxPredictor(nn.Module):
    """Linear layers for class scores (R, C + 1) and deltas (R, C * 4), or (R, 4) if class-agnostic.

    Args:
        in_features: Width of the box head's output.
        num_classes: C.
        class_agnostic: One set of deltas for all classes.
    """

    def __init__(self, in_features: int, num_classes: int, class_agnostic: bool) -> None:
        super().__init__()
        self.scores = nn.Linear(in_features, num_classes + 1)
        self.deltas = nn.Linear(in_features, 4 if class_agnostic else 4 * num_classes)
        nn.init.normal_(self.scores.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.scores.bias)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and deltas in float32 for RoI features (R, in_features)."""
        return self.scores(x).float(), self.deltas(x).float()


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
        self.predictor = BoxPredictor(box_head.out_channels, num_classes, config.class_agnostic)

    def forward(self, features: Sequence[Tensor], rois: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (R, C + 1) and deltas (R, C, 4), or (R, 1, 4) if class-agnostic, for RoIs (n, 4) of each
        image."""
        logits, deltas = self.predictor(self.box_head(self.pool(features, rois)))
        return logits, deltas.unflatten(1, (-1, 4))

    def pool(self, features: Sequence[Tensor], rois: Sequence[Tensor]) -> Tensor:
        """Pooled features (R, channels, pool_size, pool_size), each RoI from the level that fits its size."""
        image = torch.cat([boxes.new_full((len(boxes), 1), i) for i, boxes in enumerate(rois)])
        boxes = torch.cat((image, torch.cat(list(rois))), dim=1)  # (R, 5)
        if len(self.strides) == 1:
            return self._pool_level(features[0], boxes, self.strides[0])
        level_of_roi = self.assign_levels(boxes[:, 1:])
        size = self.box_head.pool_size
        pooled = features[0].new_zeros(len(boxes), features[0].shape[1], size, size)
        for level, stride in enumerate(self.strides):
            index = torch.where(level_of_roi == level)[0]
            pooled = pooled.index_copy(
                0, index, self._pool_level(features[level], boxes[index], stride).to(pooled.dtype)
            )
        return pooled

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Index (R,) of the level to pool each box (R, 4) from: one level up for each doubling of its side.

        Of levels with equal strides only the first can be chosen.
        """
        _, _, width, height = box_ops.centers_and_sides(boxes)
        octaves = torch.log2((width * height).clamp(min=1e-6).sqrt() / self.canonical_level_side)
        finest, coarsest = (int(math.log2(stride)) for stride in (self.strides[0], self.strides[-1]))
        return (torch.floor(4 + octaves + 1e-6)).clamp(finest, coarsest).to(torch.int64) - finest

    def _pool_level(self, features: Tensor, boxes: Tensor, stride: int) -> Tensor:
        size, scale = self.box_head.pool_size, 1.0 / stride
        if self.config.pooling == "roi_pool":
            return roi_pool(features.float(), boxes, size, scale)
        aligned = self.config.pooling == "roi_align"
        return pool_aligned(features, boxes, size, scale, self.config.sampling_ratio, aligned)

    @torch.no_grad()
    def sample_rois(
        self, proposals: Sequence[Tensor], truths: Sequence[GroundTruth], difficult: str
    ) -> list[SampledRoIs]:
        """Training RoIs of each image from its proposals (P, 4) and objects."""
        config = self.config
        sampled = []
        for boxes, full_truth in zip(proposals, truths, strict=True):
            truth, ignored = split_difficult(full_truth, difficult)
            if config.append_gt:
                boxes = torch.cat((boxes, truth.boxes))
            low, high = config.background_iou
            matches = match(boxes, truth.boxes, config.positive_iou, (low, high), ignore_boxes=ignored)
            positives, negatives = sample(matches.kind, config.samples_per_image, config.positive_fraction)
            index = matches.index[positives]
            background = torch.zeros_like(negatives)
            deltas = box_ops.encode(truth.boxes[index], boxes[positives], config.delta_std)
            sampled.append(
                SampledRoIs(
                    boxes[torch.cat((positives, negatives))],
                    torch.cat((truth.labels[index], background)),
                    torch.cat((deltas, deltas.new_zeros(len(negatives), 4))),
                )
            )
        return sampled

    def losses(self, logits: Tensor, deltas: Tensor, sampled: Sequence[SampledRoIs]) -> dict[str, Tensor]:
        """`loss_roi_cls` and `loss_roi_reg` (without its weight) over the sampled RoIs of all images."""
        labels = torch.cat([rois.labels for rois in sampled])
        targets = torch.cat([rois.deltas for rois in sampled])
        positive = torch.where(labels > 0)[0]
        column = torch.zeros_like(positive) if self.config.class_agnostic else labels[positive] - 1
        return {
            "loss_roi_cls": losses.roi_classification_loss(logits, labels),
            "loss_roi_reg": losses.box_loss(
                deltas[positive, column],
                targets[positive],
                self.config.reg_beta,
                len(labels),
                self.config.reg_normalizer,
            ),
        }

    @torch.no_grad()
    def detections(
        self, logits: Tensor, deltas: Tensor, rois: Sequence[Tensor], batch: ImageBatch
    ) -> list[dict[str, Tensor]]:
        """Final detections of each image in its original pixels: `boxes` (D, 4), `labels` (D,), `scores` (D,)
        descending."""
        counts = [len(boxes) for boxes in rois]
        scores = logits.softmax(dim=-1)[:, 1:]  # (R, C)
        boxes = box_ops.decode(deltas, torch.cat(list(rois))[:, None], self.config.delta_std)
        boxes = boxes.expand(-1, self.num_classes, -1)  # (R, C, 4)
        return [
            self._select(image_boxes, image_scores, batch, image)
            for image, (image_boxes, image_scores) in enumerate(
                zip(boxes.split(counts), scores.split(counts), strict=True)
            )
        ]

    def _select(self, boxes: Tensor, scores: Tensor, batch: ImageBatch, image: int) -> dict[str, Tensor]:
        """Threshold, NMS within each class, and the best detections, of boxes (n, C, 4) with scores (n, C)."""
        config = self.config
        boxes = box_ops.clip(boxes, batch.sizes[image])
        roi, column = torch.where(scores > config.score_threshold)
        boxes, scores, labels = boxes[roi, column], scores[roi, column], column + 1
        usable = box_ops.has_sides_of(boxes, 1e-2)
        boxes, scores, labels = boxes[usable], scores[usable], labels[usable]
        keep = batched_nms(boxes, scores, labels, config.nms_iou)[: config.detections_per_image]
        return {"boxes": to_original(boxes[keep], batch, image), "labels": labels[keep], "scores": scores[keep]}
