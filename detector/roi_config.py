"""Options of the RoI heads (`roi_heads.py`)."""

from dataclasses import dataclass, field
from typing import Literal

from detector import losses
from detector.checks import check_choices, check_four, check_range
from detector.errors import InputError
from detector.post_processing import NMS


@dataclass
class RoIConfig:
    """Sampling of RoIs, pooling, the box head's losses, and post-processing.

    Args:
        samples_per_image: RoIs that an image contributes to the losses. py-faster-rcnn: 128; torchvision, detectron2:
            512.
        positive_fraction: Upper limit of the share of positives among them (0.25 in Fast R-CNN and most code).
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
        delta_mean: Subtracted from the targets' deltas (dx, dy, dw, dh) before they are divided by `delta_std`. 0 in
            py-faster-rcnn and chenyuntc's port.
        delta_std: The targets' standard deviations, by which deltas are divided. [0.1, 0.1, 0.2, 0.2] in
            py-faster-rcnn, torchvision (as weights 10, 10, 5, 5) and detectron2; [1, 1, 1, 1]: targets are not
            normalised.
        class_agnostic: One box for all classes (R-FCN) instead of one per class.
        class_weights: Weights of the classes in the classification loss, whose mean is then weighted: `none`;
            `balanced`: background counts as much as all objects of the batch (longcw's port); or a list of one number
            for background and one per class.
        ohem: Train on the `samples_per_image` RoIs with the highest loss, instead of random ones at a fixed share of
            positives (online hard example mining, Shrivastava 2016, with `background_iou` from 0). All RoIs pass the
            head once more for it, without gradients and dropout; `class_weights` do not count there.
        ohem_nms_iou: Of RoIs that overlap by more than this only the hardest is trained on (Shrivastava 2016: 0.7).
        score_init_std: Standard deviation of the initial weights of the class scores (py-faster-rcnn: 0.01).
        delta_init_std: The same of the boxes' layer (py-faster-rcnn: 0.001).
        reg_beta: Smooth L1's turning point on normalised deltas; the paper, py-faster-rcnn: 1, torchvision: 1/9,
            detectron2: 0 (plain L1).
        reg_normalizer: Box loss divided by the number of `samples` (py-faster-rcnn, torchvision, detectron2), of
            `positives`, or by `samples_per_image` times the images, whether so many were found or not (mx-rcnn).
        reg_weight: Weight of the box loss in the total.
        score_threshold: Detections at or below this score are dropped (torchvision, detectron2: 0.05).
        nms: `hard`, or soft NMS (Bodla 2017), which lowers the scores of overlapping detections instead of dropping
            them: `soft_linear` by 1 - IoU above `nms_iou`, `soft_gaussian` by exp(-IoU^2 / `soft_nms_sigma`). A low
            `score_threshold` belongs to it, such as 0.001.
        nms_iou: A detection is dropped if it overlaps a better one of its class by more than this. py-faster-rcnn: 0.3;
            torchvision, detectron2: 0.5.
        soft_nms_sigma: See `nms` (Bodla 2017: 0.5).
        detections_per_image: Upper limit of detections of an image.
    """

    samples_per_image: int = 128
    positive_fraction: float = 0.25
    positive_iou: float = 0.5
    background_iou: list[float] = field(default_factory=lambda: [0.0, 0.5])
    append_gt: bool | Literal["jittered"] = True
    gt_jitter: float = 0.05
    pooling: Literal["roi_align", "roi_align_legacy", "roi_pool", "roi_pool_floor"] = "roi_align"
    sampling_ratio: int = 2
    delta_mean: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    delta_std: list[float] = field(default_factory=lambda: [0.1, 0.1, 0.2, 0.2])
    class_agnostic: bool = False
    class_weights: list[float] | Literal["none", "balanced"] = "none"
    ohem: bool = False
    ohem_nms_iou: float = 0.7
    score_init_std: float = 0.01
    delta_init_std: float = 0.001
    reg_beta: float = 1.0
    reg_normalizer: losses.Normalizer = "samples"
    reg_weight: float = 1.0
    score_threshold: float = 0.05
    nms: NMS = "hard"
    nms_iou: float = 0.3
    soft_nms_sigma: float = 0.5
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
        if self.samples_per_image < 1 or not 0 < self.positive_fraction <= 1:
            raise InputError(
                f"roi.samples_per_image {self.samples_per_image} must be at least 1 and "
                f"roi.positive_fraction {self.positive_fraction} in (0, 1]"
            )
        check_choices("roi", self)
        check_four("roi.delta_mean", self.delta_mean)
        check_four("roi.delta_std", self.delta_std)
        for key, values in (("delta_std", self.delta_std), ("soft_nms_sigma", [self.soft_nms_sigma])):
            if min(values) <= 0:
                raise InputError(f"roi.{key}: {getattr(self, key)} must be positive")
        if self.append_gt not in (True, False, "jittered"):
            raise InputError(f"roi.append_gt: {self.append_gt!r} is none of true, false, jittered")
        for key in ("positive_iou", "nms_iou", "ohem_nms_iou", "score_threshold"):
            check_range(f"roi.{key}", getattr(self, key), 0, 1)
        check_range("roi.detections_per_image", self.detections_per_image, 1)
        for key in ("sampling_ratio", "gt_jitter", "score_init_std", "delta_init_std", "reg_beta", "reg_weight"):
            check_range(f"roi.{key}", getattr(self, key), 0)
        self._check_class_weights()

    def _check_class_weights(self) -> None:
        weights = self.class_weights
        if isinstance(weights, str):
            if weights not in ("none", "balanced"):
                raise InputError(f"roi.class_weights: {weights!r} is neither none nor balanced nor a list of numbers")
        elif not weights or min(weights) < 0 or max(weights) == 0:
            raise InputError(f"roi.class_weights: {weights} must not be negative, nor 0 altogether")
