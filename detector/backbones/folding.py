"""Frozen batch norm folded into the convolution before it: the same function, without a pass over the activations.

With constant statistics and affine parameters, `norm(conv(x, w)) = conv(x, w * scale) + shift` with one scale and shift
per output channel. The weights themselves stay as they are (and are trained as they are): the product is made in every
pass.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detector.backbones.base import FrozenBatchNorm2d
from detector.backbones.onednn import conv2d_with_constants


class FoldedConv2d(nn.Conv2d):
    """A convolution that applies the frozen batch norm after it; that module then passes its input on.

    Under autocast it runs in float32 where the norm asks for it, and on CPUs if it is depthwise and has a stride:
    oneDNN has no bfloat16 gradient for these, and its fallback takes 30 times as long as float32 (torch 2.15).
    """

    _norm: tuple[FrozenBatchNorm2d, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')."""
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
