"""Samples -> a batch, and its way from a worker process to training.

Images differ in size, so a batch is a pair of lists. Sent as it is, each tensor of it would travel through a shared
memory file of its own, five of them for every image; packed, a batch needs one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from datamodules.detection_dataset import Target

Samples = list[tuple[Tensor, Target]]
Batch = tuple[list[Tensor], list[Target]]


def collate(samples: Samples) -> Batch:
    """Make lists of images, uint8 (3, H, W), and targets; in a worker, something that arrives as such a batch."""
    batch = [image for image, _ in samples], [target for _, target in samples]
    return batch if get_worker_info() is None else _Packed(batch)  # type: ignore[return-value]


class _Packed:
    """A batch that is pickled as one shared tensor and one array of each kind, and unpickled as a batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        images, targets = self.batch
        # Made in shared memory, as torch's own collate does: moving a tensor there would copy it once more.
        storage = torch.UntypedStorage._new_shared(sum(image.numel() for image in images))
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)
        start = 0
        for image in images:
            flat[start : start + image.numel()].view(image.shape).copy_(image)
            start += image.numel()
        others = [
            {key: value for key, value in target.items() if key not in ("boxes", "labels", "difficult", "image_id")}
            for target in targets
        ]
        return _unpack, (
            flat,
            [tuple(image.shape) for image in images],
            [len(target["boxes"]) for target in targets],
            _join(targets, "boxes"),
            _join(targets, "labels"),
            _join(targets, "difficult"),
            [int(target["image_id"]) for target in targets],
            others,
        )


def _join(targets: list[Target], key: str) -> NDArray[Any]:
    return np.concatenate([target[key].numpy() for target in targets])  # type: ignore[literal-required]


def _unpack(
    flat: Tensor,
    shapes: list[tuple[int, ...]],
    counts: list[int],
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    difficult: NDArray[np.bool_],
    image_ids: list[int],
    others: list[dict[str, Any]],
) -> Batch:
    pixels = flat.split([int(np.prod(shape)) for shape in shapes])
    images = [part.view(shape) for part, shape in zip(pixels, shapes, strict=True)]
    columns = [torch.from_numpy(array).split(counts) for array in (boxes, labels, difficult)]
    targets = [
        cast(Target, {"boxes": box, "labels": label, "difficult": flag, "image_id": torch.tensor(image_id), **other})
        for box, label, flag, image_id, other in zip(*columns, image_ids, others, strict=True)
    ]
    return images, targets


def limit_threads(_worker: int) -> None:
    """Let a worker process compute on one thread: there are as many workers as cores are to be used."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
