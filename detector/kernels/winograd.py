"""3 x 3 convolutions in float32 with 16 products where the definition has 36, and their gradients.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1: Winograd's
F(2 x 2, 3 x 3).

GPUs' libraries choose it by themselves, PyTorch on x86 does not. Four cells of the result are sums of 16 products of
sums of inputs with sums of weights. For all tiles of four cells and all channels these are 16 matrix products, which
take most of the time: VGG16's conv4_2 takes two thirds of the time, and errs less than by oneDNN, whose sums are
longer. All three steps (sums of inputs, products, sums of products) are linear, so the gradient of the weights is 16
products as well; that of the inputs is a convolution with the weights mirrored and transposed.

H x W cells, C channels in, D out, N x M tiles.
"""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from detector.kernels.cpu_paths import cpu_kernels

_CHANNELS, _MORE_CHANNELS, _CELLS = 128, 256, 500
"""From which sizes on the algorithm is faster: of one side, of the other, and of the map."""
_GEOMETRY: Final = ((1, 1), (1, 1), (1, 1), 1)
_BYTES = 14 * 2**20
"""Of the sums of inputs that are made before they are multiplied: they should stay in the cache."""
_WEIGHTS: Final = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
_MIRRORED: Final = tuple(4 * row + column for row in (3, 1, 2, 0) for column in (3, 1, 2, 0))
"""Which of the 16 sums of weights are those of the weights mirrored in both directions."""


class Passes(NamedTuple):
    """Which passes of a convolution are by Winograd's algorithm: its result, the gradients of `x` and of `weight`."""

    forward: bool
    of_x: bool
    of_weight: bool


def winograd_passes(x: Tensor, weight: Tensor, geometry: tuple[Any, ...], trained: bool) -> Passes:
    """Return for which passes of a convolution of `x` (B, C, H, W) with `weight` (D, C, h, w) the algorithm is faster.

    Both are in float32, on a CPU. Where gradients may be asked for (`trained`), it is so on some processors only.
    `geometry` is stride, padding, dilation and groups: all but 3 x 3 kernels padded by a cell are none of Winograd's.
    """
    channels_out, channels_in, *kernel = weight.shape
    stride, padding, dilation, groups = geometry
    fits = kernel == [3, 3] and (tuple(stride), tuple(padding), tuple(dilation), groups) == _GEOMETRY and x.dim() == 4
    chosen = cpu_kernels() in (("winograd",) if trained else ("winograd", "onednn"))
    if not (fits and chosen and x.shape[2] * x.shape[3] >= _CELLS):
        return Passes(False, False, False)
    of_weight = min(channels_in, channels_out) >= _CHANNELS
    return Passes(
        channels_in >= _CHANNELS and channels_out >= _MORE_CHANNELS,
        of_weight and channels_in >= _MORE_CHANNELS,
        of_weight,
    )


class WinogradConvolution(torch.autograd.Function):
    """The convolution of `x` (B, C, H, W) with `weight` (D, C, 3, 3), padded by a cell, and its gradients.

    Of `forward`, `of_x` and `of_weight`, those that are true are computed by Winograd's algorithm, the others by
    PyTorch, as are gradients of gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, forward: bool, of_x: bool, of_weight: bool
    ) -> Tensor:
        """Convolve; see `winograd`."""
        ctx.save_for_backward(x, weight)
        ctx.gradients = of_x, of_weight
        return winograd(x, weight, bias) if forward else F.conv2d(x, weight, bias, *_GEOMETRY)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of what `forward` takes."""
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        by_winograd = [wanted and chosen for wanted, chosen in zip((of_x, of_weight), ctx.gradients, strict=True)]
        if torch.is_grad_enabled():  # whoever asks for a gradient of this one
            by_winograd = [False, False]
        mask = [of_x and not by_winograd[0], of_weight and not by_winograd[1], of_bias]
        sizes = [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        found = [None, None, gradient.sum((0, 2, 3)) if of_bias else None]
        if any(mask[:2]):
            found = list(torch.ops.aten.convolution_backward(gradient, x, weight, *sizes, mask))
        with torch.autocast("cpu", enabled=False):
            if by_winograd[0]:
                found[0] = winograd_input_gradient(gradient, weight)
            if by_winograd[1]:
                found[1] = winograd_weight_gradient(x, gradient)
        return *found, None, None, None


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of `x` (B, C, H, W) with `weight` (D, C, 3, 3), padded by a cell.

    The result (B, D, H, W) is channels last in memory. Has no gradient.
    """
    return _convolve(x, list(_weight_sums(weight)), bias)


def winograd_input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient (B, C, H, W) of `x` from that of `winograd(x, weight, ...)`, (B, D, H, W)."""
    sums = _weight_sums(weight)
    return _convolve(gradient, [sums[place].t() for place in _MIRRORED], None)


def winograd_weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient (D, C, 3, 3) of `weight` from `x` (B, C, H, W) and that of `winograd(x, weight, ...)`."""
    total = x.new_zeros(16, gradient.shape[1], x.shape[1])
    height, width = x.shape[2:]
    for maps, of_result in zip(_padded(x), _padded(gradient, border=0), strict=True):  # none beyond the border
        for first, last in _parts(height, width, max(x.shape[1], gradient.shape[1])):
            inputs = _tiles(maps[first : last + 2])
            lines = _adjoint_of_result_sums(of_result[first:last], 0)
            results = [tile for line in lines for tile in _adjoint_of_result_sums(line, 1)]
            for own, left, right in zip(total, results, inputs, strict=True):
                own.addmm_(left.flatten(0, 1).t(), right.flatten(0, 1))
    transform = torch.tensor(_WEIGHTS)
    return torch.einsum("ia,jb,ijdc->dabc", transform, transform, total.unflatten(0, (4, 4))).permute(0, 3, 1, 2)


def _weight_sums(weight: Tensor) -> Tensor:
    transform = torch.tensor(_WEIGHTS)  # on CPUs, in float32
    return torch.einsum("ia,jb,dcab->ijdc", transform, transform, weight).flatten(0, 1).contiguous()  # (16, D, C)


def _convolve(x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
    """Return the convolution of `x` with 16 sums of weights (D, C)."""
    batch, channels, height, width = x.shape
    size = batch, len(weights[0]), height, width
    result = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)  # no view: it may be changed in place
    for image, maps in zip(result.permute(0, 2, 3, 1), _padded(x), strict=True):
        for first, last in _parts(height, width, channels):
            _convolve_part(maps[first : last + 2], weights, bias, image[first:last])
    return result


def _padded(x: Tensor, border: int = 1) -> Iterator[Tensor]:
    """Yield each image of (B, C, H, W) as (H', W', C), padded by `border` cells of zeros around.

    There is one more where tiles of 2 x 2 cells need it; one by one, as memory for small blocks is kept.
    """
    ends = [border + side % 2 for side in x.shape[2:]]
    for image in x.permute(0, 2, 3, 1):
        yield F.pad(image, (0, 0, border, ends[1], border, ends[0])) if any((border, *ends)) else image


def _parts(height: int, width: int, channels: int) -> Iterator[tuple[int, int]]:
    """Yield the first and one past the last row of parts of whole tiles that fit into the cache."""
    most = max(1, _BYTES // (16 * -(-width // 2) * channels * 4))
    for first in range(0, height, 2 * most):
        yield first, min(first + 2 * most, height + height % 2)


def _convolve_part(maps: Tensor, weights: list[Tensor], bias: Tensor | None, result: Tensor) -> None:
    """Fill `result` (H, W, D) from padded maps (2 N + 2, 2 M + 2, C) and sums of weights, 16 x (D, C)."""
    products = [
        torch.ops.mkldnn._linear_pointwise(tile.flatten(0, 1), own, None, "none", [], "").unflatten(0, tile.shape[:2])
        for tile, own in zip(_tiles(maps), weights, strict=True)
    ]
    columns = [_result_sums(products[column::4]) for column in range(4)]
    for row in range(2):
        for column, cells in enumerate(_result_sums([of_rows[row] for of_rows in columns])):
            place = result[row::2, column::2]
            cells = cells[: place.shape[0], : place.shape[1]]
            place.copy_(cells if bias is None else cells.add_(bias))


def _tiles(maps: Tensor) -> list[Tensor]:
    """Return the sums of inputs, 16 x (N, M, C), of padded maps (2 N + 2, 2 M + 2, C)."""
    return [tile for line in _input_sums(maps, 0) for tile in _input_sums(line, 1)]


def _input_sums(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Return the sums of each four neighbours, every second cell on, along `dim`."""
    a, b, c, d = x.unfold(dim, 4, 2).unbind(-1)
    return a - c, b + c, c - b, b - d


def _result_sums(products: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the first and the second of two neighbours."""
    a, b, c, d = products
    return a + b + c, b - c - d


def _adjoint_of_result_sums(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Return the gradients of the four products from those of two neighbours, along `dim`."""
    a, b = x.unfold(dim, 2, 2).unbind(-1)
    return a, a + b, a - b, -b
