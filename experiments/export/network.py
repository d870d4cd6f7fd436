"""A detector as one network of tensor functions that can leave PyTorch: images and their sizes in, detections out.

Nothing in Python depends on the values of tensors, and each image has fixed numbers of proposals and detections, the
last of which may be empty. B images, H x W their common padded size, P proposals of an image, C classes without
background, R proposals of all images that are there, D detections of an image.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torchvision.ops import nms, roi_align, roi_pool

from detector import boxes as box_ops
from detector.backbones.deformable import DeformableConv2d
from detector.cascade import mean_logits
from detector.errors import InputError, value_text
from detector.faster_rcnn import FasterRCNN
from detector.kernels.onednn import Conv2d
from detector.kernels.transfers import together
from detector.parts import name_of

Suppression = Callable[[Tensor, Tensor, float, float], Tensor]
"""Boxes (G, n, 4), scores (G, n), a score that is too low and an IoU -> mask (G, n) of what NMS in each group keeps."""
INPUTS = ("images", "sizes", "original_sizes")
OUTPUTS = ("boxes", "scores", "labels", "counts")


class ExportableDetector(nn.Module):
    """A detector in evaluation as such a network, with copies of its weights.

    Args:
        model: The detector.
        suppression: The NMS of the format.

    Raises:
        InputError: One of its options cannot be exported.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: FasterRCNN, suppression: Suppression) -> None:
        check_exportable(model)
        super().__init__()
        self.backbone, self.rpn_head = deepcopy(model.backbone), deepcopy(model.rpn.head)
        self.roi_heads = deepcopy(model.roi_heads)
        _fold_norms(self)
        self.anchors, self.rpn, self.roi = model.rpn.anchor_generator, model.rpn.config, model.roi_heads.config
        self.image, self.strides, self.suppression = model.image_config, self.roi_heads.strides, suppression
        self.rpn_coder = model.rpn.coder
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(self.image, name))[:, None, None])
        self.float().requires_grad_(False).eval()

    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return detections in pixels of the original images, those of an image by descending score.

        Args:
            images: (B, 3, H, W) float32 in 0..255, RGB, resized, at the upper left of what is padded.
            sizes: (B, 2) float32, (height, width) of each image within the batch; what lies beyond is padding.
            original_sizes: (B, 2) float32, the same before the image was resized.

        Returns:
            Boxes (B, D, 4), scores (B, D), labels (B, D) in 1..C, and how many of each image are detections (B,).
        """
        height, width = images.shape[-2:]
        inside = (torch.arange(height, device=images.device) < sizes[:, :1])[:, None, :, None]
        inside = inside & (torch.arange(width, device=images.device) < sizes[:, 1:])[:, None, None]
        pixels = images.flip(1) if self.image.channel_order == "bgr" else images
        pixels = (pixels * (self.image.pixel_max / 255) - self.mean) / self.std
        features = self.backbone(torch.where(inside, pixels, 0.0))
        corners = sizes.flip(1).repeat(1, 2)[:, None]  # (B, 1, 4)
        proposals, found = self._proposals(features, corners, sizes.amax(1) / original_sizes.amax(1))
        boxes, scores, labels, counts = self._detections(features, proposals, found, corners)
        originals = original_sizes.flip(1).repeat(1, 2)[:, None]
        return torch.minimum(boxes * (originals / corners), originals), scores, labels, counts

    def _proposals(self, features: list[Tensor], corners: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes (B, P, 4) by descending objectness, and a mask (B, P) of those that are proposals."""
        rpn, all_scores, all_boxes = self.rpn, [], []
        logits, deltas = self.rpn_head(features)
        sizes = [(level.shape[-2], level.shape[-1]) for level in features]
        least = torch.clamp(rpn.min_side * (scales if rpn.min_side_scales else torch.ones_like(scales)), min=1e-3)
        spacings = self.anchors.spacings(sizes)
        for level, (own, size) in enumerate(zip(logits, sizes, strict=True)):
            anchors = self.anchors.level(self.anchors.cells[level], spacings[level], size)
            scores, at = own.topk(torch.sym_min(rpn.pre_nms_test, own.shape[1]), dim=1)
            chosen = deltas[level].gather(1, at[..., None].expand(-1, -1, 4))
            boxes = box_ops.clip(self.rpn_coder.decode(chosen, anchors[at]), corners)
            usable = box_ops.has_sides_of(boxes, least[:, None, None])
            if rpn.score_threshold > 0:
                usable = usable & (scores.sigmoid() >= rpn.score_threshold)
            order = torch.arange(at.shape[1], 0, -1, device=scores.device, dtype=scores.dtype).expand_as(scores)
            kept = self.suppression(boxes, torch.where(usable, order, 0.0), 0.5, rpn.nms_iou)
            all_scores.append(torch.where(kept, scores, -torch.inf))
            all_boxes.append(boxes)
        # So many of no use follow that there always are enough.
        missing = all_scores[0].new_full((logits[0].shape[0], rpn.post_nms_test), -torch.inf)
        none = all_boxes[0].new_zeros((logits[0].shape[0], rpn.post_nms_test, 4))
        scores, at = torch.cat([*all_scores, missing], 1).topk(rpn.post_nms_test, dim=1)
        boxes = torch.cat([*all_boxes, none], 1).gather(1, at[..., None].expand(-1, -1, 4))
        return boxes, scores > -torch.inf

    def _detections(
        self, features: list[Tensor], proposals: Tensor, found: Tensor, corners: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `forward` does, in pixels of the batch."""
        roi, number = self.roi, proposals.shape[1]
        # What is no proposal is not pooled, but for one of each image, so that there always is something to pool.
        first = torch.arange(number, device=found.device) == 0
        (index,) = torch.where((found | first).flatten())
        torch._check(index.shape[0] > 0)
        rois, image, of_stages = proposals.flatten(0, 1)[index], index // number, []
        for stage in self.roi_heads.stages:
            logits, deltas = stage.predictor(stage.box_head(self._pooled(features, rois, image)))
            of_stages.append(logits)
            boxes = stage.coder.decode(deltas.unflatten(1, (-1, 4)), rois[:, None])  # (R, C or 1, 4)
            boxes = box_ops.clip(boxes, corners[image])
            rois = boxes[:, 0]
        rows = mean_logits(of_stages).softmax(dim=-1)[:, 1:], boxes.flatten(1)
        scores, boxes = (of.new_zeros(found.numel(), of.shape[1]).index_copy(0, index, of) for of in rows)
        scores = scores.unflatten(0, (-1, number)).transpose(1, 2)  # (B, C, P)
        boxes = boxes.unflatten(1, (-1, 4)).unflatten(0, (-1, number)).transpose(1, 2)  # (B, C or 1, P, 4)
        scores = torch.where(box_ops.has_sides_of(boxes, 1e-2) & found[:, None], scores, 0.0)
        classes = self.roi_heads.num_classes
        boxes = boxes.expand(-1, classes, -1, -1)
        kept = self.suppression(boxes.flatten(0, 1), scores.flatten(0, 1), roi.score_threshold, roi.nms_iou)
        scores = torch.where(kept.unflatten(0, (-1, classes)), scores, 0.0).flatten(1)
        scores, at = scores.topk(min(roi.detections_per_image, classes * number), dim=1)
        boxes = boxes.flatten(1, 2).gather(1, at[..., None].expand(-1, -1, 4))
        return boxes, scores, at // number + 1, (scores > roi.score_threshold).sum(1)

    def _pooled(self, features: list[Tensor], boxes: Tensor, image: Tensor) -> Tensor:
        """Return pooled features of boxes (R, 4) of images (R,), each from its level."""
        of_roi = self.roi_heads.assign_levels(boxes) if len(self.strides) > 1 else None
        every = [box_ops.scaled(boxes, scale) for scale in self.roi_heads.box_head.scales]
        return together([self._pool(features, own, image, of_roi) for own in every], dim=1)

    def _pool(self, features: list[Tensor], boxes: Tensor, image: Tensor, of_roi: Tensor | None) -> Tensor:
        rois = torch.cat((image[:, None].to(boxes.dtype), boxes), 1)
        if of_roi is None:
            return self._pool_level(features[0], rois, self.strides[0])
        size, channels = self.roi_heads.box_head.pool_size, features[0].shape[1]
        pooled = boxes.new_zeros(boxes.shape[0], channels, size, size)
        for level, stride in enumerate(self.strides):
            (index,) = torch.where(of_roi == level)
            pooled = pooled.index_copy(0, index, self._pool_level(features[level], rois[index], stride))
        return pooled

    def _pool_level(self, features: Tensor, rois: Tensor, stride: int) -> Tensor:
        size, roi = self.roi_heads.box_head.pool_size, self.roi
        if roi.pooling == "roi_pool":
            pooled: Tensor = roi_pool(features, rois, size, 1 / stride)
        else:
            aligned = roi.pooling == "roi_align"
            pooled = roi_align(features, rois, size, 1 / stride, roi.sampling_ratio, aligned=aligned)
        return pooled


def check_exportable(model: FasterRCNN) -> None:
    """Raise InputError for options that cannot be exported."""
    image, roi = model.image_config, model.roi_heads.config
    deformable = any(isinstance(module, DeformableConv2d) for module in model.modules())
    for key, value, impossible, instead in (
        ("roi.nms", name_of(roi.nms), roi.nms != "hard", "hard can: --hard_nms"),
        ("roi.pooling", roi.pooling, roi.pooling == "roi_pool_floor", "roi_align, roi_align_legacy and roi_pool can"),
        ("backbone.deformable", "v1 or v2", deformable, "none can"),
        ("image.test_flip", image.test_flip, image.test_flip, "false can"),
        ("image.test_shortest_sides", image.test_shortest_sides, bool(image.test_shortest_sides), "[] can"),
    ):
        if impossible:
            raise InputError(f"{key} {value_text(value)}: cannot be exported; {instead}")


def say_own_parts(options: Mapping[str, Any]) -> None:
    """Say which parts of one's own, of the options of a checkpoint, are in the exported network."""
    for name in ("backbone.name", "backbone.box_head", "anchors.generator", "rpn.head", "rpn.coder", "roi.coder"):
        section, _, key = name.partition(".")
        if isinstance(value := options[section].get(key), Mapping):
            rank_zero_info(
                f"warning: {name} {value['class_path']}: whether a part of one's own can be exported shows only when "
                "it is; what is written is compared with the detector"
            )


def _fold_norms(network: nn.Module) -> None:
    """Write the frozen batch norms of convolutions into their weights."""
    for conv in network.modules():
        if isinstance(conv, Conv2d):
            weight, bias = conv.folded()
            conv.weight = nn.Parameter(weight.detach())
            conv.bias = None if bias is None else nn.Parameter(bias.detach())
            conv.norm = ()


def suppress_by_torchvision(boxes: Tensor, scores: Tensor, threshold: float, iou: float) -> Tensor:
    """Return what torchvision's operator keeps: the groups lie apart, in float64, where no digit is lost."""
    groups, number = scores.shape
    apart = torch.arange(groups, device=boxes.device)[:, None, None] * (boxes.max().double() + 1)
    usable = scores > threshold
    # What cannot be kept is a point, overlaps nothing, and comes last; two more, since export assumes two kept boxes.
    flat = torch.where(usable[..., None], boxes.double() + apart, -1.0).flatten(0, 1)
    flat, order = F.pad(flat, (0, 0, 0, 2)), F.pad(torch.where(usable, scores, -1.0).flatten(), (0, 2), value=-1.0)
    kept = nms(flat, order.double(), iou)
    mask = torch.zeros(groups * number + 2, dtype=torch.bool, device=boxes.device).index_fill(0, kept, True)
    kept_of_groups: Tensor = mask[:-2].unflatten(0, (-1, number))
    return kept_of_groups & usable
