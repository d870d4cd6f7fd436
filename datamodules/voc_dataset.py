"""Splits of a dataset in VOC format as a torch Dataset.

Shape legend: `G` objects of an image, `H`, `W` its size in pixels as stored (EXIF orientation is not applied: VOC boxes
refer to the stored pixels).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import albumentations as A
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg

from datamodules.augmentations import augment
from datamodules.voc_format import Annotation, clip_box, read_annotation, read_split
from datamodules.voc_splits import Split, brief, find_image, image_size
from detector.errors import InputError

ImageFile.LOAD_TRUNCATED_IMAGES = False  # half an image under whole boxes must be an error, not a training example


class Target(TypedDict):
    """Ground truth of one image: `boxes` float32 (G, 4) xyxy pixels, `labels` int64 (G,) in 1..C, `difficult` bool
    (G,), `image_id` int64 0-d (position in the dataset), `file_name` of the image."""

    boxes: Tensor
    labels: Tensor
    difficult: Tensor
    image_id: Tensor
    file_name: str


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode to RGB.

    Returns:
        uint8 (H, W, 3), contiguous; greyscale, palette and CMYK images are converted.

    Raises:
        InputError: if the file is missing, truncated or no image.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\xff\xd8":
            try:  # same pixels as PIL in three quarters of the time; whatever it refuses, PIL judges
                raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                decoded = decode_jpeg(raw, mode=ImageReadMode.RGB)
                return np.ascontiguousarray(decoded.permute(1, 2, 0).numpy())
            except RuntimeError:
                pass
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be decoded ({brief(error)}); replace the file") from error


class VOCDetectionDataset(Dataset[tuple[Tensor, Target]]):
    """The images of one or several splits, in split order.

    All annotations are read and checked on construction; images are decoded on access. A sample's augmentation is a
    pure function of (seed, epoch, index): it depends on neither workers, ranks nor where a run was resumed.

    Args:
        splits: the splits, one after the other.
        class_names: names of the classes; the label of class i is i + 1.
        augmentation: from `build_augmentation`; None leaves images alone.
        seed: seed of the augmentation.
        annotations: already parsed files by path, to save reading them again.

    Raises:
        InputError: names the first problem (a missing or bad file, an unknown class, a box outside its image) and
            says how many more there are.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        class_names: Sequence[str],
        augmentation: A.Compose | None = None,
        seed: int = 0,
        annotations: Mapping[Path, Annotation] | None = None,
    ) -> None:
        self.class_names = list(class_names)
        self.augmentation = augmentation
        self.seed = seed
        self._paths: list[Path] = []
        self._labels_by_name = {name: index + 1 for index, name in enumerate(class_names)}
        boxes: list[NDArray[np.float32]] = []
        labels: list[int] = []
        difficult: list[bool] = []
        problems: list[InputError] = []
        seen: set[Path] = set()
        for split in splits:
            for stem in read_split(split.path):
                try:
                    path, annotation, found = self._read(split, stem, annotations or {})
                    if path in seen:
                        raise InputError(f"{split.path}: names {path.name}, which another of the splits names too")
                except InputError as problem:
                    problems.append(problem)
                    continue
                seen.add(path)
                self._paths.append(path)
                boxes.append(found)
                labels += [self._labels_by_name[item.name] for item in annotation.objects]
                difficult += [item.difficult for item in annotation.objects]
        if problems:
            more = f" (and {len(problems) - 1} more files with problems)" if len(problems) > 1 else ""
            raise InputError(f"{problems[0]}{more}") from problems[0]
        # Flat arrays instead of one object per image: forked workers then share the memory.
        self._starts = np.cumsum([0, *(len(item) for item in boxes)])
        self._boxes = np.concatenate(boxes) if boxes else np.zeros((0, 4), np.float32)
        self._labels = np.array(labels, dtype=np.int64)
        self._difficult = np.array(difficult, dtype=bool)
        self.file_names: list[str] = [path.name for path in self._paths]

    def _read(
        self, split: Split, stem: str, annotations: Mapping[Path, Annotation]
    ) -> tuple[Path, Annotation, NDArray[np.float32]]:
        path = split.annotation_path(stem)
        annotation = annotations.get(path) or read_annotation(path)
        image = find_image(split.folder, stem)
        size = image_size(image)
        boxes = np.zeros((len(annotation.objects), 4), np.float32)
        for index, item in enumerate(annotation.objects):
            if item.name not in self._labels_by_name:
                raise InputError(
                    f"{path}: object {index} is of the class {item.name!r}; known classes (--data.class_names): "
                    f"{', '.join(self.class_names)}"
                )
            boxes[index] = clip_box(item, size, f"{path}: object {index} ({item.name})")
        return image, annotation, boxes

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
        image = read_image(self._paths[index])
        if self.augmentation is not None:
            image, boxes, kept = augment(
                self.augmentation, image, boxes, np.random.SeedSequence([self.seed, epoch, index])
            )
            labels, difficult = labels[kept], difficult[kept]
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return pixels, self._target(index, boxes, labels, difficult)
