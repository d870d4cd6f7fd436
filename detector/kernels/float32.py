"""Layers that bfloat16 makes hardly faster on CPUs, and less exact, evaluate in float32."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")


def evaluate_in_float32(module: nn.Module, x: Tensor, run: Callable[[Tensor], Result]) -> Result:
    """`run(x)`, in float32 under autocast too where `module` evaluates on a CPU.

    For depthwise networks and narrow layers, which gain little without gradients: errors of bfloat16 change which
    proposals survive, and with them the AP of a small set by more than half a point.
    """
    if module.training or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return run(x)
    with torch.autocast("cpu", enabled=False):
        return run(x.float())
