"""The images of splits in VOC format, read and checked: `read_splits`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from datamodules.detection_dataset import ImageRecord
from datamodules.image_reading import image_size
from datamodules.voc_format import Annotation, clip_box, read_annotation, read_split
from datamodules.voc_splits import Split, find_image
from detector.errors import InputError


def read_splits(
    splits: Sequence[Split], class_names: Sequence[str], annotations: Mapping[Path, Annotation] | None = None
) -> tuple[list[ImageRecord], list[InputError]]:
    """Read and check all annotations of splits, in split order.

    Args:
        splits: the splits, one after the other.
        class_names: names of the classes; the label of class i is i + 1.
        annotations: already parsed files by path, to save reading them again.

    Returns:
        The images in which nothing is wrong, and for each of the others what is wrong with it: a missing or bad file,
        an unknown class, a box outside its image, a second naming.

    Raises:
        InputError: A split file is missing or bad.
    """
    labels = {name: index + 1 for index, name in enumerate(class_names)}
    records: list[ImageRecord] = []
    problems: list[InputError] = []
    seen: set[Path] = set()
    for split in splits:
        for stem in read_split(split.path):
            try:
                record = _read(split, stem, labels, annotations or {})
                if record.path in seen:
                    raise InputError(f"{split.path}: names {record.path.name}, which another of the splits names too")
            except InputError as problem:
                problems.append(problem)
                continue
            seen.add(record.path)
            records.append(record)
    return records, problems


def _read(split: Split, stem: str, labels: Mapping[str, int], annotations: Mapping[Path, Annotation]) -> ImageRecord:
    path = split.annotation_path(stem)
    annotation = annotations.get(path) or read_annotation(path)
    image = find_image(split.folder, stem)
    size = image_size(image)
    boxes = np.zeros((len(annotation.objects), 4), np.float32)
    for index, item in enumerate(annotation.objects):
        if item.name not in labels:
            raise InputError(
                f"{path}: object {index} is of the class {item.name!r}; known classes (--data.class_names): "
                f"{', '.join(labels)}"
            )
        boxes[index] = clip_box(item, size, f"{path}: object {index} ({item.name})")
    return ImageRecord(
        path=image,
        boxes=boxes,
        labels=np.array([labels[item.name] for item in annotation.objects], dtype=np.int64),
        difficult=np.array([item.difficult for item in annotation.objects], dtype=np.bool_),
    )
