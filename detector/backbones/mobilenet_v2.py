"""MobileNetV2 1.0 (Sandler et al.), as C4 (its last blocks are the box head) or under an FPN."""

import torchvision
from torch import Tensor, nn
from torchvision.models import MobileNetV2

from detector.backbones.base import BackboneConfig, Body, SingleLevel, norm_layer
from detector.backbones.box_heads import BoxHead, new_box_head
from detector.backbones.fpn import FeaturePyramid
from detector.kernels.layout import for_convolutions

_ENDS = (2, 4, 7, 14, 19)  # of the stages, in torchvision's `features`
_CHANNELS = (16, 24, 32, 96, 1280)


class MobileNetV2Body(Body):
    """The first `depth` of the five stages, one per resolution; maps of strides 4, 8, 16 and 32.

    The last of five stages ends with the 1 x 1 convolution to 1280 channels.
    """

    def __init__(self, network: MobileNetV2, depth: int) -> None:
        super().__init__()
        self._ends = _ENDS[:depth]
        self.features = network.features[: self._ends[-1]]
        self.strides = (4, 8, 16, 32)[: depth - 1]
        self.channels = _CHANNELS[1:depth]

    def stages(self) -> list[list[nn.Module]]:
        """Return the modules of each stage; see `Body.stages`."""
        blocks = list(self.features)
        return [blocks[start:end] for start, end in zip((0, *self._ends), self._ends, strict=False)]


class MobileNetV2Head(BoxHead):
    """`features[14:]` on the pooled features, then the mean over their cells.

    With stride 2, 7 x 7 cells shrink to 4 x 4.
    """

    def __init__(self, network: MobileNetV2, pool_size: int, stride: int) -> None:
        super().__init__(pool_size, in_channels=96, out_channels=1280)
        self.features = network.features[14:]  # a slice keeps the names "14" to "18"
        depthwise = self.features[0].conv[1][0]
        depthwise.stride = (stride, stride)
        self.weight_prefixes = {"features.": "features."}

    def forward(self, pooled: Tensor) -> Tensor:
        """Return a vector per RoI, (R, out_channels)."""
        x: Tensor = self.features(for_convolutions(pooled))
        return x.mean(dim=(2, 3))


def build_mobilenet_v2_c4(config: BackboneConfig) -> tuple[SingleLevel, MobileNetV2Head]:
    """Build `mobilenet_v2_c4` with random weights: stride 16, 96 channels."""
    network = torchvision.models.mobilenet_v2(weights=None, norm_layer=norm_layer(config))
    box_head = MobileNetV2Head(network, config.pool_size or 7, config.box_head_stride)
    return SingleLevel(MobileNetV2Body(network, depth=4)), box_head


def build_mobilenet_v2_fpn(config: BackboneConfig) -> tuple[FeaturePyramid, BoxHead]:
    """Build `mobilenet_v2_fpn` with random weights: strides 4 to 64."""
    network = torchvision.models.mobilenet_v2(weights=None, norm_layer=norm_layer(config))
    backbone = FeaturePyramid(MobileNetV2Body(network, depth=5), config.fpn_channels, config.fpn_norm)
    return backbone, new_box_head(config, config.fpn_channels)
