"""A box loss: the wing loss, which is steep near zero, where the small mistakes of a detector are."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from detector.losses import BoxLoss


@dataclass
class Wing(BoxLoss):
    """Logarithmic up to an error of omega, linear from there on (Feng et al. 2018, equation 5).

    Args:
        omega: Where it turns, in deltas.
        epsilon: The smaller, the steeper near zero.
    """

    omega: float = 1.0
    epsilon: float = 0.5

    def __call__(self, pred_deltas: Tensor, deltas: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the losses (P, 4) of predictions (P, 4) and their targets."""
        error = (pred_deltas.float() - deltas).abs()
        offset = self.omega * (1 - math.log1p(self.omega / self.epsilon))
        return torch.where(error < self.omega, self.omega * torch.log1p(error / self.epsilon), error - offset)
