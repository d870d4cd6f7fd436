"""Frozen batch norm."""

import torch
from torch import Tensor, nn

from detector.kernels.kept import Kept


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
