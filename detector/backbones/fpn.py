"""Feature pyramid network: P2 to P5 from four maps of a body, and P6 (Lin et al. 2017, section 3)."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from detector.backbones.base import Backbone, Body
from detector.backbones.batch_norm import new_norm


class FeaturePyramid(Backbone):
    """One level per map of the body and one of half the last one's resolution, with `channels` channels each.

    On a ResNet that is five levels of strides 4, 8, 16, 32 and 64. A 1 x 1 convolution brings each map to `channels`,
    the coarser level is added after nearest upsampling, a 3 x 3 convolution gives the output; each convolution has a
    norm, unless `norm` is `none`. P6 takes every second cell of P5 (footnote 3 of section 4.1); it is meant for the
    RPN, not for pooling.
    """

    def __init__(self, body: Body, channels: int, norm: Literal["none", "batch", "group", "sync"] = "none") -> None:
        super().__init__(body)
        self.lateral = nn.ModuleList(_convolution(width, channels, 1, norm) for width in body.channels)
        self.output = nn.ModuleList(_convolution(channels, channels, 3, norm) for _ in body.channels)
        self.strides = (*body.strides, 2 * body.strides[-1])
        self.out_channels = channels

    @property
    def roi_strides(self) -> tuple[int, ...]:
        """Return the strides of P2 to P5; P6 serves the RPN alone."""
        return self.strides[:-1]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return all levels, fine to coarse."""
        laterals = [lateral(x) for lateral, x in zip(self.lateral, self.body(images), strict=True)]
        merged = laterals[-1:]
        for x in reversed(laterals[:-1]):
            merged.insert(0, x + F.interpolate(merged[0], size=x.shape[-2:], mode="nearest"))
        levels = [output(x) for output, x in zip(self.output, merged, strict=True)]
        return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]


def _convolution(
    channels_in: int, channels: int, kernel_size: int, norm: Literal["none", "batch", "group", "sync"]
) -> nn.Module:
    """Make a convolution, or a convolution without bias and a norm, randomly initialised."""
    convolution = nn.Conv2d(channels_in, channels, kernel_size, padding=kernel_size // 2, bias=norm == "none")
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    if norm != "none":
        return nn.Sequential(convolution, new_norm(norm, channels))
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution
