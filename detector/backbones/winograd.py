"""3 x 3 convolutions in float32 with 16 products where the definition has 36 (Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", CVPR 2016, section 4.1: Winograd's F(2 x 2, 3 x 3)).

GPUs' libraries choose it by themselves, PyTorch on x86 does not. Four cells of the result are sums of 16 products of
sums of inputs with sums of weights. For all tiles of four cells and all channels these are 16 matrix products, which
take most of the time: VGG16's conv4_2 takes two thirds of the time, and errs less than by oneDNN, whose sums are
longer.

H x W cells, C channels in, D out, N x M tiles.
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CHANNELS_IN, _CHANNELS_OUT, _CELLS = 128, 256, 500
"""From which sizes on it is faster."""
_BYTES = 14 * 2**20
"""Of the sums of inputs that are made before they are multiplied: they should stay in the cache."""
_WEIGHTS: Final = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def worth_winograd(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether `winograd_relu` computes the layer on float32 maps `x`, and faster than oneDNN's convolution."""
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    if shape != ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
        return False
    wide = layer.in_channels >= _CHANNELS_IN and layer.out_channels >= _CHANNELS_OUT
    return wide and x.shape[2] * x.shape[3] >= _CELLS


def winograd_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """ReLU of the convolution of `x` (B, C, H, W) with `weight` (D, C, 3, 3), padded by a cell: (B, D, H, W), channels
    last in memory. Has no gradient."""
    batch, channels, height, width = x.shape
    transform = torch.tensor(_WEIGHTS)  # on CPUs, in float32
    weights = torch.einsum("ia,jb,dcab->ijdc", transform, transform, weight).flatten(0, 1).contiguous()  # (16, D, C)
    result = x.new_empty(batch, height, width, len(weight))
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + width % 2, 1, 1 + height % 2))
    most = max(1, _BYTES // (16 * -(-width // 2) * channels * x.element_size()))
    for image, maps in zip(result, padded, strict=True):
        for first in range(0, height, 2 * most):
            last = first + 2 * most
            _convolve(maps[first : last + 2], weights, bias, image[first:last])
    return result.permute(0, 3, 1, 2)


def _convolve(maps: Tensor, weights: Tensor, bias: Tensor | None, result: Tensor) -> None:
    """Fill `result` (H, W, D) from padded maps (2 N + 2, 2 M + 2, C) and transformed weights (16, D, C)."""
    lines = _input_sums(maps, 0)  # 4 x (N, 2 M + 2, C)
    tiles = [tile for line in lines for tile in _input_sums(line, 1)]  # 16 x (N, M, C)
    products = [
        torch.ops.mkldnn._linear_pointwise(tile.flatten(0, 1), own, None, "none", [], "").unflatten(0, tile.shape[:2])
        for tile, own in zip(tiles, weights, strict=True)
    ]
    columns = [_result_sums(products[column::4]) for column in range(4)]
    for row in range(2):
        for column, cells in enumerate(_result_sums([of_rows[row] for of_rows in columns])):
            place = result[row::2, column::2]
            cells = cells[: place.shape[0], : place.shape[1]]
            torch.clamp_min(cells if bias is None else cells.add_(bias), 0, out=place)


def _input_sums(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Of each four neighbours, every second cell on, along `dim`."""
    a, b, c, d = x.unfold(dim, 4, 2).unbind(-1)
    return a - c, b + c, c - b, b - d


def _result_sums(products: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The first and the second of two neighbours."""
    a, b, c, d = products
    return a + b + c, b - c - d
