"""Backbones by name: `build_backbone(config)` gives the network under the RPN and the box head that belongs to it."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from detector.backbones import mobilenet_v2, mobilenet_v3, resnet, small, vgg16
from detector.backbones.base import Backbone, BackboneConfig, BackboneName, check_frozen_stages
from detector.backbones.box_heads import BOX_HEADS, BoxHead
from detector.backbones.pretrained import load_backbone_weights
from detector.errors import InputError

__all__ = ["Backbone", "BackboneConfig", "BoxHead", "backbone_strides", "build_backbone", "check_backbone_config"]


class _Entry(NamedTuple):
    build: Callable[[BackboneConfig], tuple[Backbone, BoxHead]]
    stages: tuple[str, ...]
    batch_norm: bool
    imagenet: bool = True
    own_box_head: bool = False  # the last layers of the classification network


_RESNET_C4 = _Entry(resnet.build_resnet_c4, resnet.STAGES[:4], batch_norm=True, own_box_head=True)
_RESNET_FPN = _Entry(resnet.build_resnet_fpn, resnet.STAGES, batch_norm=True)
_BACKBONES: dict[str, _Entry] = {
    "vgg16": _Entry(vgg16.build_vgg16, vgg16.STAGES, batch_norm=False, own_box_head=True),
    "vgg16_bn": _Entry(vgg16.build_vgg16, vgg16.STAGES, batch_norm=True, own_box_head=True),
    "resnet18_c4": _RESNET_C4,
    "resnet50_c4": _RESNET_C4,
    "resnet101_c4": _RESNET_C4,
    "resnet18_fpn": _RESNET_FPN,
    "resnet50_fpn": _RESNET_FPN,
    "resnet101_fpn": _RESNET_FPN,
    "mobilenet_v2_c4": _Entry(
        mobilenet_v2.build_mobilenet_v2_c4, mobilenet_v2.STAGES[:4], batch_norm=True, own_box_head=True
    ),
    "mobilenet_v2_fpn": _Entry(mobilenet_v2.build_mobilenet_v2_fpn, mobilenet_v2.STAGES, batch_norm=True),
    "mobilenet_v3_large_fpn": _Entry(mobilenet_v3.build_mobilenet_v3_large_fpn, mobilenet_v3.STAGES, batch_norm=True),
    "small_c4": _Entry(small.build_small_c4, small.STAGES, batch_norm=False, imagenet=False),
}


def build_backbone(config: BackboneConfig, load_weights: bool = True) -> tuple[Backbone, BoxHead]:
    """Build the backbone and its box head, load their weights and freeze what the configuration says.

    With `load_weights` False no file or network is touched: for a model whose weights come from a checkpoint.
    What was loaded stands in `backbone.weights_report`.
    Raises InputError for a configuration or weights that cannot be used.
    """
    check_backbone_config(config)
    backbone, box_head = _BACKBONES[config.name].build(config)
    backbone.freeze(config.frozen_stages)
    backbone.body.checkpoint_gradients = config.checkpoint_gradients
    if load_weights:
        backbone.weights_report = load_backbone_weights(backbone, box_head, config)
        backbone.settle_precision()
    return backbone, box_head


def backbone_strides(name: BackboneName) -> tuple[int, ...]:
    """Pixels per cell of a backbone's levels, fine to coarse; takes neither memory nor weights."""
    with torch.device("meta"):
        backbone, _ = _BACKBONES[name].build(BackboneConfig(name=name, weights="none", frozen_stages=0, norm="batch"))
    return backbone.strides


def check_backbone_config(config: BackboneConfig) -> None:
    """Raises InputError for a configuration that cannot be built or would freeze random weights; builds nothing."""
    key = "--model.backbone"
    if config.name not in _BACKBONES:
        raise InputError(f"{key}.name {config.name}: unknown; choose one of {', '.join(_BACKBONES)}")
    for name, choices in (("norm", ("frozen", "batch")), ("fpn_norm", ("none", "batch")), ("box_head", BOX_HEADS)):
        if getattr(config, name) not in choices:
            raise InputError(f"{key}.{name} {getattr(config, name)}: choose {' or '.join(choices)}")
    if config.box_head_stride not in (1, 2):
        raise InputError(f"{key}.box_head_stride {config.box_head_stride}: choose 1 or 2")
    if not 0 <= config.dropout < 1:
        raise InputError(f"{key}.dropout {config.dropout}: must be at least 0 and less than 1")
    for name in ("pool_size", "fpn_channels", "box_head_channels"):
        size = getattr(config, name)
        if size is not None and size < 1:
            raise InputError(f"{key}.{name} {size}: must be at least 1")
    if config.norm_eps < 0:
        raise InputError(f"{key}.norm_eps {config.norm_eps}: must be at least 0")
    entry = _BACKBONES[config.name]
    if entry.own_box_head and config.box_head != "two_fc":
        raise InputError(f"{key}.box_head {config.box_head}: {config.name} has its own box head; use it with *_fpn")
    if config.weights == "imagenet" and not entry.imagenet:
        raise InputError(
            f"{key}.weights imagenet: none exist for {config.name}; train it from scratch by "
            f"{key}.weights none {key}.frozen_stages 0, or give a file"
        )
    check_frozen_stages(config.frozen_stages, len(entry.stages))
    frozen_norm = entry.batch_norm and config.norm == "frozen"
    if config.random and (config.frozen_stages > 0 or frozen_norm):
        frozen = f"frozen_stages {config.frozen_stages}" + (", norm frozen" if frozen_norm else "")
        raise InputError(
            f"{key}.weights none: random weights would stay frozen ({frozen}); train them all by "
            f"{key}.frozen_stages 0 {key}.norm batch, or give {key}.weights"
        )
