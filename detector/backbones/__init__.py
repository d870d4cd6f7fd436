"""Backbones by name: `build_backbone(config)` gives the network under the RPN and the box head that belongs to it."""

from collections.abc import Callable

import torch

from detector.backbones import mobilenet_v2, mobilenet_v3, resnet, small, timm_networks, vgg16
from detector.backbones.base import IMAGENET, Backbone, BackboneConfig, BackboneName
from detector.backbones.box_heads import BoxHead
from detector.backbones.pretrained import load_backbone_weights
from detector.backbones.timm_models import Levels
from detector.errors import InputError

__all__ = ["Backbone", "BackboneConfig", "BoxHead", "backbone_strides", "build_backbone", "check_backbone_weights"]


_BUILDERS: dict[BackboneName, Callable[[BackboneConfig], tuple[Backbone, BoxHead]]] = {
    "vgg16": vgg16.build_vgg16,
    "vgg16_bn": vgg16.build_vgg16,
    "resnet18_c4": resnet.build_resnet_c4,
    "resnet50_c4": resnet.build_resnet_c4,
    "resnet101_c4": resnet.build_resnet_c4,
    "resnet18_fpn": resnet.build_resnet_fpn,
    "resnet50_fpn": resnet.build_resnet_fpn,
    "resnet101_fpn": resnet.build_resnet_fpn,
    "mobilenet_v2_c4": mobilenet_v2.build_mobilenet_v2_c4,
    "mobilenet_v2_fpn": mobilenet_v2.build_mobilenet_v2_fpn,
    "mobilenet_v3_large_fpn": mobilenet_v3.build_mobilenet_v3_large_fpn,
    "small_c4": small.build_small_c4,
    "timm": timm_networks.build_timm,
}


def build_backbone(config: BackboneConfig, load_weights: bool = True) -> tuple[Backbone, BoxHead]:
    """Build the backbone and its box head, load their weights and freeze what the configuration says.

    With `load_weights` False no file or network is touched: for a model whose weights come from a checkpoint.
    What was loaded stands in `backbone.weights_report`.
    Raises InputError for a configuration or weights that cannot be used.
    """
    check_backbone_weights(config)
    backbone, box_head = _BUILDERS[config.name](config)
    backbone.freeze(config.frozen_stages)
    backbone.body.checkpoint_gradients = config.checkpoint_gradients
    if load_weights:
        backbone.weights_report = load_backbone_weights(backbone, box_head, config)
    return backbone, box_head


def backbone_strides(name: BackboneName, model: str | None = None, levels: Levels = "fpn") -> tuple[int, ...]:
    """Return the pixels per cell of a backbone's levels, fine to coarse, without memory and weights."""
    with torch.device("meta"):
        config = BackboneConfig(name, "none", frozen_stages=0, norm="batch", model=model, levels=levels)
        backbone, _ = _BUILDERS[name](config)
    return backbone.strides


def check_backbone_weights(config: BackboneConfig) -> None:
    """Check that the weights can be had, and that none would be frozen at random; build nothing.

    Not a matter of the configuration alone: a whole detector's weights may take the place of `config.weights`.

    Raises:
        InputError: There are no such weights, or random ones would stay frozen.
    """
    key, kind = "backbone", config.kind
    if IMAGENET.get(str(config.weights), 0) > kind.imagenet:
        instead = (
            f"give {key}.weights imagenet"
            if kind.imagenet
            else (f"train it from scratch by {key}.weights none and {key}.frozen_stages 0")
        )
        raise InputError(
            f"{key}.weights {config.weights}: none exist for {config.model or config.name}; {instead}, or give a file"
        )
    if config.norm == "group" and kind.batch_norm and (config.name == "timm" or config.weights in IMAGENET):
        why = "timm's networks keep theirs" if config.name == "timm" else f"{config.weights} has batch norm"
        raise InputError(f"{key}.norm group: {why}; give {key}.norm frozen, batch or sync, or random weights")
    frozen_norm = kind.batch_norm and config.norm == "frozen"
    if config.random and (config.frozen_stages > 0 or frozen_norm):
        frozen = f"frozen_stages {config.frozen_stages}" + (", norm frozen" if frozen_norm else "")
        raise InputError(
            f"{key}.weights none: random weights would stay frozen ({frozen}); train them all by "
            f"{key}.frozen_stages 0 and {key}.norm batch, or give {key}.weights"
        )
