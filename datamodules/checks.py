"""What is wrong with a box or a class name, whatever the format that states it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from datamodules.problems import Kind
from detector.errors import InputError

Box = tuple[float, float, float, float]


def clip_box(box: Box, size: tuple[int, int], where: str) -> Box:
    """The box of an object clipped to its image of `size` (width, height).

    Raises:
        InputError: names `where`, if nothing of the box is in the image.
    """
    width, height = size
    x1, y1, x2, y2 = box
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height))
    # Compared as float32, which is what is kept.
    if not (np.float32(clipped[0]) < np.float32(clipped[2]) and np.float32(clipped[1]) < np.float32(clipped[3])):
        raise InputError(
            f"{where} has box {box}, wholly outside its image of {width} x {height} pixels; correct or remove it"
        )
    return clipped


def check_box(stated: Box, size: tuple[int, int], where: str) -> tuple[Box | None, list[tuple[Kind, str]]]:
    """The box of an object clipped to its image of `size` (width, height), None if nothing is left of it; and (kind,
    message) of what is wrong with it. An unknown size (0, 0) clips nothing."""
    if min(size) <= 0:
        return stated, []
    try:
        box = clip_box(stated, size, where)
    except InputError as error:
        return None, [("box_outside", str(error))]
    found: list[tuple[Kind, str]] = []
    if box != stated:
        text = f"{where} has box {stated}, partly outside its image of {size[0]} x {size[1]} pixels"
        found.append(("box_partly_outside", text))
    sides = (box[2] - box[0], box[3] - box[1])
    if min(sides) <= 1:
        found.append(("one_pixel_box", f"{where} is {sides[0]:g} x {sides[1]:g} pixels large"))
    return box, found


def unknown_class(name: str, class_names: Sequence[str]) -> tuple[Kind, str]:
    """The kind of problem that an unknown class is, and which class may be meant."""
    meant = spelling_of(name, class_names)
    hint = "" if meant is None else f" (perhaps {meant!r} is meant)"
    kind: Kind = "unknown_class" if meant is None else "misspelt_class"
    return kind, f"{hint}; known classes (--data.class_names): {', '.join(class_names)}"


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
