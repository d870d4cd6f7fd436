"""What is wrong with an image, its boxes and its class names, whatever the format that states them.

Training, evaluation and `frcnn doctor` share this, so that the doctor says what a training does.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from datamodules.dataset_format import Box, ImageRecord, ObjectRecord, Stated
from datamodules.problems import Kind, Problem
from detector.errors import InputError, shortened
from detector.use.reading import ImageHeader, frame


def judge(
    stated: Stated,
    name: str,
    path: Path | None,
    header: ImageHeader | InputError | None,
    class_names: Sequence[str] | None,
) -> ImageRecord:
    """Return an image with its boxes clipped to it, and everything that is wrong with it.

    Args:
        stated: What its annotation states.
        name: What results call the image.
        path: The image file; None if it is missing or was not looked for.
        header: Of the image, or why it is unreadable; None where there is no path.
        class_names: The known classes; None accepts all names.
    """
    problems = list(stated.problems)
    if isinstance(header, InputError):
        problems.append(Problem(str(path), None, "unreadable_image", str(header)))
    size, upright = frame(header, stated.size) if isinstance(header, ImageHeader) else (stated.size, False)
    objects: Sequence[ObjectRecord] = ()
    if stated.objects is not None:
        problems += _problems_of_image(stated, path, header, size)
        objects, found = _judge_objects(stated, size, class_names)
        problems = sorted([*problems, *found], key=lambda one: -1 if one.object is None else one.object)
    usable = stated.objects is not None and isinstance(header, ImageHeader)
    return ImageRecord(path, name, objects, upright, size, problems, usable, stated)


def _problems_of_image(
    stated: Stated, path: Path | None, header: ImageHeader | InputError | None, size: tuple[int, int]
) -> Iterator[Problem]:
    width, height = stated.size
    if not isinstance(header, ImageHeader) and min(stated.size) <= 0:
        yield stated.problem("unknown_size", "states no image size")
    elif min(stated.size) > 0 and stated.size != size:
        turned = "; the sides are swapped: the boxes may be those of the turned picture" * (stated.size == size[::-1])
        text = f"states {width} x {height} pixels, but {path} has {size[0]} x {size[1]}{turned}"
        yield stated.problem("size_mismatch", text)
    if not stated.objects:
        yield stated.problem("empty_image", "lists no object")


def _judge_objects(
    stated: Stated, size: tuple[int, int], class_names: Sequence[str] | None
) -> tuple[list[ObjectRecord], list[Problem]]:
    judged: list[ObjectRecord] = []
    problems: list[Problem] = []
    first: dict[tuple[str, Box], int] = {}
    for item in stated.objects or ():
        if item.box is not None:
            box, found = check_box(item.box, size)
            if class_names is not None and item.name not in class_names:
                box = None
                kind, hint = unknown_class(item.name, class_names)
                what = (
                    "of a category that is no known class" if stated.image else f"of the class {shortened(item.name)!r}"
                )
                problems.append(stated.problem(kind, f"is {what}{hint}", item, named=bool(stated.image)))
            problems += [stated.problem(kind, text, item) for kind, text in found]
            if box is not None and (earlier := first.setdefault((item.name, box), item.index)) != item.index:
                text = f"has the class and the box of {stated.thing.format(earlier)}"
                problems.append(stated.problem("duplicate_object", text, item))
            item = item if box == item.box else replace(item, box=box)
        judged.append(item)
    return judged, problems


def clip_box(box: Box, size: tuple[int, int]) -> Box | None:
    """Return the box of an object clipped to its image of `size` (width, height); None if nothing of it is inside."""
    width, height = size
    x1, y1, x2, y2 = box
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height))
    # Compared as float32, which is what is kept.
    inside = np.float32(clipped[0]) < np.float32(clipped[2]) and np.float32(clipped[1]) < np.float32(clipped[3])
    return clipped if inside else None


def check_box(stated: Box, size: tuple[int, int]) -> tuple[Box | None, list[tuple[Kind, str]]]:
    """Return the box clipped by `clip_box`, and (kind, message) of what is wrong with it.

    An unknown size (0, 0) clips nothing.
    """
    if min(size) <= 0:
        return stated, []
    box = clip_box(stated, size)
    image = f"outside its image of {size[0]} x {size[1]} pixels"
    if box is None:
        return None, [("box_outside", f"has box {stated}, wholly {image}; correct or remove it")]
    found: list[tuple[Kind, str]] = []
    if box != stated:
        found.append(("box_partly_outside", f"has box {stated}, partly {image}"))
    sides = (box[2] - box[0], box[3] - box[1])
    if min(sides) <= 1:
        found.append(("one_pixel_box", f"is {sides[0]:g} x {sides[1]:g} pixels large"))
    return box, found


def unknown_class(name: str, class_names: Sequence[str]) -> tuple[Kind, str]:
    """Return the kind of problem that an unknown class is, and which class may be meant."""
    meant = spelling_of(name, class_names)
    hint = "" if meant is None else f" (perhaps {meant!r} is meant)"
    kind: Kind = "unknown_class" if meant is None else "misspelt_class"
    return kind, f"{hint}; known classes (--data.class_names): {', '.join(class_names)}"


def check_classes(class_names: Sequence[str]) -> None:
    """Raise InputError if a class is named twice."""
    if len(set(class_names)) < len(class_names):
        raise InputError(f"--data.class_names names a class twice: {', '.join(class_names)}")


def plain_spelling(name: str) -> str:
    """Return a name without what spellings of it differ in: case, blanks, hyphens, underscores, a plural's s."""
    letters = "".join(character for character in name.casefold() if character.isalnum())
    return letters.removesuffix("s") or letters


def spelling_of(name: str, class_names: Sequence[str], cutoff: float = 0.75) -> str | None:
    """Return the class of which `name` looks like another spelling."""
    plain = {plain_spelling(known): known for known in class_names}
    close = difflib.get_close_matches(plain_spelling(name), plain, n=1, cutoff=cutoff)
    return plain[close[0]] if close else None


def similar_classes(counts: Mapping[str, int]) -> dict[str, str]:
    """Return the more frequent class by the one that looks like another spelling of it; they were found, not given.

    Equal but for case, blanks, hyphens, underscores or a plural's s; or, in names of at least five letters, nearly
    equal and ten times as rare. Names that differ in their digits are different classes.
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
