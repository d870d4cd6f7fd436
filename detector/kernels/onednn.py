"""What oneDNN does better than what PyTorch calls for the same layers on CPUs.

Where no gradient is needed, in evaluation and in frozen stages, it applies ReLU in the same pass: by itself that reads
and writes every activation once more, in VGG16 at 600 x 800 pixels 13 times, up to 123 MB each. And PyTorch gives
float32 matrix products to MKL, which takes up to 1.6 times as long on AMD processors (VGG16's fc6 for 128 RoIs). oneDNN
also adds a float32 bias to a bfloat16 convolution, which PyTorch's own function refuses.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detector.kernels.cpu_paths import cpu_paths
from detector.kernels.processor import cpu_bfloat16
from detector.kernels.winograd import WinogradConvolution, fits_winograd, winograd


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, computed by `conv2d`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            result: Tensor = super()._conv_forward(input, weight, bias)
            return result
        return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class ConvReLU2d(Conv2d):
    """`relu(conv(x))`; tensor names are those of `nn.Conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')."""
        plain = isinstance(self.padding, str) or self.padding_mode != "zeros"
        if plain or not _in_one_pass(x, self.weight, self.bias):
            return F.relu(super().forward(x), inplace=True)
        fits = _fits_winograd(x, self.weight, self.stride, self.padding, self.dilation, self.groups)
        if fits and cpu_paths().winograd_for(x, self.weight, trained=False):
            return winograd(x, self.weight, self.bias, relu=True)
        tensors = _autocast(x, self.weight, self.bias)
        sizes = [list(pair) for pair in (self.padding, self.stride, self.dilation)]
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(*tensors, *sizes, self.groups, "relu", [], "")
        return result


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`F.conv2d`; on CPUs in float32 3 x 3 convolutions by Winograd's algorithm where `cpu_paths` has them so."""
    if _fits_winograd(x, weight, stride, padding, dilation, groups):
        paths, trained = cpu_paths(), _trained(x, weight, bias)
        forward = paths.winograd_for(x, weight, trained)
        gradients = paths.winograd_for_gradients(x, weight)
        if trained and (forward or any(gradients)):
            result: Tensor = WinogradConvolution.apply(x, weight, bias, forward, *gradients)
            return result
        if forward:
            return winograd(x, weight, bias)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def conv2d_with_constants(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`conv2d`; autocast rounds the weights and the result, but not a bias that is not trained.

    Of a folded batch norm that is the difference of two large numbers, and its error is the same at all locations: in
    MobileNetV2 rounded biases alone move the last features by 7%, rounded weights by 4%, rounded activations by 2%.
    """
    if bias is None or bias.requires_grad or not torch.is_autocast_enabled(x.device.type):
        return conv2d(x, weight, bias, stride, padding, dilation, groups)
    dtype = _dtype(x)
    if dtype == torch.bfloat16 and not isinstance(padding, str):
        return torch.mkldnn_convolution(x.to(dtype), weight.to(dtype), bias, padding, stride, dilation, groups)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups).add_(bias[:, None, None])


def linear_relu(layer: nn.Linear, x: Tensor) -> Tensor:
    """`relu(layer(x))` of `x` (R, in)."""
    if not _in_one_pass(x, layer.weight, layer.bias):
        if _dtype(x) == torch.float32 and cpu_paths().one_pass:
            return F.relu(_Linear.apply(x, layer.weight, layer.bias))
        return F.relu(layer(x))
    result: Tensor = torch.ops.mkldnn._linear_pointwise(*_autocast(x, layer.weight, layer.bias), "relu", [], "")
    return result


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias` in float32, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _Linear.apply(gradient, weight.t(), None) if of_x else None,
            _Linear.apply(gradient.t(), x.t(), None) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def _in_one_pass(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's functions with ReLU may be called, which have no gradients."""
    return not _trained(x, weight, bias) and _dtype(x) is not None and cpu_paths().one_pass


def _trained(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of them may be asked for."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _fits_winograd(x: Tensor, weight: Tensor, *geometry: Any) -> bool:
    """Whether Winograd's algorithm computes the convolution of `x`, and may be called."""
    return _dtype(x) == torch.float32 == weight.dtype and x.dim() == 4 and fits_winograd(weight, *geometry)


def _dtype(x: Tensor) -> torch.dtype | None:
    """In which type oneDNN's own functions compute a layer of `x`; None where they may not be called: it is not their
    device or type, or a compiler looks, which sees through other functions."""
    if not runs_by_itself_on_cpu(x):
        return None
    if not (torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)):
        return None
    dtype = cpu_dtype(x)
    return dtype if dtype == torch.float32 or (dtype == torch.bfloat16 and bfloat16_runs()) else None


def runs_by_itself_on_cpu(x: Tensor) -> bool:
    """Whether layers of `x` run on the CPU as they are called, not seen by what makes one graph for all sizes."""
    return x.device.type == "cpu" and x.numel() > 0 and not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def cpu_dtype(x: Tensor) -> torch.dtype:
    """The type in which convolutions and linear layers of `x` compute on CPUs, under autocast or without."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def bfloat16_runs() -> bool:
    """Whether oneDNN computes bfloat16 on this processor by instructions for it."""
    return cpu_bfloat16() is not None and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    if not torch.is_autocast_enabled("cpu"):
        return list(tensors)
    dtype = torch.get_autocast_dtype("cpu")
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]
