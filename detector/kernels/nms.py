"""Non-maximum suppression of many groups of boxes at once, for GPUs.

torchvision's operator goes through the boxes of a GPU one after the other: 0.12 us for each of 2,000 boxes, 0.5 us for
each of 8,900, one call per image (torchvision 0.26, NVIDIA H200). Here all groups go side by side.
"""

from typing import Final

import torch
from torch import Tensor
from torchvision.ops import nms

LARGEST: Final = 4096
"""Boxes of a group up to which the table of all pairs pays."""
_PAIRS: Final = 2**26
"""Pairs whose overlaps are computed together; each takes 4 bytes, about three times."""
_ROUNDS: Final = 10
"""As many as the proposals of an image need: 3 to 9 of the 2,000 best of a level at an IoU of 0.7."""


def nms_in_groups(boxes: Tensor, usable: Tensor, iou: float) -> Tensor:
    """Return a mask (G, n) of the boxes that greedy NMS within each group keeps.

    A box is kept unless a kept one before it overlaps it by more than `iou`. Starting from all, this rule is applied
    to all boxes at once until nothing changes: then it holds, and only one mask fulfils it. The first of a chain of
    boxes, each of which suppresses the next, are right after the first round, the second after the second, and so on;
    the program waits for the device once in ten rounds.

    Args:
        boxes: (G, n, 4), each group by descending score.
        usable: (G, n); others neither are kept nor suppress.
        iou: In 0..1.
    """
    if boxes.shape[1] > LARGEST:
        return torch.stack([_by_torchvision(own, mask, iou) for own, mask in zip(boxes, usable, strict=True)])
    together = max(1, _PAIRS // boxes.shape[1] ** 2) if boxes.numel() else 1
    pairs = zip(boxes.split(together), usable.split(together), strict=True)
    return torch.cat([_at_once(own, mask, iou) for own, mask in pairs])


def _at_once(boxes: Tensor, usable: Tensor, iou: float) -> Tensor:
    # Products of ones and zeros, of which it matters only whether they are 0: half precision will do.
    dtype = torch.float32 if boxes.device.type == "cpu" else torch.float16
    suppresses = _overlaps(boxes, iou).to(dtype)
    kept = usable
    while True:
        for _ in range(_ROUNDS):
            before = kept
            kept = usable & (torch.bmm(kept[:, None].to(dtype), suppresses)[:, 0] == 0)
        if torch.equal(kept, before):
            return kept


def _overlaps(boxes: Tensor, iou: float) -> Tensor:
    """Return whether (G, n, n) of each pair the first comes before and overlaps the second by more than `iou`."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    inter = _common(x1, x2).mul_(_common(y1, y2))
    area = (x2 - x1) * (y2 - y1)
    union = (area[:, :, None] + area[:, None]).sub_(inter)
    return inter.div_(union).gt(iou).triu_(1)


def _common(low: Tensor, high: Tensor) -> Tensor:
    """Return the length (G, n, n) that each pair of intervals has in common."""
    end = torch.minimum(high[:, :, None], high[:, None])
    return end.sub_(torch.maximum(low[:, :, None], low[:, None])).clamp_(min=0)


def _by_torchvision(boxes: Tensor, usable: Tensor, iou: float) -> Tensor:
    order = torch.arange(len(boxes), 0, -1, device=boxes.device, dtype=boxes.dtype)
    found = torch.zeros_like(usable)
    # Those that are not to be used come last, as points far away, which overlap nothing.
    return found.index_fill_(0, nms(boxes.masked_fill(~usable[:, None], -1e6), order, iou), True) & usable
