"""The images of splits in VOC format, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from datamodules.detection_dataset import ImageRecord
from datamodules.file_cache import FileStore
from datamodules.image_reading import ImageHeader
from datamodules.problems import Problem
from datamodules.splits import Member
from datamodules.voc.annotation_cache import AnnotationCache
from datamodules.voc.check import CheckedImage, Objects, judge, read_loosely
from datamodules.voc.format import Annotation, VOCObject
from datamodules.voc.layout import find_image
from datamodules.voc.names import annotation_path
from detector.errors import InputError


def read_members(
    members: Sequence[Member], class_names: Sequence[str], store: FileStore[AnnotationCache]
) -> tuple[list[ImageRecord], list[Problem]]:
    """Read and check the annotations of images.

    Args:
        members: the images, in order.
        class_names: names of the classes; the label of class i is i + 1.
        store: what is known from earlier.

    Returns:
        The images that can be used, with those of their objects that can, and all that is wrong: a missing or bad file,
        an unknown class, a box outside its image, a second naming, and whatever else `frcnn doctor` finds in one image.
    """
    labels = {name: index + 1 for index, name in enumerate(class_names)}
    records: list[ImageRecord] = []
    problems: list[Problem] = []
    seen: set[Path] = set()
    for folder, group in groupby(members, key=lambda member: member.folder):
        these = list(group)
        annotations = store.of(folder).annotations([member.stem for member in these])
        images = {member.stem: _find(member, annotations[member.stem]) for member in these}
        headers = store.of(folder).headers(path for path in images.values() if isinstance(path, Path))
        for member in these:
            path = annotation_path(folder, member.stem)
            image = images[member.stem]
            header = headers[image] if isinstance(image, Path) else None
            read = _with_all_objects(path, annotations[member.stem])
            checked = judge(path, folder / "JPEGImages" / f"{member.stem}.jpg", read, image, header, class_names)
            problems += checked.problems
            if not isinstance(image, Path) or not checked.usable:
                continue
            if image in seen:
                text = f"{member.source}: names {image.name}, which another of the splits names too"
                problems.append(Problem(str(member.source), None, "named_twice", text))
                continue
            seen.add(image)
            name = image.relative_to(folder / "JPEGImages").as_posix()
            records.append(_record(image, name, checked, labels, header))
    return records, problems


def readable_objects(folder: Path, stem: str, annotation: Annotation | InputError) -> list[VOCObject]:
    """The objects of an annotation in which nothing is wrong that could be seen without its image."""
    read = _with_all_objects(annotation_path(folder, stem), annotation)
    return [] if isinstance(read, InputError) else [item for item in read[1] if isinstance(item, VOCObject)]


def _find(member: Member, annotation: Annotation | InputError) -> Path | InputError:
    try:
        stated = annotation.file_name if isinstance(annotation, Annotation) else ""
        return find_image(member.folder, member.stem, stated)
    except InputError as error:
        return error


def _with_all_objects(path: Path, annotation: Annotation | InputError) -> tuple[Annotation, Objects] | InputError:
    """An annotation in which something is wrong is not kept, so it is read again."""
    return read_loosely(path) if isinstance(annotation, InputError) else (annotation, annotation.objects)


def _record(
    image: Path, name: str, checked: CheckedImage, labels: dict[str, int], header: ImageHeader | InputError | None
) -> ImageRecord:
    size = None
    if isinstance(header, ImageHeader):
        size = header.upright_size if checked.upright else (header.width, header.height)
    objects = [(item, item.box) for item in checked.objects if item.box is not None]
    return ImageRecord(
        path=image,
        name=name,
        boxes=np.array([box for _, box in objects], dtype=np.float32).reshape(-1, 4),
        labels=np.array([labels[item.name] for item, _ in objects], dtype=np.int64),
        difficult=np.array([item.difficult for item, _ in objects], dtype=np.bool_),
        upright=checked.upright,
        size=size,
    )
