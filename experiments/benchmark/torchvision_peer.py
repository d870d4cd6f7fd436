"""torchvision's own Faster R-CNN with the network, the options and the weights of one of ours.

Only what torchvision's constructors offer is taken over: anchors, numbers of proposals and samples, thresholds, image
sizes. Its conventions are those of `recipes/torchvision_resnet50_fpn.yaml`; a detector of ours with others is compared
with the nearest that torchvision has.
"""

from collections import OrderedDict

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detector.backbones.base import BackboneConfig
from detector.errors import InputError
from detector.faster_rcnn import FasterRCNN
from detector.parts import name_of, own_parts
from detector.translation.foreign_checkpoints import torchvision_name
from experiments.benchmark.models import Batch

NAME = "torchvision"
LEVELS = {
    "resnet": ("layer1", "layer2", "layer3", "layer4"),
    "mobilenet_v2": ("3", "6", "13", "18"),
    "mobilenet_v3_large": ("13", "16"),
}
"""The layers of torchvision's classification networks at whose ends the levels of a pyramid are taken."""


def build_peer(ours: FasterRCNN, backbone: BackboneConfig) -> nn.Module:
    """Return torchvision's detector like `ours`, which was built from `backbone`, with its weights and frozen layers.

    Raises:
        InputError: torchvision has no such backbone or cannot be given these options.
    """
    trunk, box_head = _network(ours, backbone)
    levels, pool_size = len(ours.backbone.strides), ours.roi_heads.box_head.pool_size
    rpn, roi, image = ours.rpn.config, ours.roi_heads.config, ours.image_config
    anchors = ours.rpn.anchor_generator.config
    for key, value, impossible in (
        ("anchors.sizes", anchors.sizes, anchors.sizes is not None),
        ("rpn.objectness", rpn.objectness, rpn.objectness == "softmax"),
        ("rpn.cls_loss", rpn.cls_loss, rpn.cls_loss != "bce"),
        ("rpn.reg_loss", rpn.reg_loss, rpn.reg_loss != "smooth_l1"),
        ("roi.reg_loss", roi.reg_loss, roi.reg_loss != "smooth_l1"),
        ("roi.class_agnostic", roi.class_agnostic, roi.class_agnostic),
        ("roi.pooling", roi.pooling, roi.pooling.startswith("roi_pool")),
    ):
        if impossible:
            raise InputError(f"--peer torchvision: its detector has no --model.{key} {value}; give --peer none")
    sizes = [tuple(anchors.base_size * scale for scale in anchors.of_level("scales", level)) for level in range(levels)]
    ratios = tuple(tuple(anchors.of_level("aspect_ratios", level)) for level in range(levels))
    names = [str(level) for level in range(len(ours.backbone.roi_strides))]
    peer: nn.Module = detection.FasterRCNN(
        trunk,
        min_size=tuple(image.shortest_side),
        max_size=image.longest_side,
        image_mean=image.mean,
        image_std=image.std,
        rpn_anchor_generator=AnchorGenerator(tuple(sizes), ratios),
        rpn_pre_nms_top_n_train=rpn.pre_nms_train,
        rpn_pre_nms_top_n_test=rpn.pre_nms_test,
        rpn_post_nms_top_n_train=rpn.post_nms_train,
        rpn_post_nms_top_n_test=rpn.post_nms_test,
        rpn_nms_thresh=rpn.nms_iou,
        rpn_fg_iou_thresh=rpn.positive_iou,
        rpn_bg_iou_thresh=rpn.negative_iou,
        rpn_batch_size_per_image=rpn.samples_per_image,
        rpn_positive_fraction=rpn.positive_fraction,
        rpn_score_thresh=rpn.score_threshold,
        box_roi_pool=MultiScaleRoIAlign(names, pool_size, roi.sampling_ratio),
        box_head=box_head,
        box_predictor=FastRCNNPredictor(ours.roi_heads.box_head.out_channels, ours.roi_heads.num_classes + 1),
        box_score_thresh=roi.score_threshold,
        box_nms_thresh=roi.nms_iou,
        box_detections_per_img=roi.detections_per_image,
        box_fg_iou_thresh=roi.positive_iou,
        box_bg_iou_thresh=roi.positive_iou,
        box_batch_size_per_image=roi.samples_per_image,
        box_positive_fraction=roi.positive_fraction,
        bbox_reg_weights=tuple(1 / std for std in roi.delta_std),
    )
    _copy_weights(ours, peer)
    return peer


def _network(ours: FasterRCNN, config: BackboneConfig) -> tuple[nn.Module, nn.Module]:
    """Return torchvision's trunk and box head."""
    needed = {"box_head": "two_fc", "fpn_norm": "none", "deformable": "none"}
    if any(getattr(config, key) != value for key, value in needed.items()) or config.norm in ("group", "sync"):
        only = ", ".join(f"{key} {value}" for key, value in needed.items())
        raise InputError(f"--peer torchvision: is built with --model.backbone.{only}, and norm frozen or batch only")
    parts = own_parts(anchors=ours.rpn.anchor_generator.config, rpn=ours.rpn.config, roi=ours.roi_heads.config)
    for option, path in parts.items():
        raise InputError(f"--peer torchvision: has no {path}; give --model.{option} by a short name")
    if len(ours.roi_heads.stages) > 1:
        raise InputError("--peer torchvision: has no cascade; give --model.roi.cascade_ious []")
    trunk: nn.Module
    name, norm = name_of(config.name), FrozenBatchNorm2d if config.norm == "frozen" else nn.BatchNorm2d
    if name == "vgg16":
        vgg = torchvision.models.vgg16(weights=None, dropout=config.dropout)
        trunk = nn.Sequential(*list(vgg.features)[:-1])
        trunk.out_channels = 512  # type: ignore[assignment]
        return trunk, nn.Sequential(nn.Flatten(), *list(vgg.classifier)[:-1])
    if name.startswith("resnet") and name.endswith("_c4") and config.box_head_stride == 2:
        resnet = torchvision.models.get_model(name.removesuffix("_c4"), weights=None, norm_layer=norm)
        layers = list(resnet.named_children())
        trunk = nn.Sequential(OrderedDict(layers[: [layer for layer, _ in layers].index("layer4")]))
        trunk.out_channels = ours.backbone.out_channels  # type: ignore[assignment]
        return trunk, nn.Sequential(resnet.layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if name == "mobilenet_v2_c4" and config.box_head_stride == 2:
        features = torchvision.models.mobilenet_v2(weights=None, norm_layer=norm).features
        trunk = features[:14]
        trunk.out_channels = 96  # type: ignore[assignment]
        return trunk, nn.Sequential(features[14:], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    levels = next((LEVELS[kind] for kind in LEVELS if name.startswith(kind) and name.endswith("_fpn")), None)
    if levels is None:
        raise InputError(
            f"--peer torchvision: is not built for --model.backbone.name {name}; it is for vgg16, resnet*_c4, "
            "resnet*_fpn, mobilenet_v2_c4, mobilenet_v2_fpn and mobilenet_v3_large_fpn"
        )
    body = torchvision.models.get_model(name.removesuffix("_fpn"), weights=None, norm_layer=norm)
    numbers = {level: str(number) for number, level in enumerate(levels)}
    channels, width = list(ours.backbone.body.channels), ours.backbone.out_channels
    trunk = BackboneWithFPN(getattr(body, "features", body), numbers, channels, width, LastLevelMaxPool())
    return trunk, TwoMLPHead(width * ours.roi_heads.box_head.pool_size**2, ours.roi_heads.box_head.out_channels)


def peer_batch(batch: Batch) -> Batch:
    """Return the batch as torchvision's detectors take it, with images in 0..1."""
    return [image.float() / 255 for image in batch[0]], batch[1]


def _copy_weights(ours: FasterRCNN, peer: nn.Module) -> None:
    """Copy all of ours, and zeros for the boxes of the background, which only torchvision predicts."""
    state = ours.state_dict()
    shapes = len(ours.rpn.anchor_generator.config.of_level("aspect_ratios", 0))
    if ours.rpn.anchor_generator.config.order == "scale_major" and shapes > 1:
        raise InputError("--peer torchvision: its anchors are ordered as --model.anchors.order ratio_major has them")
    with torch.no_grad():
        for name, theirs in peer.state_dict().items():
            value = state[_our_name(name, state)]
            if name.startswith("roi_heads.box_predictor.bbox_pred."):
                theirs[:4], theirs[4:] = 0, value
            else:
                theirs.copy_(value)
    trained = {name: parameter.requires_grad for name, parameter in ours.named_parameters()}
    for name, parameter in peer.named_parameters():
        parameter.requires_grad_(trained[_our_name(name, state)])


def _our_name(name: str, state: dict[str, Tensor]) -> str:
    candidates = (
        torchvision_name(name),
        name.replace("backbone.", "backbone.body.features.", 1),  # a trunk that is a plain sequence
        name.replace("backbone.", "backbone.body.", 1),
        name.replace("roi_heads.box_head.0.", "roi_heads.box_head.features."),
        name.replace("roi_heads.box_head.0.", "roi_heads.box_head.layer4."),
        name.replace("roi_heads.box_head.1.", "roi_heads.box_head.fc6."),
        name.replace("roi_heads.box_head.4.", "roi_heads.box_head.fc7."),
    )
    return next(candidate for candidate in candidates if candidate in state)
