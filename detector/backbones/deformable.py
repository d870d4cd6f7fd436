"""Deformable convolutions, versions 1 (Dai et al. 2017) and 2 (Zhu et al. 2019)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformableConv2d(nn.Conv2d):
    """A convolution that samples each cell of its kernel elsewhere, by offsets that it computes from its input.

    It begins as the plain convolution that it takes the place of: offsets are 0, and the factors of version 2 are 1
    (twice a sigmoid; the paper's and mmdetection's sigmoids begin at 0.5, which halves what pretrained weights expect).

    Args:
        plain: Gives the geometry and the weights, without a bias.
        modulated: Version 2: each sample has a factor, too.
    """

    def __init__(self, plain: nn.Conv2d, modulated: bool) -> None:
        with torch.device("meta"):  # draws no random numbers
            names = ("kernel_size", "stride", "padding", "dilation", "groups")
            options: dict[str, Any] = {name: getattr(plain, name) for name in names}
            super().__init__(plain.in_channels, plain.out_channels, bias=False, **options)
        self.weight = plain.weight
        cells = plain.kernel_size[0] * plain.kernel_size[1]
        self.offset_weight = nn.Parameter(
            plain.weight.new_zeros((3 if modulated else 2) * cells, plain.in_channels, *plain.kernel_size)
        )
        self.offset_bias = nn.Parameter(plain.weight.new_zeros(len(self.offset_weight)))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, (B, in, H, W) -> (B, out, H', W'), in float32 under autocast, too."""
        geometry: tuple[Any, ...] = self.stride, self.padding, self.dilation
        cells = self.kernel_size[0] * self.kernel_size[1]
        with torch.autocast(x.device.type, enabled=False):
            given = x.float()
            predicted = F.conv2d(given, self.offset_weight, self.offset_bias, *geometry)
            offsets, factors = predicted[:, : 2 * cells], predicted[:, 2 * cells :]
            mask = 2 * factors.sigmoid() if factors.shape[1] else None
            found: Tensor = deform_conv2d(given, offsets, self.weight, None, *geometry, mask)
        return found.to(x.dtype)
