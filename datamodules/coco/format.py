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

What makes one image or one object unusable is a `Problem` of it, as in VOC format; what makes the whole file unusable
raises. Whatever can mean one thing only is read: ids and numbers written as text, `iscrowd` null as 0, and for an
object without `bbox` the box around its polygons. The last two are said in `CocoFile.notes`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from datamodules.coco.values import (
    BadObjectError,
    IdTable,
    box_around,
    plain_id,
    read_box,
    read_crowd,
    read_id,
    read_mapping,
    read_pixels,
    shown,
)
from datamodules.dataset_format import Id, ObjectRecord, Stated
from datamodules.problems import Problem
from datamodules.text_files import class_name, decode_text
from detector.errors import InputError, brief

KEYS: Final = ("images", "annotations", "categories")
THING: Final = "annotations[{}]"


class NoAnnotationsError(InputError):
    """A JSON document that is whole, but not one of COCO annotations."""


@dataclass(frozen=True)
class CocoCategory:
    """One category.

    Args:
        id: as the file states it.
        name: without outer blanks.
        supercategory: the name of the group it belongs to; empty where none is stated.
    """

    id: Id
    name: str
    supercategory: str = ""


@dataclass(frozen=True)
class CocoFile:
    """An annotation file.

    Args:
        path: the file.
        categories: those that name classes, by ascending id, numbers before texts; each name occurs once.
        images: By file name, in the order of the file; those that cannot be used whatever their objects are have no
            list of them. Annotations of no image are problems of the first one.
        root: a category without objects that only names the `supercategory` of all the others, as the exports of some
            tools put it first; it is not among `categories`.
        notes: lines about what was read although it is not as it should be.
    """

    path: Path
    categories: tuple[CocoCategory, ...]
    images: dict[str, Stated]
    root: CocoCategory | None = None
    notes: tuple[str, ...] = ()


def read_coco(path: str | Path) -> CocoFile:
    """Read an annotation file.

    Raises:
        InputError: One line that names the file and the entry, for a file that is missing or no JSON document, a
            missing key, no images, and bad categories. What is wrong with images and objects is in `problems`.
    """
    path = Path(path)
    document = _load(path)
    categories = _categories(document["categories"], path)
    images, by_id, unusable = _images(document["images"], path)
    used, notes = _read_objects(document["annotations"], path, by_id, categories, unusable)
    root = _root(categories, used)
    classes = [category for category in categories if category is not root]
    names: dict[str, CocoCategory] = {}
    for category in classes:
        if names.setdefault(category.name, category) is not category:
            first = names[category.name].id
            raise InputError(f"{path}: categories {first!r} and {category.id!r} repeat the name {shown(category.name)}")
    images |= {name: replace(images[name], objects=None) for name in unusable & images.keys()}
    return CocoFile(path, tuple(classes), images, root, notes)


def _read_objects(
    entries: Sequence[Any],
    path: Path,
    images: Mapping[Id, Stated],
    categories: Sequence[CocoCategory],
    unusable: set[str],
) -> tuple[set[Id], tuple[str, ...]]:
    """Put objects and problems into images, given by id; the ids of the categories that have objects, and notes."""
    first = next(iter(images.values()))
    image_table, category_table = IdTable[Stated](), IdTable[CocoCategory]()
    for number, one in images.items():
        image_table.add(number, one)
    for known in categories:
        category_table.add(known.id, known)
    used: set[Id] = set()
    seen: set[Id] = set()
    counts = Counter[str]()
    for index, entry in enumerate(entries):
        where = f"{path}: annotations[{index}]"
        image: Stated | None = None
        name = ""
        try:
            entry = read_mapping(entry, where)
            if isinstance(entry.get("id"), int | str):
                counts["repeated"] += entry["id"] in seen
                seen.add(entry["id"])
            image = image_table.find(read_id(entry, "image_id", where))
            if image is None:
                raise InputError(f"{where} has image_id {shown(entry['image_id'])}, which none of images has")
            category = category_table.find(read_id(entry, "category_id", where))
            if category is None:
                text = f"{where} has category_id {shown(entry['category_id'])}, which none of categories has"
                raise BadObjectError(text, "unknown_class")
            used.add(category.id)
            name = category.name
            item = _read_object(entry, index, name, where, counts)
        except InputError as error:
            kind = error.kind if isinstance(error, BadObjectError) else "incomplete_object"
            if image is None or image.image not in unusable:
                (image or first).problems.append(Problem(str(path), index, kind, str(error)))
            item = ObjectRecord(index, name, None, isinstance(entry, dict) and entry.get("iscrowd") in (1, "1"))
        if image is not None and image.objects is not None:
            image.objects.append(item)
    return used, _notes(counts, path)


def _read_object(entry: dict[str, Any], index: int, name: str, where: str, counts: Counter[str]) -> ObjectRecord:
    counts["no crowd"] += "iscrowd" in entry and entry["iscrowd"] is None
    crowd = read_crowd(entry, where)
    around = box_around(entry.get("segmentation")) if not entry.get("bbox") else None
    counts["no box"] += around is not None
    return ObjectRecord(index, name, around or read_box(entry, where), crowd)


def _notes(counts: Mapping[str, int], path: Path) -> tuple[str, ...]:
    texts = {
        "no box": "without bbox have the box around their polygons",
        "no crowd": "with iscrowd null are read as with 0",
        "repeated": "repeat the id of an earlier one; they are used, but pycocotools would take the last one for all",
    }
    return tuple(f"{path}: {counts[key]} annotations {text}" for key, text in texts.items() if counts[key])


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read as text ({brief(error)})") from error
    text = decode_text(data, path, "text")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: no whole JSON document: {error.msg} at character {error.pos} of {len(text)}. Was it cut short?"
        ) from error
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise InputError(f"{path}: no JSON document of annotations (nested too deep, or too large a number)") from error
    if isinstance(document, list):
        raise NoAnnotationsError(
            f"{path}: holds a JSON list, as files of COCO results do; annotations are an object of {', '.join(KEYS)}"
        )
    document = read_mapping(document, str(path))
    for key in KEYS:
        if not isinstance(document.get(key), list):
            state = "has no" if key not in document else f"has {shown(document[key])} as"
            kind = InputError if key in document else NoAnnotationsError
            raise kind(f"{path}: {state} {key}; COCO annotations are an object of the lists {', '.join(KEYS)}")
    if not document["images"]:
        raise InputError(f"{path}: its list of images is empty")
    return document


def _categories(entries: Sequence[Any], path: Path) -> list[CocoCategory]:
    """Read the categories, by ascending id."""
    found: dict[Id, CocoCategory] = {}
    for index, entry in enumerate(entries):
        where = f"{path}: categories[{index}]"
        entry = read_mapping(entry, where)
        number, name, group = read_id(entry, "id", where), entry.get("name"), entry.get("supercategory")
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        if not isinstance(name, str) or not class_name(name):
            raise InputError(f"{where} has name {shown(name)}; a text is needed")
        category = CocoCategory(number, class_name(name), class_name(group) if isinstance(group, str) else "")
        if found.setdefault(number, category) != category:
            raise InputError(f"{where} repeats the id of an earlier one: {shown(number)} ({shown(name)})")
    return sorted(found.values(), key=id_order)


def id_order(category: CocoCategory) -> tuple[bool, int, str]:
    """Return what categories are sorted by: ids that are whole numbers first, by value, also where they are texts."""
    plain = plain_id(category.id)
    return (False, plain, "") if isinstance(plain, int) else (True, 0, plain)


def _root(categories: Sequence[CocoCategory], used: set[Id]) -> CocoCategory | None:
    for category in categories:
        groups = {other.supercategory for other in categories if other is not category}
        if category.id not in used and groups == {category.name}:
            return category
    return None


def _images(entries: Sequence[Any], path: Path) -> tuple[dict[str, Stated], dict[Id, Stated], set[str]]:
    """Read all images, by name and by id, and the names of those that cannot be used."""
    by_name: dict[str, Stated] = {}
    by_id: dict[Id, Stated] = {}
    unusable: set[str] = set()
    for index, entry in enumerate(entries):
        where = f"{path}: images[{index}]"
        try:
            entry = read_mapping(entry, where)
            number, name = read_id(entry, "id", where), entry.get("file_name")
            if not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise InputError(f"{where} has file_name {shown(name)}; a text is needed")
            name, size = (
                name.replace("\\", "/"),
                (read_pixels(entry, "width", where), read_pixels(entry, "height", where)),
            )
            image = Stated(path, THING, size, [], image=name, result_id=number)
        except InputError as error:
            # Under a name of its own, so that it is counted; its objects are not of an unknown image.
            given = entry.get("id") if isinstance(entry, dict) else None
            number = given if isinstance(given, int | str) and given not in by_id else where
            name = f"{path.name}: images[{index}]"
            problem = Problem(str(path), None, "unreadable_annotation", str(error))
            image = Stated(path, THING, objects=[], problems=[problem], image=name, result_id=number)
            unusable.add(name)
        same_name, same_id = by_name.get(name), by_id.get(number)
        if same_name is None and same_id is None:
            by_name[name] = by_id[number] = image
            continue
        text = f"{where} repeats the id or the file name of an earlier one: {number!r}, {shown(name)}"
        one = by_name.setdefault(name, image)
        one.problems.append(Problem(str(path), None, "named_twice", text))
        by_id.setdefault(number, one)
        if same_name is not same_id:  # it cannot be known which objects are of which picture
            unusable |= {other.image for other in (same_name, same_id, one) if other is not None}
    return by_name, by_id, unusable
