"""Values of a COCO file as tools write them: ids and numbers, also as text, and what of an object gives its box."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Generic, TypeVar

from datamodules.dataset_format import Box, Id
from datamodules.problems import Kind
from detector.errors import InputError, shortened

MAX_PIXELS: Final = 10**9  # along a side; whatever is beyond is no coordinate

_WHOLE = re.compile(r"\s*[+-]?\d{1,18}\s*")
_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?\s*")

Found = TypeVar("Found")


class BadObjectError(InputError):
    """An object that cannot be used, and the kind of problem that this is."""

    def __init__(self, message: str, kind: Kind) -> None:
        super().__init__(message)
        self.kind = kind


class IdTable(Generic[Found]):
    """What ids stand for. 7 and "7" (and "007") are one id, unless the file gives them to different things."""

    def __init__(self) -> None:
        self._exact: dict[Id, Found] = {}
        self._plain: dict[Id, list[Found]] = {}

    def add(self, number: Id, found: Found) -> None:
        """Let an id stand for something."""
        self._exact[number] = found
        self._plain.setdefault(plain_id(number), []).append(found)

    def find(self, number: Id) -> Found | None:
        """Return what an id stands for; None where nothing or several things could be meant."""
        if number in self._exact:
            return self._exact[number]
        found = self._plain.get(plain_id(number), [])
        return found[0] if len(found) == 1 else None


def plain_id(number: Id) -> Id:
    """Return an id without what spellings of it differ in: a whole number where it is the text of one."""
    return int(number) if isinstance(number, str) and _WHOLE.fullmatch(number) else number


def read_id(entry: Mapping[str, Any], key: str, where: str) -> Id:
    """Read an id; raise InputError for what is neither a whole number nor a text."""
    value = entry.get(key)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value.strip()):
        return value
    raise InputError(f"{where} has {key} {shown(value)}; a whole number or a text is needed")


def read_number(value: Any) -> float | None:
    """Read a finite number that may be a coordinate, also from its text; None for anything else."""
    if isinstance(value, str) and len(value) <= 400 and _NUMBER.fullmatch(value):
        value = float(value)
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_PIXELS  # no nan
    return value if known else None


def read_pixels(entry: Mapping[str, Any], key: str, where: str) -> int:
    """Read a side of an image, 0 where none is stated; raise InputError for what is no whole number of pixels."""
    value = entry.get(key)
    if value is None:
        return 0
    number = read_number(value)
    if number is None or number < 0 or number != int(number):
        raise InputError(f"{where} has {key} {shown(value)}; a whole number of pixels is needed")
    return int(number)


def read_box(entry: Mapping[str, Any], where: str) -> Box:
    """Read `bbox` (x, y, width, height) as xyxy.

    Raises:
        BadObjectError: It is not four finite numbers, or has no area.
    """
    value = entry.get("bbox")
    numbers = [read_number(number) for number in value] if isinstance(value, list) and len(value) == 4 else [None]
    known = [number for number in numbers if number is not None]
    if len(known) < 4:
        text = f"{where} has bbox {shown(value)}; four finite numbers x, y, width, height are needed"
        raise BadObjectError(text, "incomplete_object")
    x, y, width, height = known
    if width <= 0 or height <= 0:
        text = f"{where} has bbox {shown(value)} (x, y, width, height); width and height must be positive"
        raise BadObjectError(text, "negative_box")
    return float(x), float(y), float(x + width), float(y + height)


def box_around(segmentation: Any) -> Box | None:
    """Return the box around polygons, lists of x, y, x, y, ... as COCO's own `bbox` is.

    None for anything else, or without an area.
    """
    if not isinstance(segmentation, list) or not segmentation:
        return None
    xs: list[float] = []
    ys: list[float] = []
    for polygon in segmentation:
        numbers = [read_number(number) for number in polygon] if isinstance(polygon, list) else []
        known = [number for number in numbers if number is not None]
        if len(known) < 6 or len(known) % 2 or len(known) < len(numbers):
            return None
        xs += known[0::2]
        ys += known[1::2]
    box = float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))
    return box if box[0] < box[2] and box[1] < box[3] else None


def read_crowd(entry: Mapping[str, Any], where: str) -> bool:
    """Read `iscrowd`, False where it is missing or null; raise BadObjectError for other values than 0 and 1."""
    value = entry.get("iscrowd")
    number = 0 if value is None else value if isinstance(value, bool) else read_number(value)
    if number not in (0, 1):
        raise BadObjectError(f"{where} has iscrowd {shown(value)}; 0 or 1 is needed", "incomplete_object")
    return bool(number)


def read_mapping(entry: Any, where: str) -> dict[str, Any]:
    """Return a JSON object; raise InputError for anything else."""
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {shown(entry)}; a JSON object is needed")
    return entry


def shown(value: Any) -> str:
    """Return a value of a file as a message can hold it."""
    return shortened(repr(value))
