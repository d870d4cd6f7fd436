"""The images of splits in VOC format, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from datamodules.annotation_cache import AnnotationStore
from datamodules.detection_dataset import ImageRecord
from datamodules.image_reading import ImageHeader, frame
from datamodules.made_splits import Member
from datamodules.voc_format import Annotation, clip_box
from datamodules.voc_splits import find_image
from detector.errors import InputError


def read_members(
    members: Sequence[Member], class_names: Sequence[str], store: AnnotationStore
) -> tuple[list[ImageRecord], list[InputError]]:
    """Read and check the annotations of images.

    Args:
        members: the images, in order.
        class_names: names of the classes; the label of class i is i + 1.
        store: what is known from earlier.

    Returns:
        The images in which nothing is wrong, and for each of the others what is wrong with it: a missing or bad file,
        an unknown class, a box outside its image, a second naming.
    """
    labels = {name: index + 1 for index, name in enumerate(class_names)}
    records: list[ImageRecord] = []
    problems: list[InputError] = []
    seen: set[Path] = set()
    for folder, group in groupby(members, key=lambda member: member.folder):
        these = list(group)
        annotations = store.of(folder).annotations([member.stem for member in these])
        images = {member.stem: _find(member, annotations[member.stem]) for member in these}
        headers = store.of(folder).headers(path for path in images.values() if isinstance(path, Path))
        for member in these:
            try:
                record = _record(member, annotations[member.stem], images[member.stem], headers, labels)
                if record.path in seen:
                    raise InputError(f"{member.source}: names {record.name}, which another of the splits names too")
            except InputError as problem:
                problems.append(problem)
                continue
            seen.add(record.path)
            records.append(record)
    return records, problems


def _find(member: Member, annotation: Annotation | InputError) -> Path | InputError:
    try:
        stated = annotation.file_name if isinstance(annotation, Annotation) else ""
        return find_image(member.folder, member.stem, stated)
    except InputError as error:
        return error


def _record(
    member: Member,
    annotation: Annotation | InputError,
    image: Path | InputError,
    headers: Mapping[Path, ImageHeader | InputError],
    labels: Mapping[str, int],
) -> ImageRecord:
    if isinstance(annotation, InputError):
        raise annotation
    if isinstance(image, InputError):
        raise image
    header = headers[image]
    if isinstance(header, InputError):
        raise header
    size, upright = frame(header, (annotation.width, annotation.height))
    path = member.folder / "Annotations" / f"{member.stem}.xml"
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
        name=image.name,
        boxes=boxes,
        labels=np.array([labels[item.name] for item in annotation.objects], dtype=np.int64),
        difficult=np.array([item.difficult for item in annotation.objects], dtype=np.bool_),
        upright=upright,
    )
