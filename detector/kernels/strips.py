"""A block of convolutions and its pooling, computed image by image and in strips of rows where no gradient is needed.

The first maps of VGG16 are large: 123 MB each for an image of 600 x 800 pixels, of which only a pooled quarter is kept.
On CPUs, a block of memory as large as that is fetched from the system and cleared for every layer, which takes longer
than the rows that neighbouring strips compute twice.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detector.kernels.checkpointing import needs_gradients
from detector.kernels.cpu_paths import cpu_paths
from detector.kernels.onednn import cpu_dtype, runs_by_itself_on_cpu

_STRIP = 28 * 2**20
"""Bytes of a map that a strip may have. Blocks of up to 32 MB are kept by glibc, if it is asked to."""


def worth_strips(block: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether `pooled_in_strips` can compute `block` on `x`, and is faster than layer by layer."""
    if not runs_by_itself_on_cpu(x) or not isinstance(block[-1], nn.MaxPool2d) or needs_gradients(block, x):
        return False
    if not cpu_paths().strips:
        return False
    if any(isinstance(layer, _BatchNorm) and layer.training for layer in block):
        return False
    return len(x) * x.shape[2] * _bytes_of_a_row(block, x) > _STRIP


def pooled_in_strips(block: Sequence[nn.Module], x: Tensor) -> Tensor:
    """`block` of `x`, layer by layer for a strip of rows, then for the next; the same numbers up to rounding.

    Args:
        block: Convolutions of stride 1 that keep height and width, and functions of single cells; at the end pooling of
            2 x 2 cells with stride 2 that rounds sizes up.
        x: (B, channels, H, W).

    Returns:
        (B, channels', ceil(H / 2), ceil(W / 2)), channels last in memory.
    """
    *layers, pool = block
    batch, height = len(x), x.shape[2]
    beyond = sum(layer.kernel_size[0] // 2 for layer in _convolutions(layers))  # rows that a strip's border needs
    result: Tensor | None = None
    for first, last in _strips(height, _STRIP // _bytes_of_a_row(block, x) - 2 * beyond):
        start, end = max(0, first - beyond), min(height, last + beyond)
        for image in range(batch):
            rows = x[image : image + 1, :, start:end]
            for layer in layers:
                rows = layer(rows)
            # Rows next to a cut saw zeros instead of their neighbours: `beyond` of them, which are not used.
            pooled = pool(rows[:, :, first - start : last - start])
            if result is None:
                size = batch, pooled.shape[1], -(-height // 2), pooled.shape[3]
                result = torch.empty(size, dtype=pooled.dtype, memory_format=torch.channels_last)
            result[image, :, first // 2 : -(-last // 2)] = pooled[0]
    assert result is not None
    return result


def _convolutions(block: Sequence[nn.Module]) -> list[nn.Conv2d]:
    return [layer for layer in block if isinstance(layer, nn.Conv2d)]


def _bytes_of_a_row(block: Sequence[nn.Module], x: Tensor) -> int:
    """Of the largest map of one image."""
    return max(layer.out_channels for layer in _convolutions(block)) * x.shape[3] * cpu_dtype(x).itemsize


def _strips(height: int, most: int) -> Iterator[tuple[int, int]]:
    """First and one past the last row of strips of about the same even number of rows, up to `most` where that is 16
    or more."""
    number = -(-height // max(most, 16))
    rows = -(-height // number)
    rows += rows % 2
    for first in range(0, height, rows):
        yield first, min(height, first + rows)
