"""PyTorch's convolutions and fully connected layers, computed as suits the processor and the precision.

PyTorch gives float32 matrix products to MKL, which takes up to 1.6 times as long as oneDNN on AMD processors (VGG16's
fc6 for 128 RoIs). oneDNN also adds a float32 bias to a bfloat16 convolution, which PyTorch's own function refuses.
`detector.kernels.precision` puts these layers into networks.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.backbones.batch_norm import FrozenBatchNorm2d
from detector.kernels.cpu_paths import computes_now, cpu_dtype, cpu_kernels
from detector.kernels.kept import Kept, being_compiled, keeps_weights
from detector.kernels.processor import cpu_bfloat16
from detector.kernels.winograd import WinogradConvolution, winograd, winograd_passes


class _KeepsWeights(nn.Module):
    """A layer that keeps its weights as it computes with them where none is trained; training forgets them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._kept = Kept[tuple[Tensor, Tensor | None]]()

    def train(self, mode: bool = True) -> Self:
        """Set the mode."""
        if mode:
            self._kept.clear()
        return super().train(mode)


class Conv2d(_KeepsWeights, nn.Conv2d):
    """A convolution that can apply the frozen batch norm after it and keep out of autocast.

    On CPUs in float32 large 3 x 3 ones are computed by Winograd's algorithm, where `winograd_passes` has them so.

    Attributes:
        norm: The norm that it applies, in a tuple: it is no submodule of the convolution too.
        float32: It computes in float32 under autocast, too.
        float32_in_evaluation: It does so on CPUs of float32 inputs while this network, in a tuple, is in evaluation.
    """

    norm: tuple[FrozenBatchNorm2d, ...] = ()
    float32 = False
    float32_in_evaluation: tuple[nn.Module, ...] = ()

    @property
    def depthwise(self) -> bool:
        """Return whether each channel is convolved by itself."""
        return self.groups == self.in_channels > 1

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, (B, in, H, W) -> (B, out, H', W')."""
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        if autocast and (self.float32 or (kind == "cpu" and self._float32_on_cpus(x))):
            with torch.autocast(kind, enabled=False):
                return self._conv_forward(x.float(), *self._weights(x, None))
        weight, bias = self._weights(x, torch.get_autocast_dtype(kind) if autocast else None)
        if autocast and self.norm and not (bias is None or bias.requires_grad):
            return self._with_exact_bias(x, weight, bias)
        return self._conv_forward(x, weight, bias)

    def _weights(self, x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias with the norm in them, as they are trained, or as they are kept of that type."""
        if not ((self.norm or dtype) and keeps_weights(x, self.weight, self.bias)):
            return self.folded(dtype if x.device.type == "cuda" and not being_compiled() else None)
        constants = (constant for norm in self.norm for constant in norm.constants())

        def cast() -> tuple[Tensor, Tensor | None]:
            weight, bias = self.folded()
            # A norm's shift stays exact: see `_with_exact_bias`.
            return weight.to(dtype or weight.dtype), bias if self.norm or bias is None else bias.to(dtype)

        return self._kept(cast, [*self.parameters(), *constants], dtype)

    def folded(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """Return weight, of a norm also of that type, and bias with the norm in them."""
        weight, bias = self.weight, self.bias
        for norm in self.norm:
            scale, shift = norm.scale_and_shift()
            scales = scale[:, None, None, None]
            weight = weight * scales if dtype is None else _Scaled.apply(weight, scales, dtype)
            bias = shift if bias is None else bias * scale + shift
        return weight, bias

    def _float32_on_cpus(self, x: Tensor) -> bool:
        """Return whether autocast is left on CPUs.

        Always by depthwise convolutions with a stride: oneDNN has no bfloat16 gradient for these, and its fallback
        takes 30 times as long as float32 (torch 2.15).
        """
        if self.depthwise and self.stride != (1, 1):
            return True
        return x.dtype == torch.float32 and any(not network.training for network in self.float32_in_evaluation)

    def _with_exact_bias(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the convolution under autocast, which rounds weights and result, but not a bias that is not trained.

        Of a folded norm that is the difference of two large numbers, and its error is the same at all locations: in
        MobileNetV2 rounded biases alone move the last features by 7%, rounded weights by 4%, rounded activations by 2%.
        """
        dtype, padding = torch.get_autocast_dtype(x.device.type), self.padding
        if dtype == torch.bfloat16 and not isinstance(padding, str) and computes_now(x) and computes_bfloat16():
            geometry = padding, self.stride, self.dilation, self.groups
            return torch.mkldnn_convolution(x.to(dtype), weight.to(dtype), bias, *geometry)
        return self._conv_forward(x, weight, None).add_(bias[:, None, None])

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        if self.padding_mode == "zeros" and _onednn_in_float32(input, weight):
            tensors = (input, weight, bias)
            trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
            passes = winograd_passes(input, weight, geometry, trained)
            if trained and any(passes):
                result: Tensor = WinogradConvolution.apply(*tensors, *passes)
                return result
            if passes.forward:
                return winograd(input, weight, bias)
        convolved: Tensor = super()._conv_forward(input, weight, bias)
        return convolved


class _Scaled(torch.autograd.Function):
    """`(weight * scales).to(dtype)` in one operation instead of two, and its gradient; the scales are not trained."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scales)
        return torch.mul(weight, scales, out=torch.empty_like(weight, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (scales,) = ctx.saved_tensors
        return gradient * scales, None, None


class Linear(_KeepsWeights, nn.Linear):
    """A fully connected layer, of vectors (..., in), which oneDNN computes in float32 on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, (..., in) -> (..., out)."""
        if _onednn_in_float32(x, self.weight):
            vectors: Tensor = _LinearByOneDNN.apply(x.flatten(0, -2), self.weight, self.bias)
            result: Tensor = vectors.unflatten(0, x.shape[:-1])
            return result
        if torch.is_autocast_enabled(x.device.type) and keeps_weights(x, self.weight, self.bias):
            dtype, tensors = torch.get_autocast_dtype(x.device.type), list(self.parameters())
            return F.linear(x, *self._kept(lambda: (self.weight.to(dtype), self.bias), tensors, dtype))
        return super().forward(x)


class _LinearByOneDNN(torch.autograd.Function):
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
            _LinearByOneDNN.apply(gradient, weight.t(), None) if of_x else None,
            _LinearByOneDNN.apply(gradient.t(), x.t(), None) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def _onednn_in_float32(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN's own functions compute a layer of `x`, in float32."""
    return computes_now(x) and cpu_kernels() != "plain" and cpu_dtype(x) == torch.float32 == weight.dtype


def computes_bfloat16() -> bool:
    """Return whether oneDNN computes bfloat16 on this processor by instructions for it."""
    return cpu_bfloat16() is not None and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
