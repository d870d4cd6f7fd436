"""MobileNetV3-Large (Howard et al. 2019) under an FPN, with the levels of torchvision's detector."""

from itertools import pairwise

import torchvision
from torch import Tensor, nn
from torchvision.models import MobileNetV3

from detector.backbones.base import BackboneConfig, Body, norm_layer
from detector.backbones.box_heads import BoxHead, new_box_head
from detector.backbones.fpn import FeaturePyramid

_STARTS = (0, 2, 4, 7, 13, 16, 17)  # of the stages, in torchvision's `features`: each begins with a strided block


class MobileNetV3Body(Body):
    """All of `features`; the maps of the block that first has stride 32 (160 channels) and of the last convolution.

    Both have stride 32: torchvision's detector takes the last two of its six stages, and names a stage's map after the
    stage's first block.
    """

    strides = (32, 32)
    channels = (160, 960)

    def __init__(self, network: MobileNetV3) -> None:
        super().__init__()
        self.features = network.features

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps, fine to coarse."""
        maps = []
        x = images
        for index, stage in enumerate(self.stages()):
            if index in (4, 5):
                x = self.run(stage[:1], x)
                maps.append(x)
                stage = stage[1:]
            x = self.run(stage, x)
        return maps

    def stages(self) -> list[list[nn.Module]]:
        """Return the modules of each stage; see `Body.stages`."""
        blocks = list(self.features)
        return [blocks[start:end] for start, end in pairwise(_STARTS)]


def build_mobilenet_v3_large_fpn(config: BackboneConfig) -> tuple[FeaturePyramid, BoxHead]:
    """Build `mobilenet_v3_large_fpn` with random weights: strides 32, 32 and 64."""
    network = torchvision.models.mobilenet_v3_large(weights=None, norm_layer=norm_layer(config))
    backbone = FeaturePyramid(MobileNetV3Body(network), config.fpn_channels, config.fpn_norm)
    return backbone, new_box_head(config, config.fpn_channels)
