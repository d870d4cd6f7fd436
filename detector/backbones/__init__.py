"""Backbones by name: `build_backbone(config)` gives the network under the RPN and the box head that belongs to it."""

from collections.abc import Callable

import torch

from detector.backbones import mobilenet_v2, mobilenet_v3, resnet, small, timm_networks, vgg16
from detector.backbones.base import IMAGENET, Backbone, BackboneConfig, BackboneName, BackbonePart, BoxHeadPart
from detector.backbones.box_heads import BoxHead, new_box_head
from detector.backbones.pretrained import load_backbone_weights
from detector.backbones.timm_models import Levels
from detector.errors import InputError
from detector.parts import name_of

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
    backbone, box_head = _built(config)
    backbone.freeze(config.frozen_stages)
    backbone.body.checkpoint_gradients = config.checkpoint_gradients
    if load_weights:
        backbone.weights_report = load_backbone_weights(backbone, box_head, config)
    return backbone, box_head


def backbone_strides(
    name: BackboneName | BackbonePart, model: str | None = None, levels: Levels = "fpn"
) -> tuple[int, ...]:
    """Return the pixels per cell of a backbone's levels, fine to coarse, without memory and weights."""
    with torch.device("meta"):
        config = BackboneConfig(name, "none", frozen_stages=0, norm="batch", model=model, levels=levels)
        return _built(config)[0].strides


def _built(config: BackboneConfig) -> tuple[Backbone, BoxHead]:
    if not isinstance(config.name, BackbonePart):
        backbone, box_head = _BUILDERS[config.name](config)
        own_head = isinstance(config.box_head, BoxHeadPart) and config.kind.own_box_head
        return backbone, new_box_head(config, backbone.out_channels) if own_head else box_head
    built = config.name.build(config)
    network, head = built if isinstance(built, tuple) else (built, None)
    if not isinstance(network, Backbone) or not isinstance(head, BoxHead | None):
        raise InputError(f"backbone.name {name_of(config.name)}: build must give a Backbone, or that and a BoxHead")
    return network, head or new_box_head(config, network.out_channels)


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
        name = config.model or name_of(config.name)
        raise InputError(f"{key}.weights {config.weights}: none exist for {name}; {instead}, or give a file")
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
