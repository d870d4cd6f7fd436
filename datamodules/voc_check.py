"""One image of a dataset in VOC format: what of it can be used, and everything that is wrong with it.

Training and `frcnn doctor` share this, so that the doctor says what a training does.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datamodules.image_reading import image_size
from datamodules.problems import Kind, Problem
from datamodules.voc_format import (
    Annotation,
    NegativeBoxError,
    UnreadObject,
    VOCObject,
    clip_box,
    read_annotation_loosely,
)
from datamodules.voc_splits import Split, find_image
from detector.errors import InputError

Look = Literal["none", "header", "end"]
"""How far an image file is looked at: not at all, its size, or also whether it ends as its format says (which decides
for nearly all cut files, at the price of one read of a few bytes)."""


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
    box: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class CheckedImage:
    """What was found about one image.

    Args:
        stem: its name in split files.
        path: the image file; None if it is missing or was not looked for.
        annotated: whether there is an annotation file, readable or not.
        size: (width, height), of the image or else as stated; (0, 0) if unknown.
        objects: all objects of the annotation.
        problems: everything wrong with it.
    """

    stem: str
    path: Path | None
    annotated: bool
    size: tuple[int, int]
    objects: tuple[CheckedObject, ...]
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> bool:
        """Whether the image can be trained on, perhaps without some of its objects."""
        return not any(problem.breaks and problem.object is None for problem in self.problems)

    @property
    def usable_objects(self) -> list[CheckedObject]:
        return [item for item in self.objects if item.box is not None]


def check_image(split: Split, stem: str, class_names: Sequence[str] | None, look: Look = "header") -> CheckedImage:
    """Read an annotation and look at its image.

    Args:
        split: any split of the dataset folder.
        stem: name of the image, as in split files.
        class_names: the known classes; None accepts all names.
        look: how far the image file is looked at.
    """
    path = split.annotation_path(stem)
    problems: list[Problem] = []
    annotation: Annotation | None = None
    objects: tuple[VOCObject | UnreadObject, ...] = ()
    try:
        annotation, objects = read_annotation_loosely(path)
    except InputError as error:
        kind: Kind = "unreadable_annotation" if path.exists() else "missing_annotation"
        problems.append(Problem(str(path), None, kind, str(error)))
    stated = (annotation.width, annotation.height) if annotation is not None else (0, 0)
    image, size = None, None
    if look != "none":
        image, size, found = _look_at(split, stem, look)
        problems += found
    if annotation is not None:
        problems += _header_problems(path, annotation, objects, size, image)
        checked, found = _check_objects(path, objects, size or stated, class_names)
        problems += found
    else:
        checked = ()
    return CheckedImage(stem, image, path.is_file(), size or stated, checked, tuple(problems))


def _look_at(split: Split, stem: str, look: Look) -> tuple[Path | None, tuple[int, int] | None, list[Problem]]:
    try:
        image = find_image(split.folder, stem)
    except InputError as error:
        file = str(split.folder / "JPEGImages" / f"{stem}.jpg")
        return None, None, [Problem(file, None, "missing_image", str(error))]
    try:
        size = image_size(image)
    except InputError as error:
        return image, None, [Problem(str(image), None, "unreadable_image", str(error))]
    return image, size, decoding_problems(image) if look == "end" and not ends_properly(image) else []


def decoding_problems(image: Path) -> list[Problem]:
    """Decode an image whose header is good: empty, or what is wrong with the rest."""
    from datamodules.image_reading import read_image

    try:
        read_image(image)
    except InputError as error:
        return [Problem(str(image), None, "truncated_image", str(error))]
    return []


def ends_properly(image: Path) -> bool:
    """Whether a JPEG or PNG file has its end mark; False for other formats, which only decoding can judge."""
    with image.open("rb") as file:
        start = file.read(8)
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 64))
        end = file.read()
    if start[:2] == b"\xff\xd8":
        return end.rstrip(b"\0\r\n").endswith(b"\xff\xd9")
    return start == b"\x89PNG\r\n\x1a\n" and b"IEND\xaeB`\x82" in end


def _header_problems(
    path: Path,
    annotation: Annotation,
    objects: Sequence[object],
    size: tuple[int, int] | None,
    image: Path | None,
) -> list[Problem]:
    found: list[Problem] = []
    stated = (annotation.width, annotation.height)
    if size is not None and min(stated) > 0 and stated != size:
        rotated = "; the sides are swapped, so the boxes may be those of the rotated image" * (stated == size[::-1])
        text = f"{path}: states {stated[0]} x {stated[1]} pixels, but {image} has {size[0]} x {size[1]}{rotated}"
        found.append(Problem(str(path), None, "size_mismatch", text))
    if size is None and min(stated) <= 0:
        found.append(Problem(str(path), None, "unknown_size", f"{path}: states no size, and the image is not there"))
    name = Path(annotation.file_name.replace("\\", "/")).name
    if path.stem not in (name, Path(name).stem):
        text = f"{path}: states <filename> {annotation.file_name}, which is not its own name"
        found.append(Problem(str(path), None, "file_name_mismatch", text))
    if not objects:
        found.append(Problem(str(path), None, "empty_image", f"{path}: lists no object"))
    return found


def _check_objects(
    path: Path,
    objects: Sequence[VOCObject | UnreadObject],
    size: tuple[int, int],
    class_names: Sequence[str] | None,
) -> tuple[tuple[CheckedObject, ...], list[Problem]]:
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
                text = f"{path}: object {index} ({item.name}) has the class and the box of object {earlier}"
                problems.append(Problem(str(path), index, "duplicate_object", text))
    return tuple(checked), problems


def _check_object(
    path: Path,
    index: int,
    item: VOCObject | UnreadObject,
    size: tuple[int, int],
    class_names: Sequence[str] | None,
) -> tuple[tuple[float, float, float, float] | None, list[tuple[Kind, str]]]:
    """The box as it is used, or None, and (kind, message) of what is wrong."""
    where = f"{path}: object {index} ({item.name})"
    if isinstance(item, UnreadObject):
        return None, [
            ("negative_box" if isinstance(item.error, NegativeBoxError) else "incomplete_object", str(item.error))
        ]
    found: list[tuple[Kind, str]] = []
    if class_names is not None and item.name not in class_names:
        found.append(_unknown_class(path, index, item.name, class_names))
    if min(size) <= 0:
        return (None if found else item.box), found
    try:
        box = clip_box(item, size, where)
    except InputError as error:
        return None, [*found, ("box_outside", str(error))]
    if box != item.box:
        text = f"{where} has box {item.box}, partly outside its image of {size[0]} x {size[1]} pixels"
        found.append(("box_partly_outside", text))
    sides = (box[2] - box[0], box[3] - box[1])
    if min(sides) <= 1:
        found.append(("one_pixel_box", f"{where} is {sides[0]:g} x {sides[1]:g} pixels large"))
    usable = class_names is None or item.name in class_names
    return (box if usable else None), found


def _unknown_class(path: Path, index: int, name: str, class_names: Sequence[str]) -> tuple[Kind, str]:
    meant = spelling_of(name, class_names)
    hint = f" (perhaps {meant!r} is meant)" if meant is not None else ""
    return (
        "unknown_class" if meant is None else "misspelt_class",
        f"{path}: object {index} is of the class {name!r}{hint}; known classes (--data.class_names): "
        f"{', '.join(class_names)}",
    )


def plain_spelling(name: str) -> str:
    """A name without what spellings of it differ in: case, blanks, hyphens, underscores, a plural's s."""
    letters = "".join(character for character in name.casefold() if character.isalnum())
    return letters.removesuffix("s") or letters


def spelling_of(name: str, class_names: Sequence[str], cutoff: float = 0.75) -> str | None:
    """The class of which `name` looks like another spelling."""
    plain = {plain_spelling(known): known for known in class_names}
    close = difflib.get_close_matches(plain_spelling(name), plain, n=1, cutoff=cutoff)
    return plain[close[0]] if close else None


def similar_classes(counts: Mapping[str, int]) -> dict[str, str]:
    """Of classes that were found rather than given, those that look like another spelling of a more frequent one.

    Equal but for case, blanks, hyphens, underscores or a plural's s; or, in names of at least five letters, nearly
    equal and ten times as rare. Names that differ in their digits are different classes.

    Args:
        counts: objects by class.

    Returns:
        The more frequent name by the rarer one.
    """
    names = sorted(counts, key=lambda name: (-counts[name], name))
    found: dict[str, str] = {}
    for index, name in enumerate(names):
        for other in names[:index]:
            plain = plain_spelling(name), plain_spelling(other)
            rare = 10 * counts[name] <= counts[other] and min(map(len, plain)) >= 5 and _digits(name) == _digits(other)
            if other not in found and (plain[0] == plain[1] or (rare and spelling_of(name, [other], 0.8))):
                found[name] = other
                break
    return found


def _digits(name: str) -> list[str]:
    return re.findall(r"\d+", name)
