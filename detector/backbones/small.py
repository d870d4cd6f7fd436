"""A compact network for training from scratch in minutes on a CPU, at images of about 150 pixels; ours, not published.

Two dilated blocks widen the receptive field to about 170 pixels, so that stride 8 serves small and large objects alike.
Batch norm is trained: in evaluation an image's features do not depend on the padding of its batch.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from detector.backbones.base import BackboneConfig, Body, SingleLevel
from detector.backbones.box_heads import BoxHead, new_box_head


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a shortcut.

    (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels_in, channels_out, stride, dilation)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out, 1, dilation)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        residual = F.relu(self.norm1(self.conv1(x)), inplace=True)
        residual = self.norm2(self.conv2(residual))
        return F.relu(residual + self.shortcut(x), inplace=True)


class SmallBody(Body):
    """A stem and three residual layers, stride 8, 128 channels, 0.73 million parameters."""

    strides = (8,)
    channels = (128,)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv3x3(3, 32, stride=2), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.layer1 = ResidualBlock(32, 48, stride=2)
        self.layer2 = ResidualBlock(48, 96, stride=2)
        self.layer3 = nn.Sequential(ResidualBlock(96, 128, dilation=2), ResidualBlock(128, 128, dilation=2))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stages(self) -> list[list[nn.Module]]:
        """Return the modules of each stage; see `Body.stages`."""
        return [[self.stem], [self.layer1], [self.layer2], [self.layer3]]


def build_small_c4(config: BackboneConfig) -> tuple[SingleLevel, BoxHead]:
    """Build `small_c4` with random weights."""
    backbone = SingleLevel(SmallBody())
    return backbone, new_box_head(config, backbone.out_channels, width=256)


def _conv3x3(channels_in: int, channels_out: int, stride: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=dilation, dilation=dilation, bias=False)
