"""ResNet-18, -50 and -101, as C4 (layer4 is the box head; He et al. 2016, appendix A) or under an FPN.

The bottlenecks are torchvision's: their stride sits in the 3 x 3 convolution, where the original sits in the first 1 x
1.
"""

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from detector.backbones.base import BackboneConfig, Body, SingleLevel, norm_layer
from detector.backbones.box_heads import BoxHead, new_box_head
from detector.backbones.deformable import DeformableConv2d
from detector.backbones.fpn import FeaturePyramid
from detector.kernels.layout import for_convolutions
from detector.parts import name_of


class ResNetBody(Body):
    """The stem and the first `depth` of the four layers; one map per layer, of strides 4, 8, 16 and 32."""

    def __init__(self, network: ResNet, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = network.conv1, network.bn1, network.relu, network.maxpool
        self._layers = [f"layer{i + 1}" for i in range(depth)]
        for name in self._layers:
            self.add_module(name, getattr(network, name))
        self.strides = (4, 8, 16, 32)[:depth]
        self.channels = tuple(_channels(self.get_submodule(name)) for name in self._layers)

    def stages(self) -> list[list[nn.Module]]:
        """Return the modules of each stage; see `Body.stages`."""
        stem = [self.conv1, self.bn1, self.relu, self.maxpool]
        return [stem, *([self.get_submodule(name)] for name in self._layers)]


class ResNetHead(BoxHead):
    """layer4 on the pooled features, then the mean over their cells.

    With stride 2 on 14 x 14 cells (the paper's) or stride 1 on 7 x 7 cells (cheaper), layer4 works on 7 x 7.
    """

    def __init__(self, network: ResNet, pool_size: int, stride: int) -> None:
        super().__init__(pool_size, in_channels=_channels(network.layer3), out_channels=_channels(network.layer4))
        self.layer4 = network.layer4
        first = self.layer4[0]
        assert isinstance(first, BasicBlock | Bottleneck) and first.downsample is not None
        for convolution in (first.conv1 if isinstance(first, BasicBlock) else first.conv2, first.downsample[0]):
            convolution.stride = (stride, stride)
        self.weight_prefixes = {"layer4.": "layer4."}

    def forward(self, pooled: Tensor) -> Tensor:
        """Return a vector per RoI, (R, out_channels)."""
        x: Tensor = self.layer4(for_convolutions(pooled))
        return x.mean(dim=(2, 3))


def build_resnet_c4(config: BackboneConfig) -> tuple[SingleLevel, ResNetHead]:
    """Build `resnet18_c4`, `resnet50_c4` or `resnet101_c4` with random weights: stride 16, 256 or 1024 channels."""
    network = _network(config)
    pool_size = config.pool_size or (14 if config.box_head_stride == 2 else 7)
    return SingleLevel(ResNetBody(network, depth=3)), ResNetHead(network, pool_size, config.box_head_stride)


def build_resnet_fpn(config: BackboneConfig) -> tuple[FeaturePyramid, BoxHead]:
    """Build `resnet18_fpn`, `resnet50_fpn` or `resnet101_fpn` with random weights: strides 4 to 64."""
    backbone = FeaturePyramid(ResNetBody(_network(config), depth=4), config.fpn_channels, config.fpn_norm)
    return backbone, new_box_head(config, config.fpn_channels)


def _network(config: BackboneConfig) -> ResNet:
    constructor = getattr(torchvision.models, name_of(config.name).partition("_")[0])
    network: ResNet = constructor(weights=None, norm_layer=norm_layer(config))
    for stage in config.deformable_stages if config.deformable != "none" else []:
        for block in network.get_submodule(f"layer{stage - 1}").children():
            assert isinstance(block, BasicBlock | Bottleneck)
            block.conv2 = DeformableConv2d(block.conv2, modulated=config.deformable == "v2")
    return network


def _channels(layer: nn.Module) -> int:
    """Return the output channels of a layer: those of the last convolution of its last block."""
    return [module for module in layer.modules() if isinstance(module, nn.Conv2d)][-1].out_channels
