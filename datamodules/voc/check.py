"""One image of a dataset in VOC format: what of it can be used, and everything that is wrong with it.

Training and `frcnn doctor` share this, so that the doctor says what a training does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.checks import Box, check_box, unknown_class
from datamodules.image_reading import USUAL, ImageHeader, Reading, frame, read_header
from datamodules.problems import Kind, Problem
from datamodules.voc.format import (
    Annotation,
    NegativeBoxError,
    UnreadObject,
    VOCObject,
    parse_annotation_loosely,
    read_annotation_bytes,
)
from datamodules.voc.layout import find_image
from datamodules.voc.names import annotation_path
from detector.errors import InputError, shortened

Objects = tuple[VOCObject | UnreadObject, ...]


@dataclass(frozen=True)
class CheckedObject:
    """One <object> of an annotation, usable or not.

    Args:
        index: its number in the file, from 0.
        name: class name; empty where there is none.
        difficult: VOC flag.
        box: xyxy in pixels, clipped to the image; None if it cannot be used, for whatever reason.
    """

    index: int
    name: str
    difficult: bool
    box: Box | None


@dataclass(frozen=True)
class CheckedImage:
    """What was found about one image.

    Args:
        path: the image file; None if it is missing or was not looked for.
        upright: apply the EXIF orientation, see `frame`.
        annotated: whether there is an annotation file, readable or not.
        objects: all objects of the annotation.
        problems: everything wrong with it.
    """

    path: Path | None
    upright: bool
    annotated: bool
    objects: tuple[CheckedObject, ...]
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> bool:
        """Whether it can be trained on, perhaps without some of its objects."""
        return not any(problem.breaks and problem.object is None for problem in self.problems)


def check_image(
    folder: Path, stem: str, class_names: Sequence[str] | None, look: bool = True, reading: Reading = USUAL
) -> CheckedImage:
    """Read an annotation and the header of its image, and judge them.

    Args:
        folder: of the dataset, with JPEGImages/ and Annotations/.
        stem: name of the image, as in split files.
        class_names: the known classes; None accepts all names.
        look: whether the image is looked for.
        reading: how it would be read.
    """
    path = annotation_path(folder, stem)
    read = read_loosely(path)
    image: Path | InputError | None = None
    header: ImageHeader | InputError | None = None
    if look:
        try:
            image = find_image(folder, stem, "" if isinstance(read, InputError) else read[0].file_name)
        except InputError as error:
            image = error
    if isinstance(image, Path):
        try:
            header = read_header(image)
            reading.check_size(image, header.width, header.height)
        except InputError as error:
            header = error
    return judge(path, folder / "JPEGImages" / f"{stem}.jpg", read, image, header, class_names)


def read_loosely(path: Path) -> tuple[Annotation, Objects] | InputError:
    """An annotation with all its objects, bad ones included, or why it cannot be read at all."""
    try:
        return parse_annotation_loosely(read_annotation_bytes(path), path)
    except InputError as error:
        return error


def judge(
    path: Path,
    expected_image: Path,
    read: tuple[Annotation, Objects] | InputError,
    image: Path | InputError | None,
    header: ImageHeader | InputError | None,
    class_names: Sequence[str] | None,
) -> CheckedImage:
    """What is wrong with an image, from what was read.

    Args:
        path: the annotation file.
        expected_image: what to call the image if it is missing.
        read: as from `read_loosely`.
        image: the image file, or why it was not found; None: it was not looked for.
        header: of the image, or why it is unreadable; None: there is no image.
        class_names: the known classes; None accepts all names.
    """
    problems: list[Problem] = []
    checked: list[CheckedObject] = []
    annotated = not isinstance(read, InputError) or path.exists()
    if isinstance(read, InputError):
        kind: Kind = "unreadable_annotation" if annotated else "missing_annotation"
        problems.append(Problem(str(path), None, kind, str(read)))
    if isinstance(image, InputError):
        problems.append(Problem(str(expected_image), None, "missing_image", str(image)))
    if isinstance(header, InputError):
        problems.append(Problem(str(image), None, "unreadable_image", str(header)))
    upright = False
    if not isinstance(read, InputError):
        annotation, objects = read
        size = stated = (annotation.width, annotation.height)
        if isinstance(header, ImageHeader):
            size, upright = frame(header, stated)
        problems += _problems_of_file(path, annotation, len(objects), image, header, size)
        checked, found = _check_objects(path, objects, size, class_names)
        problems += found
    found_image = image if isinstance(image, Path) else None
    return CheckedImage(found_image, upright, annotated, tuple(checked), tuple(problems))


def _problems_of_file(
    path: Path,
    annotation: Annotation,
    objects: int,
    image: Path | InputError | None,
    header: ImageHeader | InputError | None,
    size: tuple[int, int],
) -> list[Problem]:
    found: list[tuple[Kind, str]] = []
    stated = (annotation.width, annotation.height)
    if isinstance(header, ImageHeader) and min(stated) > 0 and stated != size:
        turned = "; the sides are swapped: the boxes may be those of the turned picture" if stated == size[::-1] else ""
        text = f"states {stated[0]} x {stated[1]} pixels, but {image} has {size[0]} x {size[1]}{turned}"
        found.append(("size_mismatch", text))
    if not isinstance(header, ImageHeader) and min(stated) <= 0:
        found.append(("unknown_size", "states no size of the image"))
    name = annotation.file_name.replace("\\", "/").rsplit("/", 1)[-1]
    if path.stem not in (name, Path(name).stem):
        found.append(("file_name_mismatch", f"states the file name {shortened(annotation.file_name)}, not its own"))
    if not objects:
        found.append(("empty_image", "lists no object"))
    return [Problem(str(path), None, kind, f"{path}: {text}") for kind, text in found]


def _check_objects(
    path: Path, objects: Objects, size: tuple[int, int], class_names: Sequence[str] | None
) -> tuple[list[CheckedObject], list[Problem]]:
    checked: list[CheckedObject] = []
    problems: list[Problem] = []
    first: dict[tuple[str, tuple[float, ...]], int] = {}
    for index, item in enumerate(objects):
        box, found = _check_object(path, index, item, size, class_names)
        checked.append(CheckedObject(index, item.name, item.difficult, box))
        problems += [Problem(str(path), index, kind, message) for kind, message in found]
        if box is not None:
            earlier = first.setdefault((item.name, box), index)
            if earlier != index:
                text = f"{path}: object {index} ({shortened(item.name)}) has the class and the box of object {earlier}"
                problems.append(Problem(str(path), index, "duplicate_object", text))
    return checked, problems


def _check_object(
    path: Path, index: int, item: VOCObject | UnreadObject, size: tuple[int, int], class_names: Sequence[str] | None
) -> tuple[Box | None, list[tuple[Kind, str]]]:
    """The box as it is used, or None, and (kind, message) of what is wrong."""
    if isinstance(item, UnreadObject):
        negative = isinstance(item.error, NegativeBoxError)
        return None, [("negative_box" if negative else "incomplete_object", str(item.error))]
    box, found = check_box(item.box, size, f"{path}: object {index} ({shortened(item.name)})")
    if class_names is not None and item.name not in class_names:
        kind, text = unknown_class(item.name, class_names)
        return None, [(kind, f"{path}: object {index} is of the class {shortened(item.name)!r}{text}"), *found]
    return box, found
