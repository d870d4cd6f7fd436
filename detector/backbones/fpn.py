"""Feature pyramid network: P2 to P5 from four maps of a body, and P6 (Lin et al. 2017, section 3)."""

from torch import Tensor, nn
from torch.nn import functional as F

from detector.backbones.base import Backbone, Body


class FeaturePyramid(Backbone):
    """Five levels of strides 4, 8, 16, 32 and 64 with `channels` channels each.

    A 1 x 1 convolution brings each map to `channels`, the coarser level is added after nearest upsampling, a 3 x 3
    convolution gives the output. P6 takes every second cell of P5 (footnote 3 of section 4.1); it is meant for the RPN,
    not for pooling.
    """

    def __init__(self, body: Body, channels: int) -> None:
        super().__init__(body)
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in body.channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in body.channels)
        self.strides = (*body.strides, 2 * body.strides[-1])
        self.out_channels = channels
        for layer in (*self.lateral, *self.output):
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    @property
    def roi_strides(self) -> tuple[int, ...]:
        """P2 to P5; P6 serves the RPN alone."""
        return self.strides[:-1]

    def forward(self, images: Tensor) -> list[Tensor]:
        laterals = [lateral(x) for lateral, x in zip(self.lateral, self.body(images), strict=True)]
        merged = laterals[-1:]
        for x in reversed(laterals[:-1]):
            merged.insert(0, x + F.interpolate(merged[0], size=x.shape[-2:], mode="nearest"))
        levels = [output(x) for output, x in zip(self.output, merged, strict=True)]
        return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]
