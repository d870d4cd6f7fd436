"""Backbones of timm: any of its networks that is a row of stages, under an FPN or as one level of stride 16."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from detector.backbones.base import Backbone, BackboneConfig, Body, SingleLevel
from detector.backbones.batch_norm import FrozenBatchNorm2d, synchronised
from detector.backbones.box_heads import BoxHead, new_box_head
from detector.backbones.fpn import FeaturePyramid
from detector.backbones.timm_models import (
    TimmModel,
    build_features,
    library,
    maps_are_channels_last,
    names_in_files,
    stages_of,
    timm_model,
)
from detector.errors import InputError


class TimmBody(Body):
    """The layers of one of timm's networks up to the last map that is used; each map ends a stage.

    Images are padded at the bottom and right to a multiple of the largest stride: some networks would round sizes down.
    """

    def __init__(self, network: Any, known: TimmModel) -> None:
        super().__init__()
        self._stages = stages_of(network)  # names: the layers themselves are replaced by faster ones
        used = [name.partition(".") for stage in self._stages for name in stage]
        for name, child in network.named_children():
            parts = [part for child_name, _, part in used if child_name == name]
            if parts:  # what comes after the last map is left out
                self.add_module(name, child[: len(parts)] if parts[0] else child)
        self.strides, self.channels = known.strides, known.channels
        self._channels_last = maps_are_channels_last(network)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps, fine to coarse."""
        height, width = images.shape[-2:]
        right, below = (-side % self.strides[-1] for side in (width, height))
        maps = super().forward(F.pad(images, (0, right, 0, below)) if right or below else images)
        if self._channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return [x[..., : -(-height // s), : -(-width // s)] for x, s in zip(maps, self.strides, strict=True)]

    def stages(self) -> list[list[nn.Module]]:
        """Return the modules of each stage; see `Body.stages`."""
        return [[self.get_submodule(name) for name in stage] for stage in self._stages]


class FrozenBatchNormAct(FrozenBatchNorm2d):
    """A frozen batch norm with what timm's `BatchNormAct2d` does after it."""

    def __init__(self, norm: Any) -> None:
        super().__init__(norm.num_features, norm.eps)
        self.drop, self.act = norm.drop, norm.act

    def forward(self, x: Tensor) -> Tensor:
        """Apply the norm, unless the convolution before it does, and the activation."""
        result: Tensor = self.act(self.drop(super().forward(x)))
        return result


def build_timm(config: BackboneConfig) -> tuple[Backbone, BoxHead]:
    """Build the network of timm that `config.model` names with random weights, under an FPN or as one level."""
    known = timm_model(config.model, config.levels)
    assert config.model is not None
    try:
        network = build_features(config.model, known.maps, config.drop_path)
    except TypeError as error:
        raise InputError(f"backbone.drop_path {config.drop_path:g}: {config.model} has none; give 0") from error
    if config.norm == "frozen":
        _freeze_norms(network)
    elif config.norm == "sync":
        network = synchronised(library().layers.convert_sync_batchnorm(network))
    body = TimmBody(network, known)
    backbone: Backbone
    if config.levels == "fpn":
        backbone = FeaturePyramid(body, config.fpn_channels, config.fpn_norm)
    else:
        backbone = SingleLevel(body)
    names = names_in_files(config.model)
    backbone.weight_prefixes = {f"{names.get(name, name)}.": f"body.{name}." for name, _ in body.named_children()}
    return backbone, new_box_head(config, backbone.out_channels)


def _freeze_norms(network: nn.Module) -> None:
    """Replace batch norms by frozen ones, with their names and numbers."""
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                with_act = hasattr(norm, "act")
                frozen = FrozenBatchNormAct(norm) if with_act else FrozenBatchNorm2d(norm.num_features, norm.eps)
                frozen.load_state_dict(norm.state_dict(), strict=False)
                setattr(parent, name, frozen)
