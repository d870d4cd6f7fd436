"""The precision and the functions in which the layers of a built network compute: what its processor does well.

Networks are written with PyTorch's own layers and know nothing of this. Installed are:

- Convolutions and fully connected layers of `detector.kernels.onednn`, with the same tensors under the same names.
- Frozen batch norms within the convolution before them. With constant statistics and affine parameters, `norm(conv(x,
  w)) = conv(x, w * scale) + shift` with one scale and shift per output channel, without a pass over the activations.
  The weights themselves stay as they are (and are trained as they are): the product is made in every pass.
- Float32 under autocast where bfloat16 is hardly faster on CPUs: depthwise bodies and narrow RPN heads in evaluation
  (its errors change which proposals survive, and with them the AP of a small set by more than half a point).
- Float32 under autocast up to the last ill-conditioned frozen norm, which magnifies the errors of the layers before it.
  The pretrained MobileNetV2 has one such norm, the fourth, with 1,556 standard deviations; its others have at most 8.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from detector.backbones.base import Backbone
from detector.backbones.batch_norm import FrozenBatchNorm2d
from detector.kernels.onednn import Conv2d, Linear

_NARROW = 128
"""Channels up to which the RPN's 3 x 3 convolutions take too little time for bfloat16 to save any of the detector's."""
_MOST_DEVIATIONS = 64
"""Of a mean from 0: of more, bfloat16, whose numbers are up to 1/128 apart, leaves little of what varies."""


def install_kernels(backbone: Backbone, rpn_head: nn.Module, *box_heads: nn.Module) -> None:
    """Replace the layers of a detector's networks by those that compute the same well; tensor names do not change."""
    for network in (backbone, rpn_head, *box_heads):
        replace_layers(network)
    body = _convolutions(backbone.body)
    if any(conv.depthwise for conv in body):
        for conv in body:
            conv.float32_in_evaluation = (backbone.body,)
    for conv in _convolutions(rpn_head):
        if max(conv.in_channels, conv.out_channels) <= _NARROW:
            conv.float32_in_evaluation = (rpn_head,)
    _keep_precision(backbone)
    backbone.register_load_state_dict_post_hook(_keep_precision)  # type: ignore[no-untyped-call]


def replace_layers(network: nn.Module) -> None:
    """Replace PyTorch's convolutions and fully connected layers, and fold frozen batch norms into convolutions.

    A norm follows its convolution in a Sequential, or is the `bn1` right after a `conv1`, and so on, of other modules.
    """
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) in (nn.Conv2d, nn.Linear):
                setattr(parent, name, _replacement(layer))
        for (_, conv), (name, norm) in pairwise(parent.named_children()):
            follows = isinstance(parent, nn.Sequential) or name.startswith("bn")
            if follows and isinstance(conv, Conv2d) and isinstance(norm, FrozenBatchNorm2d):
                conv.norm = (norm,)
                norm.folded = True


def _replacement(layer: nn.Module) -> nn.Module:
    """Return a layer with the tensors of a convolution or fully connected layer."""
    new: Conv2d | Linear
    with torch.device("meta"):  # draws no random numbers
        if isinstance(layer, nn.Linear):
            new = Linear(layer.in_features, layer.out_features, layer.bias is not None)
        else:
            assert isinstance(layer, nn.Conv2d)
            names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
            options: dict[str, Any] = {name: getattr(layer, name) for name in names}
            new = Conv2d(layer.in_channels, layer.out_channels, bias=layer.bias is not None, **options)
    new.weight, new.bias = layer.weight, layer.bias
    return new.train(layer.training)


def _convolutions(network: nn.Module) -> list[Conv2d]:
    return [module for module in network.modules() if isinstance(module, Conv2d)]


def _keep_precision(backbone: nn.Module, _: object = None) -> None:
    """Choose anew, of new weights, the convolutions that compute in float32 under autocast."""
    folded = [conv for conv in _convolutions(backbone) if conv.norm]
    last = max((place for place, conv in enumerate(folded) if _is_ill_conditioned(conv.norm[0])), default=-1)
    for place, conv in enumerate(folded):
        conv.float32 = place <= last


def _is_ill_conditioned(norm: FrozenBatchNorm2d) -> bool:
    """Return whether a channel's mean is more than `_MOST_DEVIATIONS` standard deviations from 0."""
    deviations = norm.running_mean.abs() * (norm.running_var + norm.eps).rsqrt()
    return not deviations.is_meta and bool((deviations > _MOST_DEVIATIONS).any())
