"""Non-maximum suppression of many groups of boxes at once, for GPUs.

torchvision's operator goes through the boxes of a GPU one after the other: 0.12 us for each of 2,000 boxes, 0.5 us for
each of 8,900, one call per image (torchvision 0.26, NVIDIA H200). Here all groups go side by side.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import batched_nms, nms

from detector.kernels.transfers import one_by_one, part_of_rows, true_indices

LARGEST: Final = 4096
"""Boxes of a group up to which the table of all pairs pays."""
_PAIRS: Final = 2**26
"""Pairs whose overlaps are computed together; each takes 4 bytes, about three times."""
_AT_ONCE: Final = 2**14
"""Boxes of several images that go through one call of torchvision's operator."""
_FEW: Final = 2**12
"""Boxes of all groups up to which one call of torchvision's operator takes less time than asking for the rounds."""
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


def nms_of_levels(
    boxes: Tensor, scores: Tensor, numbers: Sequence[int], usable: Tensor, iou: float, extent: float, limit: int
) -> tuple[list[Tensor], list[int]]:
    """Return the best `limit` boxes of each image that NMS within each of its levels leaves, by index, the best first.

    Args:
        boxes: (B, K, 4) of each image, level by level and of each level by descending score, at coordinates from 0 to
            `extent`.
        scores: (B, K).
        numbers: How many of the K each level has.
        usable: (B, K); others neither are kept nor suppress.
        iou: A box is dropped if it overlaps a better one of its level by more than this.
        extent: Largest coordinate.
        limit: Upper limit for an image.

    Returns:
        The indices (P,) of each image, and how many of its boxes are usable.
    """
    if one_by_one(boxes):
        candidates, levels = true_indices(list(usable)), part_of_rows(numbers, boxes.device)
        images = zip(candidates, boxes, scores, strict=True)
        kept = [of[batched_nms(own[of], score[of], levels[of], iou)[:limit]] for of, own, score in images]
        return kept, [len(of) for of in candidates]
    if usable.numel() <= _FEW and len(boxes) == 1:
        return _of_one_image(boxes[0], scores[0], numbers, usable[0], iou, extent + 1, limit)
    if usable.numel() <= _FEW:
        mask = _of_few(boxes, scores, part_of_rows(numbers, boxes.device), usable, iou, extent + 1)
    else:
        most, (of_boxes, of_usable) = max(numbers), (part.split(list(numbers), dim=1) for part in (boxes, usable))
        groups = [pad(own, (0, 0, 0, most - own.shape[1])) if own.shape[1] < most else own for own in of_boxes]
        masks = [pad(own, (0, most - own.shape[1])) if own.shape[1] < most else own for own in of_usable]
        keeps = nms_in_groups(torch.cat(groups), torch.cat(masks), iou).split(len(boxes))  # level by level
        mask = torch.cat([keep[:, :number] for keep, number in zip(keeps, numbers, strict=True)], dim=1)
    best = scores.masked_fill(~mask, -torch.inf).topk(min(limit, scores.shape[1]), dim=1).indices
    counts = torch.stack((mask.sum(dim=1), usable.sum(dim=1))).cpu().tolist()
    return [own[:count] for own, count in zip(best, counts[0], strict=True)], counts[1]


def _of_one_image(
    boxes: Tensor, scores: Tensor, numbers: Sequence[int], usable: Tensor, iou: float, apart: float, limit: int
) -> tuple[list[Tensor], list[int]]:
    """Return `nms_of_levels` of boxes (K, 4), by one call: levels lie from left to right."""
    unusable = ~usable
    if len(numbers) > 1:
        boxes = boxes + (part_of_rows(numbers, boxes.device) * apart)[:, None]
    # Points beside all others overlap nothing: they are kept, and come last.
    boxes, scores = boxes.masked_fill(unusable[:, None], -apart), scores.masked_fill(unusable, -torch.inf)
    kept, last = nms(boxes, scores, iou), int(unusable.sum())
    return [kept[: len(kept) - last][:limit]], [len(usable) - last]


def _of_few(boxes: Tensor, scores: Tensor, levels: Tensor, usable: Tensor, iou: float, apart: float) -> Tensor:
    """Return the mask (B, K) of what is kept, by one call: levels lie from left to right, images from top to bottom."""
    images = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(scores)
    boxes = boxes + (torch.stack((levels.expand_as(images), images), dim=2) * apart).repeat(1, 1, 2)
    boxes = boxes.masked_fill(~usable[..., None], -apart)  # points beside all others, which overlap nothing
    kept = nms(boxes.flatten(0, 1), scores.flatten(), iou)
    return torch.zeros_like(usable.flatten()).index_fill_(0, kept, True).view_as(usable) & usable


def nms_of_classes(
    boxes: Tensor, scores: Tensor, labels: Tensor, counts: Sequence[int], iou: float, extent: float, limit: int
) -> list[Tensor]:
    """Return the rows that NMS within each class of each image leaves, at most `limit` of an image, the best first.

    On a GPU many images go through one NMS, where they lie beside one another: classes from left to right, images from
    top to bottom.

    Args:
        boxes: (R, 4), of all images one after another, at coordinates from 0 to `extent`.
        scores: (R,).
        labels: (R,).
        counts: How many of the rows each image has.
        iou: A box is dropped if it overlaps a better one of its class by more than this.
        extent: Largest coordinate.
        limit: Upper limit for an image.
    """
    starts = list(accumulate(counts, initial=0))
    if one_by_one(boxes):
        images = zip(*(part.split(list(counts)) for part in (boxes, scores, labels)), starts, strict=False)
        return [batched_nms(own, score, label, iou)[:limit] + start for own, score, label, start in images]
    kept, first = list[Tensor](), 0
    while first < len(counts):
        last = first + 1
        while last < len(counts) and starts[last + 1] - starts[first] <= _AT_ONCE:
            last += 1
        rows = slice(starts[first], starts[last])
        image = part_of_rows(counts[first:last], boxes.device)
        apart = boxes[rows] + (torch.stack((labels[rows], image), dim=1) * (extent + 1)).repeat(1, 2)
        kept += _of_images(nms(apart, scores[rows], iou), image, last - first, starts[first], limit)
        first = last
    return kept


def _of_images(keep: Tensor, image: Tensor, images: int, start: int, limit: int) -> list[Tensor]:
    """Return the rows `keep`, counted from `start` on, of each image, at most `limit` of each."""
    keep = keep + start if start else keep
    if images == 1:
        return [keep[:limit]]
    of_kept = image[keep - start if start else keep]
    counts = (of_kept == torch.arange(images, device=keep.device)[:, None]).sum(dim=1).cpu().tolist()
    image_by_image = keep[of_kept.argsort(stable=True)]
    return [
        image_by_image[first : first + min(n, limit)]
        for first, n in zip(accumulate([0, *counts]), counts, strict=False)
    ]
