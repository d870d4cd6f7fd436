"""Images with boxes as a torch Dataset, whatever format they were read from.

Shape legend: `G` objects of an image, `H`, `W` its size in pixels, in the frame that its boxes refer to (see
`image_reading`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import albumentations as A
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.augmentations import augment
from datamodules.image_reading import read_image


class Target(TypedDict):
    """Ground truth of one image: `boxes` float32 (G, 4) xyxy pixels, `labels` int64 (G,) in 1..C, `difficult` bool
    (G,), `image_id` int64 0-d (position in the dataset), `file_name` of the image."""

    boxes: Tensor
    labels: Tensor
    difficult: Tensor
    image_id: Tensor
    file_name: str


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image and its objects, as a format's reader gives them to `DetectionDataset`.

    Args:
        path: the image file.
        name: what results call the image.
        boxes: float32 (G, 4) xyxy pixels, clipped to the image, of positive area.
        labels: int64 (G,) in 1..C.
        difficult: bool (G,).
        upright: apply the EXIF orientation; without it the boxes refer to the stored pixels.
    """

    path: Path
    name: str
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]
    upright: bool = False


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images with boxes; images are decoded on access.

    A sample's augmentation is a pure function of (seed, epoch, index): it depends on neither workers, ranks nor where a
    run was resumed.

    Args:
        records: the images, in order.
        class_names: names of the classes; the label of class i is i + 1.
        augmentation: from `build_augmentation`; None leaves images alone.
        seed: seed of the augmentation.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        class_names: Sequence[str],
        augmentation: A.Compose | None = None,
        seed: int = 0,
    ) -> None:
        self.class_names = list(class_names)
        self.augmentation = augmentation
        self.seed = seed
        self._paths = [record.path for record in records]
        # Flat arrays instead of one object per image: forked workers then share the memory.
        self._starts = np.cumsum([0, *(len(record.boxes) for record in records)])
        self._boxes = np.concatenate([np.zeros((0, 4), np.float32), *(record.boxes for record in records)])
        self._labels = np.concatenate([np.zeros(0, np.int64), *(record.labels for record in records)])
        self._difficult = np.concatenate([np.zeros(0, np.bool_), *(record.difficult for record in records)])
        self._upright = np.array([record.upright for record in records], dtype=np.bool_)
        self.file_names: list[str] = [record.name for record in records]

    def __len__(self) -> int:
        return len(self._paths)

    def image_path(self, index: int) -> Path:
        """Path of an image file."""
        return self._paths[index]

    def target(self, index: int) -> Target:
        """The ground truth of an image, boxes clipped to it, without augmentation and without decoding the image."""
        objects = slice(self._starts[index], self._starts[index + 1])
        return self._target(index, self._boxes[objects], self._labels[objects], self._difficult[objects])

    def _target(
        self, index: int, boxes: NDArray[np.float32], labels: NDArray[np.int64], difficult: NDArray[np.bool_]
    ) -> Target:
        return Target(
            boxes=torch.from_numpy(boxes.copy()),
            labels=torch.from_numpy(labels.copy()),
            difficult=torch.from_numpy(difficult.copy()),
            image_id=torch.tensor(index, dtype=torch.int64),
            file_name=self.file_names[index],
        )

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        """One sample.

        Args:
            key: (epoch, index), or an index alone for epoch 0.

        Returns:
            image uint8 (3, H, W) RGB, and its target.

        Raises:
            InputError: if the image cannot be decoded.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]  # IndexError beyond the end; counts negative ones from it
        objects = slice(self._starts[index], self._starts[index + 1])
        boxes, labels, difficult = self._boxes[objects], self._labels[objects], self._difficult[objects]
        image = read_image(self._paths[index], bool(self._upright[index]))
        if self.augmentation is not None:
            image, boxes, kept = augment(
                self.augmentation, image, boxes, np.random.SeedSequence([self.seed, epoch, index])
            )
            labels, difficult = labels[kept], difficult[kept]
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return pixels, self._target(index, boxes, labels, difficult)
