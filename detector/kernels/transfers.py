"""What passes between the program and the device that computes, with as few waits as possible.

A GPU works behind the program, which must wait for it to learn a number, or to copy one there in the usual way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers as a tensor (n,) of the type of `like`, on its device.

    Its `new_tensor` does the same, but a GPU would be waited for.
    """
    return send(torch.tensor(values, dtype=like.dtype), like.device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device, without waiting for what a GPU still computes.

    Its memory may be freed at once: CUDA has read it before it returns. Others give no such promise, and are waited
    for.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def true_indices(masks: Sequence[Tensor]) -> list[Tensor]:
    """Return the ascending indices of the true elements of each mask (n,), asking for their numbers once for all masks.

    The masks, whose lengths may differ, are on one device.
    """
    if _on_cpu(masks):
        return [torch.where(mask)[0] for mask in masks]
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    return [
        mask.byte().argsort(stable=True, descending=True)[:count] for mask, count in zip(masks, counts, strict=True)
    ]


def _on_cpu(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)
