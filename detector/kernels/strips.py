"""A block of convolutions and its pooling, computed image by image and in strips of rows where no gradient is needed.

The first maps of VGG16 are large: 123 MB each for an image of 600 x 800 pixels, of which only a pooled quarter is kept.
On CPUs, a block of memory as large as that is fetched from the system and cleared for every layer, which takes longer
than the rows that neighbouring strips compute twice. Without strips whole inferences take 10% longer in bfloat16, 6% in
float32 with AVX2 alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detector.kernels.cpu_paths import computes_now, cpu_dtype, cpu_kernels

_STRIP = 28 * 2**20
"""Bytes of a map that a strip may have. Blocks of up to 32 MB are kept by glibc, if it is asked to."""


def worth_strips(block: Sequence[nn.Module], x: Tensor) -> bool:
    """Return whether `pooled_in_strips` can compute `block` on `x` without gradients, and is faster than by layers."""
    pool = block[-1] if block else None
    if not isinstance(pool, nn.MaxPool2d) or (pool.kernel_size, pool.stride, pool.ceil_mode) != (2, 2, True):
        return False
    if not computes_now(x) or cpu_kernels() == "plain":
        return False
    if any(isinstance(layer, _BatchNorm) and layer.training for layer in block):
        return False
    return len(x) * x.shape[2] * _bytes_of_a_row(block, x) > _STRIP


def pooled_in_strips(block: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Return `block` of `x`, layer by layer for a strip of rows, then for the next; the same numbers up to rounding.

    Args:
        block: 3 x 3 convolutions that keep height and width, and functions of single cells; at the end pooling of 2 x 2
            cells with stride 2 that rounds sizes up.
        x: (B, channels, H, W).

    Returns:
        (B, channels', ceil(H / 2), ceil(W / 2)).
    """
    *layers, pool = block
    beyond = sum(isinstance(layer, nn.Conv2d) for layer in layers)  # rows that a strip's border needs
    height, most = x.shape[2], max(16, _STRIP // _bytes_of_a_row(block, x) - 2 * beyond)
    rows = -(-height // -(-height // most))  # as many in each strip
    rows += rows % 2
    return torch.cat([_in_strips(layers, pool, image, rows, beyond) for image in x.split(1)])


def _in_strips(layers: Sequence[nn.Module], pool: nn.Module, image: Tensor, rows: int, beyond: int) -> Tensor:
    pooled = []
    for first in range(0, image.shape[2], rows):
        start = max(0, first - beyond)
        strip = image[:, :, start : first + rows + beyond]
        for layer in layers:
            strip = layer(strip)
        # Rows next to a cut saw zeros instead of their neighbours: `beyond` of them, which are not used.
        pooled.append(pool(strip[:, :, first - start : first - start + rows]))
    return torch.cat(pooled, dim=2)


def _bytes_of_a_row(block: Sequence[nn.Module], x: Tensor) -> int:
    """Return those of the largest map of one image."""
    channels = max(layer.out_channels for layer in block if isinstance(layer, nn.Conv2d))
    return channels * x.shape[3] * cpu_dtype(x).itemsize
