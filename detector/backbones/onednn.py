"""What oneDNN does in one pass over the activations where no gradient is needed: in evaluation and in frozen stages.

ReLU by itself reads and writes every activation once more: in VGG16 at 600 x 800 pixels 13 times, up to 123 MB each.
And PyTorch gives float32 matrix products to MKL, which takes a sixth more time than oneDNN on AMD processors.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvReLU2d(nn.Conv2d):
    """`relu(conv(x))`; tensor names are those of `nn.Conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')."""
        if not _in_one_pass(x, self.weight):
            return F.relu(super().forward(x), inplace=True)
        tensors = _autocast(x, self.weight, self.bias)
        sizes = [list(pair) for pair in (self.padding, self.stride, self.dilation)]
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(*tensors, *sizes, self.groups, "relu", [], "")
        return result


def linear_relu(layer: nn.Linear, x: Tensor) -> Tensor:
    """`relu(layer(x))` of `x` (R, in)."""
    if not _in_one_pass(x, layer.weight):
        return F.relu(layer(x))
    result: Tensor = torch.ops.mkldnn._linear_pointwise(*_autocast(x, layer.weight, layer.bias), "relu", [], "")
    return result


def _in_one_pass(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's own functions may be called: they have no gradients, and compilers see through other ones."""
    if x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if not (torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bfloat16_runs())


def bfloat16_runs() -> bool:
    """Whether oneDNN takes bfloat16 on this processor (AVX-512 on x86)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    if not torch.is_autocast_enabled("cpu"):
        return list(tensors)
    dtype = torch.get_autocast_dtype("cpu")
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]
