"""Norms: frozen batch norm, and those of the other kinds that a layer may have."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detector.errors import InputError
from detector.kernels.kept import Kept

Norm = Literal["batch", "group", "sync"]
GROUPS = 32
"""Of group norm (Wu and He 2018), where they divide the channels: else as many as do."""


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants: buffers, the same in training and evaluation.

    (B, C, H, W) -> (B, C, H, W). Tensor names are those of `nn.BatchNorm2d`, so its weights load.

    Attributes:
        folded: The convolution before it applies it, and inputs are passed on.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.folded = False
        self._scale_and_shift = Kept[tuple[Tensor, Tensor]]()
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the norm, unless the convolution before it does."""
        if self.folded:
            return x
        scale, shift = self.scale_and_shift()
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the scale (C,) and shift (C,) with which the norm is x * scale + shift."""
        return self._scale_and_shift(self._make, self.constants())

    def constants(self) -> tuple[Tensor, ...]:
        """Return the tensors that they are made of."""
        return self.weight, self.bias, self.running_mean, self.running_var

    def _make(self) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def extra_repr(self) -> str:
        """Return what is printed of it."""
        return f"{len(self.weight)}, eps={self.eps}"


def new_norm(kind: Norm | Literal["frozen"], channels: int, eps: float = 1e-5) -> nn.Module:
    """Return a norm over channels: frozen or trained batch norm, group norm, or batch norm over all processes' images.

    All but group norm have tensors of the same names.
    """
    if kind == "frozen":
        return FrozenBatchNorm2d(channels, eps)
    if kind == "group":
        return nn.GroupNorm(math.gcd(GROUPS, channels), channels, eps)
    return synchronised(nn.SyncBatchNorm(channels, eps)) if kind == "sync" else nn.BatchNorm2d(channels, eps)


def synchronised(network: nn.Module) -> nn.Module:
    """Let synchronised batch norms say what they need, in one line; one process alone needs nothing."""
    for module in network.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.register_forward_pre_hook(_check_processes)
    return network


def _check_processes(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise InputError where several processes without GPUs would have to share their statistics."""
    if (
        norm.training
        and not inputs[0].is_cuda
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
    ):
        raise InputError("backbone.norm, fpn_norm or box_head_norm sync: needs a GPU for each process; give batch")
