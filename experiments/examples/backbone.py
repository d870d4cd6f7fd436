"""A backbone: plain convolutions, whose last map is the only feature level."""

from dataclasses import dataclass

from torch import nn

from detector.backbones.base import Backbone, BackboneConfig, BackbonePart, Body, Kind, SingleLevel


class PlainBody(Body):
    """Three stages, each of half the resolution: images (B, 3, H, W) -> (B, sizes[-1], H / 8, W / 8)."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(nn.Sequential(nn.Conv2d(sizes[n], sizes[n + 1], 3, 2, 1), nn.ReLU()) for n in range(3))
        self.strides, self.channels = (8,), sizes[-1:]

    def stages(self) -> list[list[nn.Module]]:
        return [[stage] for stage in self.net]


@dataclass
class Plain(BackbonePart):
    """The network by its width, with random weights: `--model.backbone my_package.Plain --model.backbone.width 64`."""

    width: int = 32
    kind = Kind(3, batch_norm=False, imagenet=0)

    def build(self, options: BackboneConfig) -> Backbone:
        return SingleLevel(PlainBody(3, self.width, 2 * self.width, 4 * self.width))
