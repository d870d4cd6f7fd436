"""COCO's annotation files: one JSON document -> images, categories and objects, checked.

Boxes of the file are x, y, width, height in continuous pixels, counted from 0; here they are `xyxy`. `iscrowd` marks a
region of many objects that were not separated. It is read as `difficult`, this project's one kind of region to be
ignored:

- Training treats it as `--model.difficult` says: `ignore` keeps candidates that overlap it out of the losses, while the
  default, `drop`, makes them background.
- COCO's metrics treat it as pycocotools treats a crowd: any number of detections whose own area lies inside by the
  threshold count neither as right nor as wrong. Sizes (small, medium, large) are those of boxes, not of masks.
- VOC's metrics treat it as a difficult object, which is stricter: a detection is forgiven only at an IoU of 0.5 with
  it, so small detections inside a large crowd count as wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from detector.errors import InputError

KEYS: Final = ("images", "annotations", "categories")
MAX_PIXELS: Final = 10**9  # along a side; whatever is beyond is no coordinate


@dataclass(frozen=True)
class CocoObject:
    """One annotation.

    Args:
        index: position in the file's list, counted from 0.
        category: name of its category.
        box: (x1, y1, x2, y2), continuous pixels, as stated, also beyond the image.
        crowd: `iscrowd`.
    """

    index: int
    category: str
    box: tuple[float, float, float, float]
    crowd: bool


@dataclass(frozen=True)
class CocoImage:
    """One image.

    Args:
        file_name: as the file states it, with forward slashes.
        width: 0 where the file states none.
        height: 0 where the file states none.
        objects: in the order of the file.
    """

    file_name: str
    width: int
    height: int
    objects: list[CocoObject] = field(default_factory=list)


@dataclass(frozen=True)
class CocoFile:
    """An annotation file.

    Args:
        path: the file.
        categories: their names, by ascending id.
        images: by file name, in the order of the file.
    """

    path: Path
    categories: tuple[str, ...]
    images: dict[str, CocoImage]


def read_coco(path: str | Path) -> CocoFile:
    """Read an annotation file.

    Raises:
        InputError: One line that names the file and the entry, for a file that is missing or no JSON document, a
            missing key, a value of the wrong kind, an id given twice or unknown, a box without width or height.
    """
    path = Path(path)
    document = _load(path)
    names = _categories(document["categories"], path)
    images = _images(document["images"], path)
    for index, entry in enumerate(document["annotations"]):
        where = f"{path}: annotations[{index}]"
        entry = _mapping(entry, where)
        image = images.get(_id(entry, "image_id", where))
        if image is None:
            raise InputError(f"{where} has image_id {_shown(entry['image_id'])}, which none of images has")
        name = names.get(_id(entry, "category_id", where))
        if name is None:
            raise InputError(f"{where} has category_id {_shown(entry['category_id'])}, which none of categories has")
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise InputError(f"{where} has iscrowd {_shown(crowd)}; 0 or 1 is needed")
        image.objects.append(CocoObject(index, name, _box(entry.get("bbox"), where), bool(crowd)))
    by_name = {image.file_name: image for image in images.values()}
    return CocoFile(path, tuple(names[number] for number in sorted(names)), by_name)


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such annotation file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({' '.join(str(error).split())})") from error
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: no whole JSON document: {error.msg} at character {error.pos} of {len(text)}. Was it cut short?"
        ) from error
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise InputError(f"{path}: no JSON document of annotations (nested too deep, or too large a number)") from error
    if isinstance(document, list):
        raise InputError(
            f"{path}: holds a JSON list, as files of COCO results do; annotations are an object of {', '.join(KEYS)}"
        )
    document = _mapping(document, str(path))
    for key in KEYS:
        if not isinstance(document.get(key), list):
            state = "has no" if key not in document else f"has {_shown(document[key])} as"
            raise InputError(f"{path}: {state} {key}; COCO annotations are an object of the lists {', '.join(KEYS)}")
    return document


def _categories(entries: Sequence[Any], path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        where = f"{path}: categories[{index}]"
        entry = _mapping(entry, where)
        number, name = _id(entry, "id", where), entry.get("name")
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{where} has name {_shown(name)}; a text is needed")
        if number in names or name.strip() in names.values():
            raise InputError(f"{where} repeats the id or the name of an earlier one: {number}, {_shown(name)}")
        names[number] = name.strip()
    return names


def _images(entries: Sequence[Any], path: Path) -> dict[int, CocoImage]:
    images: dict[int, CocoImage] = {}
    seen: set[str] = set()
    for index, entry in enumerate(entries):
        where = f"{path}: images[{index}]"
        entry = _mapping(entry, where)
        number, name = _id(entry, "id", where), entry.get("file_name")
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InputError(f"{where} has file_name {_shown(name)}; a text is needed")
        name = name.replace("\\", "/")
        if number in images or name in seen:
            raise InputError(f"{where} repeats the id or the file name of an earlier one: {number}, {_shown(name)}")
        seen.add(name)
        images[number] = CocoImage(name, _pixels(entry, "width", where), _pixels(entry, "height", where))
    return images


def _mapping(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {_shown(entry)}; a JSON object is needed")
    return entry


def _id(entry: dict[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{where} has {key} {_shown(value)}; a whole number is needed")
    return value


def _pixels(entry: dict[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if value is None:
        return 0
    if not _is_number(value) or not 0 <= value <= MAX_PIXELS or value != int(value):
        raise InputError(f"{where} has {key} {_shown(value)}; a whole number of pixels is needed")
    return int(value)


def _box(value: Any, where: str) -> tuple[float, float, float, float]:
    if not (isinstance(value, list) and len(value) == 4 and all(_is_number(number) for number in value)):
        raise InputError(f"{where} has bbox {_shown(value)}; four finite numbers x, y, width, height are needed")
    x, y, width, height = value
    if width <= 0 or height <= 0:
        raise InputError(f"{where} has bbox {_shown(value)} (x, y, width, height); width and height must be positive")
    return float(x), float(y), float(x + width), float(y + height)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_PIXELS  # no nan


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
