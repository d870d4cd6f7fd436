"""Faster R-CNN: images -> features -> proposals -> detections (Ren et al., NIPS 2015; arXiv 1506.01497)."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from detector.anchors import AnchorConfig
from detector.backbones import build_backbone
from detector.backbones.base import BackboneConfig
from detector.cascade import CascadeRoIHeads
from detector.image_batch import (
    ImageBatch,
    ImageConfig,
    all_to_original,
    drawn_scales,
    ground_truth,
    make_batch,
    to_batch,
)
from detector.kernels.precision import install_kernels
from detector.roi_heads import RoIConfig, RoIHeads
from detector.rpn import RegionProposalNetwork, RPNConfig, RPNOutput
from detector.sampling import GroundTruth
from detector.use.test_time_augmentation import detect_in_views

Difficult = Literal["drop", "keep", "ignore"]
LOSS_NAMES = ("loss_rpn_cls", "loss_rpn_reg", "loss_roi_cls", "loss_roi_reg")


class FasterRCNN(nn.Module):
    """The whole detector.

    Args:
        num_classes: C, without background.
        backbone, anchors, rpn, roi, image: The parts' options.
        difficult: What objects marked difficult are in training: `drop` (as if not there: background), `keep`, or
            `ignore` (neither positive nor negative).
        load_weights: Whether the backbone's weights are loaded; False where a checkpoint follows.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: BackboneConfig,
        anchors: AnchorConfig,
        rpn: RPNConfig,
        roi: RoIConfig,
        image: ImageConfig,
        difficult: Difficult = "drop",
        load_weights: bool = True,
    ) -> None:
        super().__init__()
        self.image_config = image
        self.difficult = difficult
        self.backbone, box_head = build_backbone(backbone, load_weights)
        self.rpn = RegionProposalNetwork(self.backbone.out_channels, self.backbone.strides, anchors, rpn)
        heads = CascadeRoIHeads if roi.cascade_ious else RoIHeads
        self.roi_heads = heads(box_head, self.backbone.roi_strides, num_classes, roi)
        install_kernels(self.backbone, self.rpn.head, *(stage.box_head for stage in self.roi_heads.stages))

    def forward(
        self, images: Sequence[Tensor], given: Sequence[Tensor] | None = None
    ) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Return the detections and the proposals of each image, both in original pixels.

        Args:
            images: Each (3, H, W) RGB in 0..255, uint8 or float, of any size.
            given: Proposals (P, 4) of each image, in original pixels, to be used instead of the RPN's.

        Returns:
            Per image a dict of `boxes` (D, 4), `labels` (D,) in 1..C and `scores` (D,), by descending score; and per
            image its proposals (P, 4), by descending objectness.
        """
        if not self.training and (self.image_config.test_flip or self.image_config.test_shortest_sides):
            return detect_in_views(self, images, given)
        features, batch = self.features(images)
        proposals = self.proposals(features, batch) if given is None else to_batch(given, batch)
        detections = self.detect(features, proposals, batch)
        return detections, all_to_original(proposals, batch)

    # The parts of a pass. Published ports call them extractor (`features`), rpn (`proposals`) and head
    # (`roi_heads`, or `detect` with post-processing).

    def features(self, images: Sequence[Tensor], image: ImageConfig | None = None) -> tuple[list[Tensor], ImageBatch]:
        """Return the feature maps of all levels, each (B, channels, h, w), and the batch that they were computed from.

        `image` holds sizes and normalisation other than the detector's own.
        """
        batch = make_batch(images, image or self.image_config, self.training)
        return self.backbone(batch.tensors), batch

    def proposals(self, features: Sequence[Tensor], batch: ImageBatch) -> list[Tensor]:
        """Return the proposals (P, 4) of each image from its features, in the batch's pixels, the best first."""
        return self.rpn.proposals(self.rpn(features), batch)

    def detect(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], batch: ImageBatch
    ) -> list[dict[str, Tensor]]:
        """Return detections, in original pixels, from features and given proposals (P, 4) in the batch's pixels."""
        return self.roi_heads.detections(*self.roi_heads.predictions(features, proposals, batch), batch)

    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the four losses of LOSS_NAMES, unweighted scalars, and their weighted sum `loss`.

        Those of a cascade's RoI heads are sums over its stages, whose own ones follow: `loss_roi_cls_1` and so on.

        Args:
            images: As in `forward`.
            targets: Per image `boxes` (G, 4) in original pixels, `labels` (G,) in 1..C, `difficult` (G,); G may be 0.
                Where it holds `scale`, the shortest side of that image is multiplied by it.
        """
        batch = make_batch(images, self.image_config, self.training, drawn_scales(targets))
        features = self.backbone(batch.tensors)
        return self.losses_of(features, self.rpn(features), batch, ground_truth(targets, batch))

    def losses_of(
        self, features: Sequence[Tensor], output: RPNOutput, batch: ImageBatch, truths: Sequence[GroundTruth]
    ) -> dict[str, Tensor]:
        """Return the losses of a batch, given its feature maps and the RPN's output; see `losses`."""
        proposals = self.rpn.proposals(output, batch)
        of_rois = self.roi_heads.training_losses(features, proposals, batch, truths, self.difficult)
        return self.with_total(self.rpn.losses(output, batch, truths, self.difficult) | of_rois)

    def with_total(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return some or all of the four losses, and their weighted sum `loss`."""
        rois = self.roi_heads.config
        weights = {"loss_rpn_reg": self.rpn.config.reg_weight}
        weights |= {"loss_roi_cls": rois.cls_weight, "loss_roi_reg": rois.reg_weight}
        names = [name for name in LOSS_NAMES if name in losses]
        first, *others = (losses[name] if weights.get(name, 1) == 1 else weights[name] * losses[name] for name in names)
        return losses | {"loss": sum(others, start=first)}
