"""The region proposal network: objectness and deltas at every anchor, proposals for the RoI heads, and its two losses.

B images, A anchors per location, L levels, N all anchors of an image, P proposals of an image.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detector import boxes as box_ops
from detector import losses
from detector.anchors import AnchorConfig, AnchorGenerator
from detector.assignment import AnchorMatcherName, Around, Matcher, anchor_matcher
from detector.errors import InputError, check_numbers
from detector.image_batch import ImageBatch
from detector.kernels.nms import nms_of_levels
from detector.kernels.parts import ANCHORS, LOSSES, PROPOSALS, RPN_HEAD, TARGETS, part
from detector.kernels.transfers import constant, joined, one_by_one, repeated, rows_of_images, together
from detector.parts import Part, chosen, settle
from detector.sampling import FAR, IGNORED, SAMPLERS, GroundTruth, Matches, SampledAnchors, Sampler, SamplerName
from detector.step_record import Proposals, StepRecord, asking


class RPNHeadPart(Part):
    """Layers of one's own for objectness and deltas, `rpn.head`."""

    @abstractmethod
    def build(self, in_channels: int, anchors_per_location: Sequence[int], config: "RPNConfig") -> nn.Module:
        """Return a module that does what `RPNHead` does; see its `forward`."""


@dataclass
class RPNConfig:
    """Region proposal network.

    Args:
        head: `conv` (by the next four options), or layers of one's own.
        hidden_channels: Channels of the 3x3 convolution; 0: as many as the backbone's features. The paper: 512 for
            VGG16.
        conv_depth: How many 3x3 convolutions. The paper: 1; torchvision's `fasterrcnn_resnet50_fpn_v2`: 2.
        objectness: `sigmoid` over one score (torchvision, detectron2) or `softmax` over two (the paper) per anchor.
        init_std: Standard deviation of the initial weights of all three layers (the paper: 0.01).
        matcher: Which anchors are positive: `iou` (by the next three options); `nwd` (the same with a Wasserstein
            distance instead of IoU, for tiny objects: Wang 2021); `atss` (by a threshold of IoU for each object, from
            its closest anchors: Zhang 2020); `simota` (those of the least losses for each object, which needs
            predictions: YOLOX, Ge 2021); or a class path, ours for options of theirs, such as
            detector.assignment.NWDMatcher with `constant`.
        positive_iou: Anchors at or above this IoU with an object are positive (0.7 in the paper and its ports).
        negative_iou: Anchors below this IoU with every object are negative; those between are not used (0.3 in the
            paper and its ports).
        best_per_object: Also make an object's best anchors positive, whatever their IoU (the paper's rule i): true
            (ties included: py-faster-rcnn, torchvision, detectron2), false, or `one` (only the first of the best, which
            then learns that object: bubbliiiing's port).
        sampler: Which of the others are drawn: `random`, `iou_balanced` (see that of roi), or a sampler of one's own.
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
        cls_loss: Of objectness: `bce` (binary cross-entropy) or `focal` (Lin 2017; `sigmoid` only), which is divided by
            the number of positives, and whose objectness starts at a probability of 0.01. RetinaNet's takes all
            anchors: `samples_per_image` 1000000, `positive_fraction` 1, `reg_normalizer` positives. Or a loss of one's
            own.
        focal_alpha: Weight of positives in the focal loss, that of negatives being 1 less it (Lin 2017: 0.25).
        focal_gamma: Power by which the focal loss spares what is right already (Lin 2017: 2).
        coder: What the four numbers of a box are: `deltas` to its anchor (the paper), or a coder of one's own.
        reg_loss: Of boxes: `smooth_l1` of deltas (the paper), or of decoded boxes `iou` (1 - IoU), `giou` (Rezatofighi
            2019), `diou` or `ciou` (Zheng 2020), all as torchvision computes them; or a loss of one's own.
        reg_beta: Smooth L1's turning point; 1/9 is sigma = 3 (py-faster-rcnn, mx-rcnn, torchvision). detectron2: 0.
        reg_normalizer: Box loss divided by the number of `samples` (py-faster-rcnn, torchvision), of `positives`, by
            `samples_per_image` times the images, whether so many were found or not (detectron2, mx-rcnn), or by the
            number of `locations` of the feature map without padding (the paper: about 2400).
        reg_weight: Weight lambda of the box loss in the total. The paper: 10, with `locations`; 1 in most code.
    """

    head: Literal["conv"] | RPNHeadPart = "conv"
    hidden_channels: int = 0
    conv_depth: int = 1
    objectness: Literal["sigmoid", "softmax"] = "sigmoid"
    init_std: float = 0.01
    matcher: AnchorMatcherName | Matcher = "iou"
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    best_per_object: bool | Literal["one"] = True
    sampler: SamplerName | Sampler = "random"
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
    cls_loss: Literal["bce", "focal"] | losses.ObjectnessLoss = "bce"
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    coder: Literal["deltas"] | box_ops.BoxCoder = "deltas"
    reg_loss: losses.BoxLossName | losses.BoxLoss = "smooth_l1"
    reg_beta: float = 1 / 9
    reg_normalizer: losses.RPNNormalizer = "samples"
    reg_weight: float = 1.0

    def __post_init__(self) -> None:
        settle("rpn", self)
        if not 0 <= self.negative_iou <= self.positive_iou <= 1:
            raise InputError(
                f"rpn.negative_iou {self.negative_iou} and rpn.positive_iou {self.positive_iou}: "
                "need 0 <= negative_iou <= positive_iou <= 1"
            )
        allowed = {
            "(0, 1]": "positive_fraction",
            "[0, 1)": "score_threshold",
            "[0, 1]": "nms_iou focal_alpha",
            "[1, inf]": "conv_depth samples_per_image pre_nms_train post_nms_train pre_nms_test post_nms_test",
            "[1, 100]": "conv_depth",
            "[0, 65536]": "hidden_channels",
            "[0, inf]": "hidden_channels init_std min_side focal_gamma reg_beta reg_weight",
        }
        check_numbers("rpn", self, allowed)
        if self.cls_loss == "focal" and self.objectness == "softmax":
            raise InputError("rpn.cls_loss: focal is of one score per anchor; it needs rpn.objectness sigmoid")

    def objectness_loss(self) -> losses.ObjectnessLoss:
        """Return the part that `cls_loss` names."""
        focal = partial(losses.FocalLoss, self.focal_alpha, self.focal_gamma)
        return chosen(self.cls_loss, {"bce": losses.BinaryCrossEntropy, "focal": focal})


class RPNHead(nn.Module):
    """3x3 convolutions that all levels share, then 1x1 convolutions for objectness and deltas.

    The latter are shared by the levels that have equally many anchors per location: `objectness` and `deltas` are one
    convolution each, or where `anchors_per_location`, one number per level, differs, a dict of one for each number.
    """

    def __init__(self, in_channels: int, anchors_per_location: Sequence[int], config: RPNConfig) -> None:
        super().__init__()
        hidden = config.hidden_channels or in_channels
        self.softmax = config.objectness == "softmax"
        self.conv = nn.Conv2d(in_channels, hidden, kernel_size=3, padding=1)
        self.deeper = nn.ModuleList(
            nn.Conv2d(hidden, hidden, kernel_size=3, padding=1) for _ in range(config.conv_depth - 1)
        )
        self.anchors_per_location = tuple(anchors_per_location)
        self.objectness = self._outputs(hidden, 2 if self.softmax else 1)
        self.deltas = self._outputs(hidden, 4)
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=config.init_std) if name.endswith("weight") else nn.init.zeros_(parameter)
        if (first := config.objectness_loss().initial_probability) != 0.5:
            for name, parameter in self.objectness.named_parameters():
                if name.endswith("bias"):
                    nn.init.constant_(parameter, math.log(first / (1 - first)))

    def _outputs(self, hidden: int, per_anchor: int) -> nn.Module:
        layers = {
            str(number): nn.Conv2d(hidden, number * per_anchor, kernel_size=1)
            for number in sorted(set(self.anchors_per_location))
        }
        return next(iter(layers.values())) if len(layers) == 1 else nn.ModuleDict(layers)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits (B, h * w * A) and deltas (B, h * w * A, 4) of each level, float32, in the anchors' order.

        With softmax the two scores of an anchor are (background, object), and the logit is their difference.
        """
        hidden = list(features)
        for convolution in (self.conv, *self.deeper):
            hidden = [F.relu(convolution(level), inplace=True) for level in hidden]
        # bfloat16 tells few scores apart, which costs ranks, and it saves no time in layers as small as these.
        compute = self._by_level if one_by_one(hidden[0]) else self._at_once
        with torch.autocast(hidden[0].device.type, enabled=False):
            if not isinstance(self.objectness, nn.ModuleDict):
                scores, deltas = compute(hidden, self.objectness, self.deltas)
            else:
                scores, deltas = list(features), list(features)
                for number in self.objectness:
                    levels = [level for level, own in enumerate(self.anchors_per_location) if own == int(number)]
                    layers = (of.get_submodule(number) for of in (self.objectness, self.deltas))
                    found = compute([hidden[level] for level in levels], *layers)
                    for level, own_scores, own_deltas in zip(levels, *found, strict=True):
                        scores[level], deltas[level] = own_scores, own_deltas
        if self.softmax:
            scores = [level[..., 1] - level[..., 0] for level in (own.unflatten(1, (-1, 2)) for own in scores)]
        return scores, deltas

    @staticmethod
    def _by_level(
        hidden: Sequence[Tensor], objectness: nn.Module, deltas: nn.Module
    ) -> tuple[list[Tensor], list[Tensor]]:
        levels = [level.float() for level in hidden]
        scores = [objectness(level).permute(0, 2, 3, 1).flatten(1) for level in levels]
        return scores, [deltas(level).permute(0, 2, 3, 1).reshape(level.shape[0], -1, 4) for level in levels]

    @staticmethod
    def _at_once(hidden: Sequence[Tensor], *layers: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Return the same in two matrix products: a GPU computes them faster than it is told to compute ten."""
        cells = together([level.permute(0, 2, 3, 1).flatten(1, 2) for level in hidden], 1).float()  # (B, cells, C)
        counts = [level.shape[2] * level.shape[3] for level in hidden]
        scores, deltas = (
            F.linear(cells, layer.get_parameter("weight").flatten(1), layer.get_parameter("bias")).split(counts, 1)
            for layer in layers
        )
        return [level.flatten(1) for level in scores], [level.reshape(len(cells), -1, 4) for level in deltas]


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
        build = RPNHead if config.head == "conv" else config.head.build
        self.head = build(in_channels, self.anchor_generator.anchors_per_location, config)
        rules = config.positive_iou, config.negative_iou, config.best_per_object
        self.matcher = anchor_matcher(config.matcher, *rules)
        self.sampler = chosen(config.sampler, SAMPLERS)
        self.coder = box_ops.box_coder(config.coder)
        self.objectness_loss = config.objectness_loss()
        self.box_loss = losses.box_loss(config.reg_loss, config.reg_beta)

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
        top = [logits.topk(min(before, logits.shape[1]), dim=1) for logits in output.logits]  # (B, k) of each level
        scores, places = together([level.values for level in top], 1), [level.indices for level in top]
        deltas = [own.gather(1, at[..., None].expand(-1, -1, 4)) for own, at in zip(output.deltas, places, strict=True)]
        anchors = [own[at] for own, at in zip(output.anchors, places, strict=True)]
        boxes = self.coder.decode(together(deltas, 1), together(anchors, 1))  # (B, K, 4)
        sizes, one_each = [(w, h, w, h) for h, w in batch.sizes], [1] * len(batch.sizes)
        boxes = box_ops.clip(boxes, rows_of_images(sizes, one_each, boxes)[:, None])
        # A side of 0 is never a proposal: its IoU and its RoI are undefined.
        sides = [(max(self._min_side(batch, image), 1e-3),) for image in range(len(sizes))]
        usable = box_ops.has_sides_of(boxes, rows_of_images(sides, one_each, boxes)[:, None])
        if config.score_threshold > 0:
            usable &= scores.sigmoid() >= config.score_threshold
        numbers = [at.shape[1] for at in places]
        extent = max(map(max, batch.sizes))
        kept, of_usable = nms_of_levels(boxes, scores, numbers, usable, config.nms_iou, extent, after)
        for record in asking():
            self._record(record, output, batch)
            starts = accumulate((len(level) for level in output.anchors), initial=0)
            of_anchors = torch.cat([index + start for index, start in zip(places, starts, strict=False)], 1)
            # The usable ones come first; a GPU is not waited for to learn how many these are.
            ranked = (~usable).int().argsort(dim=1, stable=True)
            candidates = [own[:number] for own, number in zip(ranked, of_usable, strict=True)]
            record.proposals = [
                Proposals(own[of], score.detach()[of], at[of], torch.searchsorted(of, keep))
                for own, score, at, of, keep in zip(boxes, scores, of_anchors, candidates, kept, strict=True)
            ]
        rows = joined(kept, [image * boxes.shape[1] for image in range(len(kept))])
        return list(boxes.flatten(0, 1)[rows].split([len(own) for own in kept]))

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
        anchors = together(output.anchors)
        matches = self._match(output, anchors, truths, batch.sizes, difficult)
        drawn = self.sampler.of_images(matches, config.samples_per_image, config.positive_fraction)
        found = [image.index[positives] for image, (positives, _) in zip(matches, drawn, strict=True)]
        objects = together([truth.boxes[own] for truth, own in zip(truths, found, strict=True)])
        deltas = self.coder.encode(objects, anchors[together([positives for positives, _ in drawn])])
        each = zip(drawn, deltas.split([len(own) for own in found]), strict=True)
        sampled = [SampledAnchors(*indices, own) for indices, own in each]
        for record in asking():
            self._record(record, output, batch)
            record.truths, record.anchor_matches, record.sampled_anchors = truths, matches, sampled
        return sampled

    @part(LOSSES)
    def losses_of(self, output: RPNOutput, sampled: Sequence[SampledAnchors], batch: ImageBatch) -> dict[str, Tensor]:
        """Return `losses` over given anchors of each image."""
        config = self.config
        logits, deltas = together(output.logits, 1), together(output.deltas, 1)
        starts = [image * logits.shape[1] for image in range(len(sampled))]
        indices = [index for s in sampled for index in (s.positives, s.negatives)]
        samples = logits.flatten().index_select(0, joined(indices, [start for start in starts for _ in range(2)]))
        positives = joined([s.positives for s in sampled], starts)
        is_object = repeated([1, 0] * len(sampled), [len(index) for index in indices], samples)
        of_boxes = self.box_loss(
            deltas.flatten(0, 1).index_select(0, positives),
            together([s.deltas for s in sampled]),
            lambda own: self.coder.decode(own, together(output.anchors)[together([s.positives for s in sampled])]),
        )
        counts = config.samples_per_image * len(sampled), sum(map(self._locations, batch.sizes))
        return {
            "loss_rpn_cls": self.objectness_loss(samples, is_object),
            "loss_rpn_reg": losses.normalized(of_boxes, len(samples), config.reg_normalizer, *counts),
        }

    def _match(
        self,
        output: RPNOutput,
        anchors: Tensor,
        truths: Sequence[GroundTruth],
        sizes: Sequence[tuple[int, int]],
        difficult: str,
    ) -> list[Matches]:
        candidates, outside = [anchors] * len(sizes), list[Tensor]()
        if self.anchor_generator.config.straddling == "drop":
            straddling = {size: ~box_ops.is_inside(anchors, size) for size in dict.fromkeys(sizes)}
            # Before matching: an object's best anchor is its best among those that are used.
            far = constant((FAR, FAR, FAR + 1, FAR + 1), anchors)
            used = {size: torch.where(mask[:, None], far, anchors) for size, mask in straddling.items()}
            candidates, outside = [used[size] for size in sizes], [straddling[size] for size in sizes]
        around = [Around([len(level) for level in output.anchors], self.anchor_generator.strides)] * len(sizes)
        if self.matcher.needs_predictions:
            predicted = self.coder.decode(together(output.deltas, 1), anchors)
            each = zip(around, together(output.logits, 1), predicted, strict=True)
            around = [own._replace(logits=logits.detach(), boxes=boxes.detach()) for own, logits, boxes in each]
        matches = self.matcher.of_images(candidates, truths, difficult, around)
        if not outside:
            return matches
        pairs = zip(matches, outside, strict=True)
        return [replace(own, kind=own.kind.masked_fill(mask, IGNORED)) for own, mask in pairs]
