"""RoI heads: from sampled proposals to class scores and boxes, their two losses, and the final detections.

B images, R RoIs of all images together, C classes without background, D detections of an image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from detector import boxes as box_ops
from detector import losses
from detector.assignment import Around, DynamicMatcher, Matcher, RoIMatcherName, roi_matcher
from detector.backbones.box_heads import BoxHead, BoxPredictor
from detector.errors import InputError, check_numbers
from detector.image_batch import ImageBatch, all_to_original
from detector.kernels.parts import BOX_HEAD, DETECTIONS, LOSSES, POOLING, TARGETS, part
from detector.kernels.transfers import send, starts_of, together, true_indices
from detector.parts import chosen, settle
from detector.post_processing import NMS, Candidates, Suppression, likely_boxes, suppression
from detector.roi_pooling import Pooling, levels_of_boxes, pool_rois
from detector.sampling import (
    IGNORED,
    SAMPLERS,
    GroundTruth,
    SampledRoIs,
    Sampler,
    SamplerName,
    hardest_rois,
    joining,
    labelled,
    read_only,
)
from detector.step_record import asking


@dataclass
class RoIConfig:
    """Sampling of RoIs, pooling, the box head's losses, and post-processing.

    Args:
        samples_per_image: RoIs that an image contributes to the losses. py-faster-rcnn: 128; torchvision, detectron2:
            512.
        positive_fraction: Upper limit of the share of positives among them (0.25 in Fast R-CNN and most code).
        sampler: Which of the others are drawn: `random`, or `iou_balanced`, equally many from each third of the IoUs
            from 0 to 0.5 (Libra R-CNN, Pang 2019); or one's own. Not used with `ohem`.
        matcher: Which RoIs are positive: `iou` (by the next two options), `dynamic` (by an IoU that rises in training,
            while `reg_beta` falls: Dynamic R-CNN, Zhang 2020), or a class path (detector.assignment.DynamicMatcher).
        positive_iou: A RoI at or above this IoU with an object takes its class.
        background_iou: A RoI whose best IoU lies in [low, high) is background. Fast R-CNN: [0.1, 0.5]; torchvision and
            detectron2: [0, 0.5].
        append_gt: Add the ground-truth boxes to the proposals in training: true (py-faster-rcnn, torchvision,
            detectron2), false, or `jittered`: the boxes and a shifted copy of each (longcw's port).
        gt_jitter: Jittered boxes are shifted along each axis by up to half this share of their side (longcw's port:
            0.05).
        pooling: `roi_align` (detectron2), `roi_align_legacy` (without the half-pixel shift; torchvision's detectors),
            `roi_pool` (the paper: corners rounded to the nearest cell) or `roi_pool_floor` (corners rounded down, then
            adaptive max pooling: tutorials without a pooling operator).
        sampling_ratio: RoIAlign's sampling points per bin and axis; 0: adaptive (detectron2). torchvision: 2.
        coder: What the four numbers of a box are: `deltas` to its RoI (the paper), or a coder of one's own, without
            the next two options.
        delta_mean: Subtracted from the targets' deltas (dx, dy, dw, dh) before they are divided by `delta_std`. 0 in
            py-faster-rcnn and chenyuntc's port.
        delta_std: The targets' standard deviations, by which deltas are divided. [0.1, 0.1, 0.2, 0.2] in
            py-faster-rcnn, torchvision (as weights 10, 10, 5, 5) and detectron2; [1, 1, 1, 1]: targets are not
            normalised.
        class_agnostic: One box for all classes (R-FCN) instead of one per class.
        class_weights: Weights of the classes in the classification loss, whose mean is then weighted: `none`;
            `balanced`: background counts as much as all objects of the batch (longcw's port); or a list of one number
            for background and one per class.
        cascade_ious: `positive_iou` of each stage of a Cascade R-CNN (Cai 2018: [0.5, 0.6, 0.7]), the first as above;
            []: no cascade. Each further stage has a box head and layers of its own, takes the boxes of the one before
            as its proposals, and has background up to its IoU; scores are averaged. Needs `class_agnostic`. A `matcher`
            of one's own decides alike in all stages, whose IoUs then do not count.
        cascade_delta_std: `delta_std` of each stage, the first as above; []: that divided by 1, 2, 3 and so on
            (detectron2's weights 10 to 30). mmdetection rounds the third one: [0.033, 0.033, 0.067, 0.067].
        cascade_weights: Weights of the stages' losses in the sums `loss_roi_cls` and `loss_roi_reg` (mmdetection).
        ohem: Train on the `samples_per_image` RoIs with the highest loss, instead of random ones at a fixed share of
            positives (online hard example mining, Shrivastava 2016, with `background_iou` from 0). All RoIs pass the
            head once more for it, without gradients and dropout; `class_weights` do not count there.
        ohem_nms_iou: Of RoIs that overlap by more than this only the hardest is trained on (Shrivastava 2016: 0.7).
        score_init_std: Standard deviation of the initial weights of the class scores (py-faster-rcnn: 0.01).
        delta_init_std: The same of the boxes' layer (py-faster-rcnn: 0.001).
        cls_loss: Of classes: `cross_entropy`, or a loss of one's own.
        cls_weight: Weight of the classification loss in the total (Double-Head in mmdetection: 2, and `reg_weight` 2).
        reg_loss: Of boxes: `smooth_l1` of deltas (the paper), or of decoded boxes `iou` (1 - IoU), `giou` (Rezatofighi
            2019), `diou` or `ciou` (Zheng 2020), as torchvision has them; or one's own. mmdetection: giou, weight 10.
        reg_beta: Smooth L1's turning point on normalised deltas; the paper, py-faster-rcnn: 1, torchvision: 1/9,
            detectron2: 0 (plain L1).
        reg_normalizer: Box loss divided by the number of `samples` (py-faster-rcnn, torchvision, detectron2), of
            `positives`, or by `samples_per_image` times the images, whether so many were found or not (mx-rcnn).
        reg_weight: Weight of the box loss in the total.
        score_threshold: Detections at or below this score are dropped (torchvision, detectron2: 0.05).
        nms: `hard`, or soft NMS (Bodla 2017), which lowers the scores of overlapping detections instead of dropping
            them: `soft_linear` by 1 - IoU above `nms_iou`, `soft_gaussian` by exp(-IoU^2 / `soft_nms_sigma`). A low
            `score_threshold` belongs to it, such as 0.001. Or a class of one's own.
        nms_iou: A detection is dropped if it overlaps a better one of its class by more than this. py-faster-rcnn: 0.3;
            torchvision, detectron2: 0.5.
        soft_nms_sigma: See `nms` (Bodla 2017: 0.5).
        detections_per_image: Upper limit of detections of an image.
    """

    samples_per_image: int = 128
    positive_fraction: float = 0.25
    sampler: SamplerName | Sampler = "random"
    matcher: RoIMatcherName | Matcher = "iou"
    positive_iou: float = 0.5
    background_iou: list[float] = field(default_factory=lambda: [0.0, 0.5])
    append_gt: bool | Literal["jittered"] = True
    gt_jitter: float = 0.05
    pooling: Pooling = "roi_align"
    sampling_ratio: int = 2
    coder: Literal["deltas"] | box_ops.BoxCoder = "deltas"
    delta_mean: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    delta_std: list[float] = field(default_factory=lambda: [0.1, 0.1, 0.2, 0.2])
    class_agnostic: bool = False
    class_weights: list[float] | Literal["none", "balanced"] = "none"
    cascade_ious: list[float] = field(default_factory=list)
    cascade_delta_std: list[list[float]] = field(default_factory=list)
    cascade_weights: list[float] = field(default_factory=lambda: [1.0, 0.5, 0.25])
    ohem: bool = False
    ohem_nms_iou: float = 0.7
    score_init_std: float = 0.01
    delta_init_std: float = 0.001
    cls_loss: Literal["cross_entropy"] | losses.ClassLoss = "cross_entropy"
    cls_weight: float = 1.0
    reg_loss: losses.BoxLossName | losses.BoxLoss = "smooth_l1"
    reg_beta: float = 1.0
    reg_normalizer: losses.Normalizer = "samples"
    reg_weight: float = 1.0
    score_threshold: float = 0.05
    nms: NMS | Suppression = "hard"
    nms_iou: float = 0.3
    soft_nms_sigma: float = 0.5
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        settle("roi", self)
        if (
            len(self.background_iou) != 2
            or not 0 <= self.background_iou[0] < self.background_iou[1] <= self.positive_iou
        ):
            raise InputError(
                f"roi.background_iou: {self.background_iou} must be [low, high] with "
                f"0 <= low < high <= roi.positive_iou = {self.positive_iou}"
            )
        for key, values in (("delta_mean", self.delta_mean), ("delta_std", self.delta_std)):
            if len(values) != 4:
                raise InputError(f"roi.{key}: {values} has {len(values)} numbers, needs 4: of dx, dy, dw, dh")
        allowed = {
            "(0, 1]": "positive_fraction",
            "[0, 1]": "positive_iou cascade_ious nms_iou ohem_nms_iou score_threshold",
            "(0, inf]": "delta_std soft_nms_sigma",
            "[1, inf]": "samples_per_image detections_per_image",
            "[0, inf]": "sampling_ratio gt_jitter score_init_std delta_init_std cls_weight reg_beta reg_weight "
            "cascade_weights",
        }
        check_numbers("roi", self, allowed)
        weights = self.class_weights
        if not isinstance(weights, str) and (not weights or min(weights) < 0 or max(weights) == 0):
            raise InputError(f"roi.class_weights: {weights} must not be negative, nor 0 altogether")
        if self.cascade_ious:
            self._check_cascade()

    def _check_cascade(self) -> None:
        ious, stds, weights = self.cascade_ious, self.cascade_delta_std, self.cascade_weights
        if ious[0] != self.positive_iou or len(ious) < 2:
            raise InputError(
                f"roi.cascade_ious: {ious} must begin with roi.positive_iou = {self.positive_iou}, and go on with one "
                "for each further stage, such as [0.5, 0.6, 0.7]"
            )
        if len(weights) != len(ious):
            raise InputError(f"roi.cascade_weights: {weights} must be one for each of roi.cascade_ious = {ious}")
        if stds and (stds[0] != self.delta_std or [len(std) for std in stds if min(std) > 0] != [4] * len(ious)):
            raise InputError(
                f"roi.cascade_delta_std: {stds} must begin with roi.delta_std = {self.delta_std}, and be 4 positive "
                f"numbers for each of roi.cascade_ious = {ious}"
            )
        if stds and self.coder != "deltas":
            raise InputError("roi.cascade_delta_std: is of roi.coder deltas; give [] with a coder of one's own")
        if self.matcher == "dynamic" or isinstance(self.matcher, DynamicMatcher):
            raise InputError("roi.matcher: dynamic moves the IoU that roi.cascade_ious sets for each stage; give iou")
        if not self.class_agnostic:
            raise InputError("roi.class_agnostic: false: a cascade refines one box for all classes; give true")


class RoIHeads(nn.Module):
    """Sampling, pooling, box head, predictor, losses and post-processing.

    `strides` are pixels per cell of the levels that are pooled from, fine to coarse.
    """

    canonical_level_side = 224.0
    """A RoI of this side (square root of its area) is pooled from the level of stride 16 (FPN paper, eq. 1)."""

    def __init__(self, box_head: BoxHead, strides: Sequence[int], num_classes: int, config: RoIConfig) -> None:
        super().__init__()
        self.config = config
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.box_head = box_head
        deviations = config.score_init_std, config.delta_init_std
        self.predictor = BoxPredictor(box_head.out_channels, num_classes, config.class_agnostic, *deviations)
        self.matcher = roi_matcher(config.matcher, config.positive_iou, config.background_iou, config.reg_beta)
        self.sampler = chosen(config.sampler, SAMPLERS)
        self.coder = box_ops.box_coder(config.coder, config.delta_std, config.delta_mean)
        self.nms = suppression(config.nms, config.nms_iou, config.soft_nms_sigma)
        self.class_loss = chosen(config.cls_loss, {"cross_entropy": losses.CrossEntropy})
        self.box_loss = losses.box_loss(config.reg_loss, config.reg_beta)
        self.matcher.box_loss(self.box_loss)  # refuses what it cannot work with
        if isinstance(config.class_weights, list) and len(config.class_weights) != num_classes + 1:
            raise InputError(
                f"roi.class_weights: {len(config.class_weights)} numbers for {num_classes} classes; "
                f"give {num_classes + 1}, the first for background"
            )

    @property
    def stages(self) -> list["RoIHeads"]:
        """Return the heads that boxes pass one after another: these alone, without a cascade."""
        return [self]

    def training_losses(
        self,
        features: Sequence[Tensor],
        proposals: Sequence[Tensor],
        batch: ImageBatch,
        truths: Sequence[GroundTruth],
        difficult: str,
    ) -> dict[str, Tensor]:
        """Return the `losses` over RoIs that are drawn from the proposals (P, 4) and objects of each image."""
        sampled = self.sample_rois(proposals, truths, difficult, features)
        logits, deltas = self(features, [rois.boxes for rois in sampled])
        return self.losses(logits, deltas, sampled)

    def predictions(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], batch: ImageBatch
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Return class logits, deltas and the RoIs that they are for, from the proposals (P, 4) of each image."""
        return *self(features, proposals), proposals

    def forward(self, features: Sequence[Tensor], rois: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return class logits (R, C + 1) and deltas (R, C, 4), or (R, 1, 4), of the RoIs (n, 4) of each image."""
        for record in asking():
            record.features = [level.detach() for level in features]
        return self.predict(self.pool(features, rois))

    @part(BOX_HEAD)
    def predict(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `forward` does, from pooled features (R, channels, pool_size, pool_size)."""
        logits, deltas = self.predictor(self.box_head(pooled))
        return logits, deltas.unflatten(1, (-1, 4))

    @part(POOLING)
    def pool(self, features: Sequence[Tensor], rois: Sequence[Tensor]) -> Tensor:
        """Return pooled features (R, channels, pool_size, pool_size), each RoI from the level that fits its size.

        Of a box head with several `scales` those of each follow one another as channels.
        """
        levels = list(features)[: len(self.strides)]
        options = self.box_head.scales, self.box_head.pool_size, self.config.pooling, self.config.sampling_ratio
        return pool_rois(levels, rois, self.assign_levels(together(rois)), self.strides, *options)

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Return the index (R,) of the level to pool each box (R, 4) from; see `levels_of_boxes`."""
        return levels_of_boxes(boxes, self.strides, self.canonical_level_side)

    @part(TARGETS)
    @torch.no_grad()
    def sample_rois(
        self,
        proposals: Sequence[Tensor],
        truths: Sequence[GroundTruth],
        difficult: str,
        features: Sequence[Tensor] | None = None,
    ) -> list[SampledRoIs]:
        """Draw training RoIs of each image from proposals (P, 4) and objects; with `ohem` the hardest by `features`."""
        config = self.config
        added = [joining(truth.boxes, config.append_gt, config.gt_jitter) for truth in truths]
        candidates = [torch.cat((own, *boxes)) for own, boxes in zip(proposals, added, strict=True)]
        matches = self.matcher.of_images(candidates, truths, difficult, [Around([len(own)]) for own in candidates])
        if difficult != "keep":  # those of difficult objects are not there
            for found, own, truth, boxes in zip(matches, proposals, truths, added, strict=True):
                for part, mask in enumerate([truth.difficult] * len(boxes)):
                    found.kind[len(own) + part * len(mask) :][: len(mask)].masked_fill_(mask, IGNORED)
        usual = config.samples_per_image, config.positive_fraction
        number, fraction = (max(map(len, candidates)), 1.0) if config.ohem else usual
        drawn = self.sampler.of_images(matches, number, fraction)
        sampled = labelled(candidates, matches, truths, drawn, self.coder)
        sampled = self._hardest(features, sampled) if config.ohem else sampled
        for record in asking():
            record.truths, record.sampled_rois = truths, sampled
            record.roi_candidates, record.roi_matches = candidates, matches
        return sampled

    def _hardest(self, features: Sequence[Tensor] | None, labelled: Sequence[SampledRoIs]) -> list[SampledRoIs]:
        """Return the `samples_per_image` labelled RoIs of each image that have the highest losses."""
        if features is None:
            raise ValueError("the features are needed to find the hardest RoIs")
        config = self.config
        with read_only(self.box_head, self.predictor):
            logits, deltas = self(features, [rois.boxes for rois in labelled])
        labels = torch.cat([rois.labels for rois in labelled])
        pred_deltas = deltas[torch.arange(len(labels), device=labels.device), self._column(labels)]
        targets, decode = torch.cat([rois.deltas for rois in labelled]), self._decoder(labelled, slice(None))
        of_boxes = self.matcher.box_loss(self.box_loss)(pred_deltas, targets, decode).sum(dim=1) * (labels > 0)
        each = config.cls_weight * self.class_loss.of_each(logits, labels) + config.reg_weight * of_boxes
        return hardest_rois(labelled, each, config.ohem_nms_iou, config.samples_per_image)

    def _column(self, labels: Tensor) -> Tensor:
        """Return the column (S,) of the deltas that belongs to each label (S,); 0 for background, which has none."""
        return torch.zeros_like(labels) if self.config.class_agnostic else (labels - 1).clamp(min=0)

    @part(LOSSES)
    def losses(self, logits: Tensor, deltas: Tensor, sampled: Sequence[SampledRoIs]) -> dict[str, Tensor]:
        """Return `loss_roi_cls` and `loss_roi_reg` (without their weights) over the sampled RoIs of all images."""
        self._record([rois.boxes for rois in sampled], logits, deltas)
        labels = together([rois.labels for rois in sampled])
        firsts = [rois.positives for rois in sampled]
        if None in firsts:
            (positive,) = true_indices([labels > 0])
        else:
            ranges = zip(firsts, starts_of([rois.labels for rois in sampled]), strict=True)
            rows = torch.cat([torch.arange(start, start + (count or 0)) for count, start in ranges])
            positive = send(rows, labels.device)
        of_boxes = self.matcher.box_loss(self.box_loss)(
            deltas.flatten(0, 1).index_select(0, positive * deltas.shape[1] + self._column(labels[positive])),
            together([rois.deltas for rois in sampled])[positive],
            self._decoder(sampled, positive),
        )
        asked, weights = self.config.samples_per_image * len(sampled), self.config.class_weights
        self.matcher.learn(sampled)
        return {
            "loss_roi_cls": self.class_loss(logits, labels, losses.class_weights(weights, logits, labels)),
            "loss_roi_reg": losses.normalized(of_boxes, len(labels), self.config.reg_normalizer, asked),
        }

    def _decoder(self, sampled: Sequence[SampledRoIs], which: Tensor | slice) -> Callable[[Tensor], Tensor]:
        """Return what gives the boxes (..., n, 4) of deltas (..., n, 4) of some of the sampled RoIs of all images."""
        return lambda own: self.coder.decode(own, together([rois.boxes for rois in sampled])[which])

    def _record(self, rois: Sequence[Tensor], logits: Tensor, deltas: Tensor) -> None:
        for record in asking():
            record.rois, record.roi_logits, record.roi_deltas = rois, logits.detach(), deltas.detach()

    @torch.no_grad()
    def detections(
        self, logits: Tensor, deltas: Tensor, rois: Sequence[Tensor], batch: ImageBatch
    ) -> list[dict[str, Tensor]]:
        """Return the final detections of each image in its original pixels, by descending score.

        They are `boxes` (D, 4), `labels` (D,) and `scores` (D,).
        """
        kept = self.suppress(self.candidates(logits, deltas, rois, batch), batch.sizes)
        for record in asking():
            record.detections = kept
        boxes = all_to_original([found.boxes for found in kept], batch)
        return [
            {"boxes": own, "labels": found.labels, "scores": found.scores}
            for own, found in zip(boxes, kept, strict=True)
        ]

    @part(DETECTIONS)
    @torch.no_grad()
    def candidates(self, logits: Tensor, deltas: Tensor, rois: Sequence[Tensor], batch: ImageBatch) -> list[Candidates]:
        """Return the boxes above the score threshold of each image, in pixels of the batch, before NMS."""
        self._record(rois, logits, deltas)
        counts = [len(boxes) for boxes in rois]
        scores = logits.softmax(dim=-1)[:, 1:]  # (R, C)
        boxes = self.coder.decode(deltas, together(rois)[:, None]).expand(-1, self.num_classes, -1)  # (R, C, 4)
        return likely_boxes(boxes, scores, counts, batch.sizes, self.config.score_threshold)

    @part(DETECTIONS)
    def suppress(self, images: Sequence[Candidates], sizes: Sequence[tuple[int, int]]) -> list[Candidates]:
        """Return the candidates of each image, of a size (height, width), that NMS leaves, the best first."""
        return self.nms.of_images(images, sizes, self.config.score_threshold, self.config.detections_per_image)
