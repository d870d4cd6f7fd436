"""Frozen batch norm, and its folding into the convolution before it: the same without a pass over the activations.

With constant statistics and affine parameters, `norm(conv(x, w)) = conv(x, w * scale) + shift` with one scale and shift
per output channel. The weights themselves stay as they are (and are trained as they are): the product is made in every
pass.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detector.kernels.onednn import conv2d_with_constants

_MOST_DEVIATIONS = 64


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants: buffers, the same in training and evaluation.

    (B, C, H, W) -> (B, C, H, W). Tensor names are those of `nn.BatchNorm2d`, so its weights load.

    Attributes:
        folded: The convolution before it applies it (see `fold_frozen_norms`); inputs are passed on.
        float32: That convolution computes in float32 under autocast, too (see `Backbone.settle_precision`).
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.folded = False
        self.float32 = False
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        if self.folded:
            return x
        scale, shift = self.scale_and_shift()
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the norm as x * scale + shift, each (C,)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def is_ill_conditioned(self) -> bool:
        """Return whether a channel's mean is too many standard deviations from 0 for bfloat16.

        Its numbers are up to 1/128 apart, which would leave little of what varies.
        """
        deviations = self.running_mean.abs() * (self.running_var + self.eps).rsqrt()
        return not deviations.is_meta and bool((deviations > _MOST_DEVIATIONS).any())

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class FoldedConv2d(nn.Conv2d):
    """A convolution that applies the frozen batch norm after it; that module then passes its input on.

    Under autocast it runs in float32 where the norm asks for it, and on CPUs if it is depthwise and has a stride:
    oneDNN has no bfloat16 gradient for these, and its fallback takes 30 times as long as float32 (torch 2.15).
    """

    _norm: tuple[FrozenBatchNorm2d, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution and the norm, (B, in, H, W) -> (B, out, H', W')."""
        weight, bias = self.weight, self.bias
        if self._norm:
            scale, shift = self._norm[0].scale_and_shift()
            weight = weight * scale[:, None, None, None]
            bias = shift if bias is None else bias * scale + shift
        kind = x.device.type
        strided_depthwise = kind == "cpu" and self.groups == self.in_channels and self.stride != (1, 1)
        if (strided_depthwise or (self._norm and self._norm[0].float32)) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return F.conv2d(x.float(), weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return conv2d_with_constants(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def fold_frozen_norms(network: nn.Module) -> None:
    """Fold every frozen batch norm of a torchvision network into its convolution; tensor names do not change.

    Pairs are neighbours in a Sequential, and `conv1`, `bn1` and so on in residual blocks.
    """
    for module in list(network.modules()):
        for parent, name, norm in list(_pairs(module)):
            conv = getattr(parent, name)
            conv.__class__ = FoldedConv2d  # keeps weights, names and all attributes
            if isinstance(norm, FrozenBatchNorm2d):
                conv._norm = (norm,)  # in a tuple: not a submodule of the convolution too
                norm.folded = True


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    children = dict(module.named_children())
    if isinstance(module, nn.Sequential):
        names = list(children)
        neighbours = list(pairwise(names))
    else:
        neighbours = [(name, name.replace("conv", "bn")) for name in children if name.startswith("conv")]
    for conv, norm in neighbours:
        if isinstance(children[conv], nn.Conv2d) and isinstance(children.get(norm), FrozenBatchNorm2d | nn.BatchNorm2d):
            yield module, conv, children[norm]
