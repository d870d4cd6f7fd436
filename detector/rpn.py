"""The region proposal network: objectness and deltas at every anchor, proposals for the RoI heads, and its two losses.

B images, A anchors per location, L levels, N all anchors of an image, P proposals of an image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from detector import boxes as box_ops
from detector import losses
from detector.anchors import AnchorConfig, AnchorGenerator
from detector.errors import InputError, check_choices, check_numbers
from detector.image_batch import ImageBatch
from detector.kernels.parts import ANCHORS, LOSSES, PROPOSALS, RPN_HEAD, TARGETS, part
from detector.kernels.transfers import true_indices
from detector.sampling import IGNORED, GroundTruth, Matches, SampledAnchors, match, sample
from detector.step_record import Proposals, StepRecord, asking


@dataclass
class RPNConfig:
    """Region proposal network.

    Args:
        hidden_channels: Channels of the 3x3 convolution; 0: as many as the backbone's features. The paper: 512 for
            VGG16.
        conv_depth: How many 3x3 convolutions. The paper: 1; torchvision's `fasterrcnn_resnet50_fpn_v2`: 2.
        objectness: `sigmoid` over one score (torchvision, detectron2) or `softmax` over two (the paper) per anchor.
        init_std: Standard deviation of the initial weights of all three layers (the paper: 0.01).
        positive_iou: Anchors at or above this IoU with an object are positive (0.7 in the paper and its ports).
        negative_iou: Anchors below this IoU with every object are negative; those between are not used (0.3 in the
            paper and its ports).
        best_per_object: Also make an object's best anchors positive, whatever their IoU (the paper's rule i): true
            (ties included: py-faster-rcnn, torchvision, detectron2), false, or `one` (only the first of the best, which
            then learns that object: bubbliiiing's port).
        samples_per_image: Anchors that an image contributes to the losses (256 in the paper and its ports).
        positive_fraction: Upper limit of the share of positives among them (0.5 in the paper and its ports).
        pre_nms_train: Proposals per image and level before NMS in training, by score. py-faster-rcnn: 12000;
            torchvision: 2000.
        post_nms_train: Proposals per image after NMS in training. The paper: 2000; bubbliiiing's port: 600.
        pre_nms_test: As `pre_nms_train`, in evaluation. py-faster-rcnn: 6000; bubbliiiing's port: 3000; torchvision:
            1000.
        post_nms_test: As `post_nms_train`, in evaluation. The paper: 300; torchvision: 1000.
        nms_iou: A proposal is dropped if it overlaps a better one by more than this (0.7 in the paper and its ports).
        min_side: Proposals with a side shorter than this many pixels of the resized image are dropped (py-faster-rcnn:
            16; detectron2: 0).
        min_side_scales: Count `min_side` in pixels of the original image, that is, multiply it by the factor by which
            the image was resized (py-faster-rcnn, chenyuntc's port).
        score_threshold: Proposals whose objectness is a lower probability than this are dropped before NMS.
            torchvision's `fasterrcnn_mobilenet_v3_large_320_fpn`: 0.05.
        reg_beta: Smooth L1's turning point; 1/9 is sigma = 3 (py-faster-rcnn, mx-rcnn, torchvision). detectron2: 0.
        reg_normalizer: Box loss divided by the number of `samples` (py-faster-rcnn, torchvision), of `positives`, by
            `samples_per_image` times the images, whether so many were found or not (detectron2, mx-rcnn), or by the
            number of `locations` of the feature map without padding (the paper: about 2400).
        reg_weight: Weight lambda of the box loss in the total. The paper: 10, with `locations`; 1 in most code.
    """

    hidden_channels: int = 0
    conv_depth: int = 1
    objectness: Literal["sigmoid", "softmax"] = "sigmoid"
    init_std: float = 0.01
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    best_per_object: bool | Literal["one"] = True
    samples_per_image: int = 256
    positive_fraction: float = 0.5
    pre_nms_train: int = 12000
    post_nms_train: int = 2000
    pre_nms_test: int = 6000
    post_nms_test: int = 300
    nms_iou: float = 0.7
    min_side: float = 0.0
    min_side_scales: bool = False
    score_threshold: float = 0.0
    reg_beta: float = 1 / 9
    reg_normalizer: losses.RPNNormalizer = "samples"
    reg_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.negative_iou <= self.positive_iou <= 1:
            raise InputError(
                f"rpn.negative_iou {self.negative_iou} and rpn.positive_iou {self.positive_iou}: "
                "need 0 <= negative_iou <= positive_iou <= 1"
            )
        allowed = {
            "(0, 1]": "positive_fraction",
            "[0, 1)": "score_threshold",
            "[0, 1]": "nms_iou",
            "[1, inf]": "conv_depth samples_per_image pre_nms_train post_nms_train pre_nms_test post_nms_test",
            "[1, 100]": "conv_depth",
            "[0, 65536]": "hidden_channels",
            "[0, inf]": "hidden_channels init_std min_side reg_beta reg_weight",
        }
        check_numbers("rpn", self, allowed)
        check_choices("rpn", self)


class RPNHead(nn.Module):
    """3x3 convolutions, then 1x1 convolutions for objectness and deltas, shared by all levels."""

    def __init__(self, in_channels: int, anchors_per_location: int, config: RPNConfig) -> None:
        super().__init__()
        hidden = config.hidden_channels or in_channels
        self.softmax = config.objectness == "softmax"
        self.conv = nn.Conv2d(in_channels, hidden, kernel_size=3, padding=1)
        self.deeper = nn.ModuleList(
            nn.Conv2d(hidden, hidden, kernel_size=3, padding=1) for _ in range(config.conv_depth - 1)
        )
        self.objectness = nn.Conv2d(hidden, anchors_per_location * (2 if self.softmax else 1), kernel_size=1)
        self.deltas = nn.Conv2d(hidden, anchors_per_location * 4, kernel_size=1)
        for layer in (self.conv, *self.deeper, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=config.init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits (B, h * w * A) and deltas (B, h * w * A, 4) of each level, float32, in the anchors' order.

        With softmax the two scores of an anchor are (background, object), and the logit is their difference.
        """
        logits, deltas = [], []
        for level in features:
            hidden = level
            for convolution in (self.conv, *self.deeper):
                hidden = F.relu(convolution(hidden), inplace=True)
            # bfloat16 tells few scores apart, which costs ranks, and it saves no time in layers as small as these.
            with torch.autocast(hidden.device.type, enabled=False):
                hidden = hidden.float()
                scores = self.objectness(hidden).permute(0, 2, 3, 1).flatten(1)
                offsets = self.deltas(hidden).permute(0, 2, 3, 1).reshape(len(level), -1, 4)
            if self.softmax:
                scores = scores.unflatten(1, (-1, 2))
                scores = scores[..., 1] - scores[..., 0]
            logits.append(scores)
            deltas.append(offsets)
        return logits, deltas


class RPNOutput(NamedTuple):
    """Predictions for a batch: per level logits (B, n), deltas (B, n, 4) and anchors (n, 4), n = h * w * A."""

    logits: list[Tensor]
    deltas: list[Tensor]
    anchors: list[Tensor]


class RegionProposalNetwork(nn.Module):
    """Head, anchors, proposals and losses; `strides` are pixels per cell of each level."""

    def __init__(self, in_channels: int, strides: Sequence[int], anchors: AnchorConfig, config: RPNConfig) -> None:
        super().__init__()
        self.config = config
        self.anchor_generator = AnchorGenerator(anchors, strides)
        self.head = RPNHead(in_channels, self.anchor_generator.anchors_per_location, config)

    def forward(self, features: Sequence[Tensor]) -> RPNOutput:
        """Return the predictions at all anchors, for features of all levels, each (B, channels, h, w)."""
        with part(RPN_HEAD):
            logits, deltas = self.head(features)
        sizes = [(int(level.shape[-2]), int(level.shape[-1])) for level in features]
        with part(ANCHORS):
            return RPNOutput(logits, deltas, self.anchor_generator(sizes, features[0].device))

    @part(PROPOSALS)
    @torch.no_grad()
    def proposals(self, output: RPNOutput, batch: ImageBatch) -> list[Tensor]:
        """Return the proposals (P, 4) of each image by descending objectness.

        The best by score are decoded, clipped, and go through NMS within each level.

        Detached: the RoI losses do not flow back into the proposals' coordinates (approximate joint training).
        """
        config = self.config
        before, after = (
            (config.pre_nms_train, config.post_nms_train)
            if self.training
            else (config.pre_nms_test, config.post_nms_test)
        )
        scores, candidates, levels, places = [], [], [], []
        for level, (logits, deltas, anchors) in enumerate(zip(*output, strict=True)):
            top, index = logits.topk(min(before, logits.shape[1]), dim=1)  # (B, k)
            chosen = deltas.gather(1, index[..., None].expand(-1, -1, 4))
            candidates.append(box_ops.decode(chosen, anchors[index]))
            scores.append(top)
            levels.append(torch.full_like(index, level))
            places.append(index)
        all_scores, all_boxes, all_levels = torch.cat(scores, 1), torch.cat(candidates, 1), torch.cat(levels, 1)
        clipped = [box_ops.clip(boxes, size) for boxes, size in zip(all_boxes, batch.sizes, strict=True)]
        # A side of 0 is never a proposal: its IoU and its RoI are undefined.
        usable = [
            box_ops.has_sides_of(boxes, max(self._min_side(batch, image), 1e-3)) for image, boxes in enumerate(clipped)
        ]
        if config.score_threshold > 0:
            likely = all_scores.sigmoid() >= config.score_threshold
            usable = [mask & own for mask, own in zip(usable, likely, strict=True)]
        proposals, survivors = [], []
        for image, kept in enumerate(true_indices(usable)):
            boxes = clipped[image][kept]
            keep = batched_nms(boxes, all_scores[image][kept], all_levels[image][kept], config.nms_iou)[:after]
            proposals.append(boxes[keep])
            survivors.append((kept, keep))
        for record in asking():
            self._record(record, output, batch)
            starts = accumulate((len(level) for level in output.anchors), initial=0)
            of_anchors = torch.cat([index + start for index, start in zip(places, starts, strict=False)], 1)
            record.proposals = [
                Proposals(clipped[image][kept], all_scores[image][kept].detach(), of_anchors[image][kept], keep)
                for image, (kept, keep) in enumerate(survivors)
            ]
        return proposals

    def _record(self, record: StepRecord, output: RPNOutput, batch: ImageBatch) -> None:
        record.batch, record.level_anchors = batch, output.anchors
        record.level_logits = [level.detach() for level in output.logits]
        record.level_deltas = [level.detach() for level in output.deltas]
        record.anchors_per_location = self.anchor_generator.anchors_per_location

    def _min_side(self, batch: ImageBatch, image: int) -> float:
        """Return the pixels of the resized image; its longer side shows best by which factor it was resized."""
        scale = max(batch.sizes[image]) / max(batch.original_sizes[image]) if self.config.min_side_scales else 1.0
        return self.config.min_side * scale

    def _locations(self, size: tuple[int, int]) -> int:
        """Count the feature cells of all levels over an image of `size` (height, width), without its padding."""
        return sum(math.prod(-(-side // stride) for side in size) for stride in self.anchor_generator.strides)

    def losses(
        self, output: RPNOutput, batch: ImageBatch, truths: Sequence[GroundTruth], difficult: str
    ) -> dict[str, Tensor]:
        """Return `loss_rpn_cls` and `loss_rpn_reg` (without its weight) over the sampled anchors of all images.

        The batch gives the images' sizes, for anchors that straddle the border; `difficult` is drop, keep or ignore.
        """
        return self.losses_of(output, self.sample_anchors(output, batch, truths, difficult), batch)

    @part(TARGETS)
    @torch.no_grad()
    def sample_anchors(
        self, output: RPNOutput, batch: ImageBatch, truths: Sequence[GroundTruth], difficult: str
    ) -> list[SampledAnchors]:
        """Draw the anchors of each image to learn from; see `losses`."""
        config = self.config
        anchors = torch.cat(output.anchors)
        matches = [
            self._match(anchors, truth, size, difficult) for truth, size in zip(truths, batch.sizes, strict=True)
        ]
        drawn = sample([image.kind for image in matches], config.samples_per_image, config.positive_fraction)
        sampled = [
            SampledAnchors(
                positives, negatives, box_ops.encode(truth.boxes[image.index[positives]], anchors[positives])
            )
            for (positives, negatives), image, truth in zip(drawn, matches, truths, strict=True)
        ]
        for record in asking():
            self._record(record, output, batch)
            record.truths, record.anchor_matches, record.sampled_anchors = truths, matches, sampled
        return sampled

    @part(LOSSES)
    def losses_of(self, output: RPNOutput, sampled: Sequence[SampledAnchors], batch: ImageBatch) -> dict[str, Tensor]:
        """Return `losses` over given anchors of each image."""
        config = self.config
        logits, deltas = torch.cat(output.logits, 1), torch.cat(output.deltas, 1)
        pairs = list(enumerate(sampled))
        samples = torch.cat([logits[image, torch.cat((s.positives, s.negatives))] for image, s in pairs])
        is_object = torch.cat(
            [
                torch.cat((torch.ones_like(s.positives), torch.zeros_like(s.negatives))).to(samples.dtype)
                for s in sampled
            ]
        )
        return {
            "loss_rpn_cls": losses.rpn_classification_loss(samples, is_object),
            "loss_rpn_reg": losses.box_loss(
                torch.cat([deltas[image, s.positives] for image, s in pairs]),
                torch.cat([s.deltas for s in sampled]),
                config.reg_beta,
                len(samples),
                config.reg_normalizer,
                config.samples_per_image * len(sampled),
                sum(map(self._locations, batch.sizes)),
            ),
        }

    def _match(self, anchors: Tensor, truth: GroundTruth, size: tuple[int, int], difficult: str) -> Matches:
        config = self.config
        drop = self.anchor_generator.config.straddling == "drop"
        inside = box_ops.is_inside(anchors, size) if drop else torch.ones_like(anchors[:, 0], dtype=torch.bool)
        # Before matching: an object's best anchor is its best among those that are used. Empty ones overlap nothing.
        matches = match(
            anchors * inside[:, None] if drop else anchors,
            truth.boxes,
            config.positive_iou,
            (0.0, config.negative_iou),
            config.best_per_object,
            truth.difficult,
            difficult,
        )
        return replace(matches, kind=matches.kind.masked_fill(~inside, IGNORED))
